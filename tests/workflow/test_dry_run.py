"""What is planned, for every target, profile and way to say which GPU; nothing is run here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from snakemake.utils import validate

from stof_kernels.benchmarking import config as checks
from stof_kernels.benchmarking.experiments import EXPERIMENTS
from stof_kernels.figures import FIGURES
from stof_kernels.figures.floors import EXPERIMENTS as FLOORS

ROOT = Path(__file__).resolve().parents[2]
FILLED = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
checks.normalize(FILLED)
validate(FILLED, str(ROOT / "workflow" / "schemas" / "config.schema.yaml"))
CONFIGURED = FILLED["experiments"]
DRAWN = {experiment for figure in FIGURES.values() for experiment in figure.experiments}
METHODS = {experiment: len(checks.selected_methods(FILLED, experiment, "cpu")) for experiment in CONFIGURED}
JOBS = sum(METHODS.values())
TABLES = len(DRAWN.union(FLOORS, CONFIGURED))


def shared_runs(experiment: str) -> int:
    """Jobs of another experiment that this one's wait for on a CPU."""
    known = EXPERIMENTS[experiment]
    running = [spec.id for spec in known.specs if not known.why_not(spec, "cpu")]
    return sum(bool(checks.shared_experiment(FILLED, experiment, method, "cpu")) for method in running)


def test_every_stage_is_a_target(repo) -> None:
    assert repo.planned("build", "--config", "gpu=cpu") == {"build_extension": 1, "build": 1}
    for experiment, methods in METHODS.items():
        jobs = repo.planned(f"bench_{experiment}", "--config", "gpu=cpu")
        built = jobs.pop("build_extension", 0)
        assert built == (experiment != "motivation")  # pairs of operators have no attention
        assert jobs == {"bench": methods + shared_runs(experiment), f"bench_{experiment}": 1}


def test_experiments_with_the_same_settings_share_a_run(repo) -> None:
    table = "results/measured/cpu/overhead/stof.csv"
    assert repo.planned(table, "--config", "gpu=cpu") == {"build_extension": 1, "bench": 2}
    assert "results/measured/cpu/end_to_end/stof.csv" in repo.snakemake("--dry-run", table, "--config", "gpu=cpu")
    for name, section, jobs in (
        ("other", {"tuning_s": {"cpu": 3}}, 1),  # another search is a run of its own
        ("fewer", {"models": {"cpu": ["gpt2"]}}, 2),
    ):
        (repo.path / f"{name}.yaml").write_text(yaml.safe_dump({"experiments": {"overhead": section}}))
        planned = repo.planned(table, "--configfile", f"{name}.yaml", "--config", "gpu=cpu")
        assert planned == {"build_extension": 1, "bench": jobs}, name


def test_all_is_every_figure_and_every_table(repo) -> None:
    aggregate = repo.planned("aggregate", "--config", "gpu=cpu")
    assert aggregate["bench"] == JOBS
    assert aggregate["aggregate_experiment"] == TABLES
    assert aggregate["tabulate_floors"] == 1
    everything = repo.planned("all", "--config", "gpu=cpu")
    assert {name for name in everything if name.startswith("plot_")} == {f"plot_{figure}" for figure in FIGURES}
    assert everything == repo.planned("--config", "gpu=cpu")  # all is the default
    figures = repo.planned("figures", "--config", "gpu=cpu")
    assert figures.keys() - {"figures"} < everything.keys()
    assert all(everything[rule] == aggregate[rule] for rule in ("bench", "aggregate_experiment", "tabulate_floors"))


def test_floors_are_a_target_that_measures_nothing_elsewhere(repo) -> None:
    jobs = repo.planned("results/floors.csv", "--config", "gpu=4090")
    assert jobs == {"tabulate_floors": 1, "aggregate_experiment": len(FLOORS)}


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_a_target(repo, figure: str) -> None:
    jobs = repo.planned(f"results/{figure}.pdf", "--config", "gpu=4090")
    assert jobs.pop(f"plot_{figure}") == 1
    assert jobs == ({"aggregate_experiment": len(FIGURES[figure].experiments)} if FIGURES[figure].experiments else {})


def test_a_gpu_that_is_not_here_measures_nothing(repo) -> None:
    jobs = repo.planned("--config", "gpu=4090")
    assert "bench" not in jobs
    assert "build_extension" not in jobs
    assert jobs["aggregate_experiment"] == TABLES
    output = repo.snakemake("--dry-run", "--config", "gpu=4090,a100")
    assert output.startswith("gpu 4090: recorded rows (this machine has no CUDA device; source: auto)\ngpu a100: ")
    assert "results/recorded/4090/mha/stof.csv" in output
    assert "results/recorded/a100/mha/stof.csv" in output


def test_source_recorded_never_measures(repo) -> None:
    assert "bench" not in repo.planned("--config", "gpu=cpu", "source=recorded")


def test_only_methods_that_run_our_kernels_wait_for_the_build(repo) -> None:
    assert repo.planned("results/measured/cpu/mha/sdpa.csv", "--config", "gpu=cpu") == {"bench": 1}
    jobs = repo.planned("results/measured/cpu/mha/stof.csv", "--config", "gpu=cpu")
    assert jobs == {"build_extension": 1, "bench": 1}


def test_unknown_paths_have_no_rule(repo) -> None:
    for path in (
        "results/measured/a100/mha/stof.csv",
        "results/measured/cpu/mha/abacus.csv",
        "results/tables/abacus.csv",
    ):
        assert "MissingRuleException" in repo.snakemake("--dry-run", path, "--config", "gpu=cpu", status=1)


def test_measuring_jobs_run_alone(repo) -> None:
    output = repo.snakemake("--dry-run", "--cores", "7", "results/measured/cpu/mha/sdpa.csv", "--config", "gpu=cpu")
    assert re.search(r"rule bench:(?s:.*)threads: 7\n", output)


def test_slurm_profile_plans_gpu_jobs(repo) -> None:
    """The executor's plugin is not installed here: the profile is read whole, and only its executor is replaced."""
    slurm = ("--workflow-profile", "profiles/slurm", "--executor", "local")
    output = repo.snakemake("--dry-run", *slurm, "bench_mha", "--config", "gpu=h200", "source=measure")
    assert "measured by the cluster's jobs" in output
    job = re.search(r"rule bench:(?s:.*?)resources: (.*)\n", output).group(1)
    for resource in ("gpu=1", "gpu_model=h200", "mem_mb=32000", "runtime=240"):
        assert resource in job
    jobs = repo.planned(*slurm, "--config", "gpu=cpu")
    assert jobs["bench"] == JOBS


def test_lint_and_report_captions(repo) -> None:
    assert "good condition" in repo.snakemake("--lint")
    for figure in FIGURES.values():
        assert (repo.path / "workflow" / "report" / figure.caption).stat().st_size > 100
    assert (repo.path / "workflow" / "report" / "floors.rst").stat().st_size > 100
