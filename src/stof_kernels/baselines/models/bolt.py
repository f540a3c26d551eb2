"""Bolt (MLSys 2022): a whole graph on CUTLASS templates."""

from __future__ import annotations

from .registry import absent_model_method

absent_model_method(
    "bolt",
    experiments=(
        "end_to_end",
        "tuning_cost",
    ),
    reason="whole models are not implemented in this reproduction yet; only the paper's published numbers exist",
)
