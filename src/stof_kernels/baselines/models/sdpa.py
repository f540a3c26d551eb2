"""The model as it is with torch's fused attention, the mask as a bool tensor."""

from __future__ import annotations

from .registry import ModelReady, Subject, model_method, run_variant


@model_method("sdpa", experiments=("end_to_end",))
def sdpa(subject: Subject) -> ModelReady:
    """Eager operators around ``scaled_dot_product_attention``."""
    return run_variant(subject, "sdpa")
