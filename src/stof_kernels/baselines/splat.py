"""SPLAT (OOPSLA 2025): attention over regular sparse patterns in an affine compressed format."""

from __future__ import annotations

from .registry import absent_method

absent_method(
    "splat",
    label="SPLAT",
    experiments=("mha",),
    reason="not implemented in this reproduction yet; only the paper's published numbers exist",
    rank=61,
)
