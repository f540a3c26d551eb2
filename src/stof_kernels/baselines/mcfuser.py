"""MCFuser (SC 2024): fused chains of matrix products found by an analytic model and a search."""

from __future__ import annotations

from .registry import absent_method

absent_method(
    "mcfuser",
    label="MCFuser",
    experiments=("mha",),
    reason="not implemented in this reproduction yet; only the paper's published numbers exist",
    rank=62,
)
