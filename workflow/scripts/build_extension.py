"""Build the extension for one architecture and write the manifest that says what was built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stof_kernels.benchmarking.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from stof_kernels.kernels import build

    build(snakemake.wildcards.arch, snakemake.output[0])
