"""Figure 4: do the best parameters change with fusion? Tuned after fusion against tuned individually; one page per GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stof_kernels.benchmarking.measurement import Measurement

from . import GpuPage, motivation

_PAIR = motivation.Pair(
    "fig4",
    "Figure 4",
    baseline="tuned_individually",
    method="tuned_after_fusion",
    question="tuning after fusion is",
    line="The fused operator with its parts' individually best parameters = 1.",
    remark="GEMM + LayerNorm: K = 4 × hidden, N = hidden; GEMM + GEMM: hidden to 4 × hidden to hidden. "
    "The paper's axis ends at 3; here nothing is cut off.",
    measured="The best fused kernel found, with the parameters found for it and with those of the slower operator alone. "
    "Each was checked against float32 before it was timed; the table names them. GEMM + LayerNorm: 4 × hidden to hidden.",
)


def render(rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """Draw the figure and write the table behind it."""
    motivation.render(_PAIR, rows, pages, pdf, table)
