"""Put the rows of all methods and GPUs of one experiment into one table, unchanged."""

from typing import TYPE_CHECKING

from stof_kernels.benchmarking.jobs import job
from stof_kernels.benchmarking.measurement import merge, read_rows, write_rows

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    write_rows(snakemake.output[0], merge(*map(read_rows, snakemake.input.tables)))
