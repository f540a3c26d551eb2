"""MCFuser (SC 2024): fused chains of matrix products in a whole model."""

from __future__ import annotations

from .registry import absent_model_method

absent_model_method(
    "mcfuser",
    experiments=(
        "end_to_end",
        "tuning_cost",
    ),
    reason="whole models are not implemented in this reproduction yet; only the paper's published numbers exist",
)
