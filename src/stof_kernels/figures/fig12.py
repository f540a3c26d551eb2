"""Figure 12: what the attention module and the fusion module give alone and together; one page per GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stof_kernels.benchmarking.measurement import Measurement

from . import GpuPage, speedups

_PANEL = speedups.Panel(
    "fig12",
    "Figure 12",
    "ablation",
    remark="The paper's plot draws the smaller of STOF and STOF (attention only) as STOF; here each series is as logged.",
    hint="The paper's authors published this figure for the A100 only.",
)


def render(rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """Draw the figure and write the table behind it."""
    speedups.render(_PANEL, rows, pages, pdf, table)
