"""Write the floor of every attention cell beside our time and the best exact other's."""

from pathlib import Path
from typing import TYPE_CHECKING

from stof_kernels.benchmarking.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from stof_kernels.benchmarking.measurement import merge, read_rows
    from stof_kernels.figures.floors import Rates, tabulate

    rates = {name: Rates.of(entry) for name, entry in snakemake.params.rates.items()}
    tabulate(merge(*map(read_rows, snakemake.input.tables)), rates, Path(snakemake.output[0]))
