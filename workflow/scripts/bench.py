"""Measure one method in one experiment on one GPU."""

from pathlib import Path
from typing import TYPE_CHECKING

from stof_kernels.benchmarking.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from stof_kernels.benchmarking.runner import run_job
    from stof_kernels.benchmarking.targets import require_present

    wildcards, params = snakemake.wildcards, snakemake.params
    require_present(wildcards.gpu, snakemake.config["gpus"])
    run_job(
        gpu=wildcards.gpu,
        experiment=wildcards.experiment,
        method=wildcards.method,
        settings=params.settings,
        csv=Path(snakemake.output.csv),
        provenance=Path(snakemake.output.provenance),
        journal=Path(params.journal),
        device=params.device,
        shared=Path(snakemake.input.shared) if snakemake.input.get("shared") else None,
    )
