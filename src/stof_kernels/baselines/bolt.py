"""Bolt (MLSys 2022): CUTLASS templates for a whole graph, with persistent fusion of matrix products."""

from __future__ import annotations

from .registry import absent_method

absent_method(
    "bolt",
    label="Bolt",
    experiments=("mha",),
    reason="not implemented in this reproduction yet; only the paper's published numbers exist",
    rank=63,
)
