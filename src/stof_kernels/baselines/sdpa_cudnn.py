"""SDPA's cuDNN kernel, forced."""

from __future__ import annotations

from .registry import Prepared, Problem, Tensors, Unsupported, method
from .sdpa import EXPERIMENTS, forced


@method(
    "sdpa_cudnn",
    label="SDPA (cuDNN)",
    experiments=EXPERIMENTS,
    depends=("baselines/sdpa.py",),
    devices=("cuda",),
    rank=32,
)
def sdpa_cudnn(problem: Problem, tensors: Tensors) -> Prepared:
    """The forced kernel; the mask is its bias."""
    if problem.dtype == "float32":
        raise Unsupported("cuDNN attention runs float16 and bfloat16 only")
    return forced(problem, tensors, "CUDNN_ATTENTION")
