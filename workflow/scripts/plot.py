"""Draw one figure: a page per configured GPU, and the table behind it."""

from pathlib import Path
from typing import TYPE_CHECKING

from stof_kernels.benchmarking.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from stof_kernels.benchmarking.pages import page_facts
    from stof_kernels.figures import GpuPage, draw

    params = snakemake.params
    sources = [Path(path) for path in snakemake.input.sources if path.endswith(".csv")]
    draw(
        params.figure,
        tables=dict(zip(params.experiments, snakemake.input.tables, strict=True)),
        pages=[
            GpuPage(name, label, source, **page_facts(name, source, params.experiments, sources))
            for name, label, source in params.targets
        ],
        pdf=Path(snakemake.output.pdf),
        table=Path(snakemake.output.table),
    )
