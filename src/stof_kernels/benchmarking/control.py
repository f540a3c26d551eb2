"""The fixed control: dense attention without a mask, timed beside every method, so that machines can be told from methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from stof_kernels.baselines import Problem, Tensors


_LONGEST = 16384  # dense attention over more positions would take longer than all that it stands beside


def dense_control(problem: Problem, tensors: Tensors) -> tuple[Callable[[], Tensor], str]:
    """(call, what it is): SDPA's own choice on the CPU, cuDNN on CUDA, or SDPA's own choice where cuDNN cannot run it."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t[:, :, :_LONGEST] for t in (tensors.q, tensors.k, tensors.v))
    cut = f", first {_LONGEST} positions" if max(problem.q_len, problem.kv_len) > _LONGEST else ""

    def default() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=problem.scale, enable_gqa=problem.grouped)

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return default()

    if problem.device == "cpu":
        return default, f"dense SDPA{cut}"
    try:
        cudnn()
        return cudnn, f"dense cuDNN{cut}"
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return default, f"dense SDPA{cut}"
