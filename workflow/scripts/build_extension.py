"""Build the extension for one architecture and write down what was built."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from stof_kernels.benchmarking.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from stof_kernels.kernels import build, loader, manifest

    # A library that came with the package and was made of these sources serves as well.
    loader.find(snakemake.wildcards.arch) or build(snakemake.wildcards.arch)
    Path(snakemake.output[0]).write_text(
        json.dumps(manifest(snakemake.wildcards.arch), indent=2) + "\n", encoding="utf-8"
    )
