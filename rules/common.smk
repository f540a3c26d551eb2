# The checked configuration, the resolved GPUs, and the paths and helper functions that the rules share.
import os
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path

import yaml
from snakemake.logging import logger
from snakemake.utils import validate
from stof_kernels.baselines import all_methods
from stof_kernels.benchmarking import config as checks
from stof_kernels.benchmarking import targets
from stof_kernels.benchmarking.experiments import EXPERIMENTS
from stof_kernels.benchmarking.records import provenance_of
from stof_kernels.figures import FIGURES
from stof_kernels.figures.floors import EXPERIMENTS as FLOORS
from stof_kernels.kernels.build import TARGETS as BUILDABLE
from stof_kernels.kernels.build import source_digest
from stof_kernels.provenance import code_digest, normalized_source

ROOT = Path(workflow.basedir)
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.yaml"
RECORDED = Path("results/recorded")


def resolve_targets():
    """Targets of this run; a job that a cluster runs takes over what the planning process decided."""
    if workflow.remote_exec and targets.HANDOVER_VARIABLE in os.environ:
        return targets.handed_over(os.environ[targets.HANDOVER_VARIABLE])
    # The executor is not known yet. A cluster's profile sets a number of jobs and none of cores; a dry-run fills in the cores.
    limits = workflow.resource_settings
    elsewhere = limits.nodes is not None and (
        limits.cores is None or workflow.output_settings.dryrun
    )
    return targets.resolve(
        config["gpu"],
        config["source"],
        config["gpus"],
        device=targets.present_device(),
        elsewhere=elsewhere,
    )


# Whatever is wrong with the input ends the run here, with nothing done and one line: a WorkflowError would add two that name
# this file, which is not where the mistake is.
try:
    checks.normalize(config)
    checks.check_schema(config, yaml.safe_load(SCHEMA.read_text(encoding="utf-8")))
    validate(config, str(SCHEMA))  # fills in the defaults
    checks.check_relations(config)
    TARGETS = {target.name: target for target in resolve_targets()}
    for target in TARGETS.values():
        if target.source == targets.RECORDED:
            checks.check_recorded(RECORDED, target.name)
except (checks.ConfigError, targets.TargetError) as error:
    sys.exit(f"stof-kernels: {error}")

os.environ[targets.HANDOVER_VARIABLE] = targets.hand_over(list(TARGETS.values()))


envvars:
    targets.HANDOVER_VARIABLE,


if workflow.is_main_process:
    for target in TARGETS.values():
        logger.info(str(target))

# Threads of a job that runs alone. A cluster's profile sets them per rule and leaves the cores open.
ALL_CORES = workflow.resource_settings.cores or 1

MEASURED = {
    name: target
    for name, target in TARGETS.items()
    if target.source == targets.MEASURED
}


def any_of(names):
    """Wildcard pattern for exactly these names; nothing, not everything, where there are none."""
    return "|".join(sorted(names)) or "(?!)"


@cache
def part_digest(name):
    """Digest of one file or folder of the package, computed once: methods share most of what they depend on."""
    return code_digest([name])


def digest_of(script, depends):
    """What a rule's result depends on: package code by name, and the rule's script. Comments do not count."""
    own = normalized_source(ROOT / "workflow" / "scripts" / script)
    parts = [own, *(f"{name} {part_digest(name)}" for name in depends)]
    return sha256("\n".join(parts).encode()).hexdigest()[:12]


@cache
def manifest(arch):
    """Product of the build for one architecture. The digest in its path makes a code edit plan the build and what needs it."""
    return f"results/build/{arch}-{source_digest(arch)}.json"


def manifests():
    """Products of the builds that this run's measurements can use."""
    return sorted(
        {
            manifest(target.arch)
            for target in MEASURED.values()
            if target.arch in BUILDABLE
        }
    )


def spec_of(wildcards):
    """The method of a measuring job, as its experiment runs it."""
    return EXPERIMENTS[wildcards.experiment].spec(wildcards.method)


def runs_here(wildcards):
    """Whether a measuring job measures anything, or only says why it cannot."""
    device = MEASURED[wildcards.gpu].device
    return not EXPERIMENTS[wildcards.experiment].why_not(spec_of(wildcards), device)


def extension_of(wildcards):
    """Input of a measuring job: the build for its architecture if the method runs compiled code of ours, else nothing."""
    target = MEASURED[wildcards.gpu]
    needed = any(
        name.startswith("kernels")
        for name in EXPERIMENTS[wildcards.experiment].depends_of(
            spec_of(wildcards), target.device
        )
    )
    build = needed and target.arch in BUILDABLE and runs_here(wildcards)
    return manifest(target.arch) if build else []


def shared_run(wildcards):
    """Input of a measuring job: the table of the experiment whose run it shares, if there is one."""
    gpu, experiment, method = wildcards.gpu, wildcards.experiment, wildcards.method
    if not runs_here(wildcards):
        return []
    other = checks.shared_experiment(config, experiment, method, MEASURED[gpu].device)
    return f"results/measured/{gpu}/{other}/{method}.csv" if other else []


def gpu_model(wildcards):
    """The card that a cluster should give a measuring job; empty for a job on the CPU."""
    return wildcards.gpu if MEASURED[wildcards.gpu].device == "cuda" else ""


def measured_tables(experiment):
    """Tables that this run measures in one experiment."""
    return [
        f"results/measured/{gpu}/{experiment}/{spec.id}.csv"
        for gpu, target in MEASURED.items()
        for spec in checks.selected_methods(config, experiment, target.device)
    ]


def tables_of(experiment):
    """All tables of one experiment, GPU by GPU: those that this run measures, or those in git."""
    recorded = [
        str(path)
        for name in TARGETS
        if name not in MEASURED
        for path in targets.recorded_files(RECORDED, name, experiment)
    ]
    return measured_tables(experiment) + recorded


def sources_of(experiment):
    """The tables of one experiment and the files that say where their rows come from."""
    tables = tables_of(experiment)
    return tables + [str(provenance_of(Path(table))) for table in tables]


def tabled():
    """Experiments that have a table: those that a figure or the floors read, and all that the config measures."""
    drawn = {e for figure in FIGURES.values() for e in figure.experiments}
    return sorted(drawn.union(FLOORS, config["experiments"]))
