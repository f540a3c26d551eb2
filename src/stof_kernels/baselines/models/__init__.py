"""Every way to run a whole model, one file each, behind ``@model_method``. Importing this package imports no torch."""

from .registry import KIND, MODELS, ModelProblem, ModelReady, Subject, model_method, run_variant

__all__ = [
    "KIND",
    "MODELS",
    "ModelProblem",
    "ModelReady",
    "Subject",
    "model_method",
    "run_variant",
]
