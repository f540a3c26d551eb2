"""SDPA's memory-efficient kernel (CUTLASS FMHA), forced."""

from __future__ import annotations

from .registry import Prepared, Problem, Tensors, method
from .sdpa import EXPERIMENTS, forced


@method(
    "sdpa_efficient",
    label="SDPA (efficient)",
    experiments=EXPERIMENTS,
    depends=("baselines/sdpa.py",),
    devices=("cuda",),
    rank=31,
)
def sdpa_efficient(problem: Problem, tensors: Tensors) -> Prepared:
    """The forced kernel; the mask is its bias."""
    return forced(problem, tensors, "EFFICIENT_ATTENTION")
