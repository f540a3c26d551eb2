"""Figure 11: end-to-end speedup of whole models over unfused PyTorch; one page per GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stof_kernels.benchmarking.measurement import Measurement

from . import GpuPage, speedups

_PANEL = speedups.Panel("fig11", "Figure 11", "end_to_end")


def render(rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """Draw the figure and write the table behind it."""
    speedups.render(_PANEL, rows, pages, pdf, table)
