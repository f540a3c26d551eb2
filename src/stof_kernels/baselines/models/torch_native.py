"""PyTorch Native: the model as it is, attention as two matrix products and a softmax."""

from __future__ import annotations

from .registry import ModelReady, Subject, model_method, run_variant


@model_method("torch_native", experiments=("end_to_end", "ablation"))
def torch_native(subject: Subject) -> ModelReady:
    """Eager operators, one kernel each; the mask is added to the scores."""
    return run_variant(subject, "torch_native")
