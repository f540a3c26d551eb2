"""Figure 3: does fusing two operators help? Fused against detached, at eight sizes; one page per GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stof_kernels.benchmarking.measurement import Measurement

from . import GpuPage, motivation

_PAIR = motivation.Pair(
    "fig3",
    "Figure 3",
    baseline="detached",
    method="fused",
    question="the fused operator is",
    line="Detached operators = 1.",
    remark="Detached: PyTorch operators; fused: one Triton kernel, as the logs' column names say. GEMM + LayerNorm: K = N = "
    "hidden; GEMM + GEMM: hidden to 4 × hidden to hidden. The paper's axis ends at 3; here nothing is cut off.",
    measured="Detached: the best kernel found for each operator, one after the other; fused: the best single kernel for both. "
    "Each was checked against float32 before it was timed; the table names the kernels. GEMM + LayerNorm: hidden to hidden; "
    "GEMM + GEMM: hidden to 4 × hidden to hidden.",
)


def render(rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """Draw the figure and write the table behind it."""
    motivation.render(_PAIR, rows, pages, pdf, table)
