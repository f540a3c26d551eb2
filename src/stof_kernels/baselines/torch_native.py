"""PyTorch Native: attention written as its five operators, with the S x S scores in memory and in q's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .inputs import dense_keep
from .registry import Prepared, Problem, Tensors, method

if TYPE_CHECKING:
    from torch import Tensor


def unfused_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T where kept) v; q (B, H, Lq, D), k and v (B, Hkv, Lk, D), keep bool broadcastable to the scores."""
    import torch

    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, k.transpose(-2, -1)) * scale
    scores = scores.masked_fill(~keep, float("-inf"))
    return torch.matmul(torch.softmax(scores, dim=-1), v)


@method("torch_native", label="PyTorch Native", experiments=("mha", "mha_artifact"), rank=10)
def torch_native(problem: Problem, tensors: Tensors) -> Prepared:
    """Eager operators, one kernel each."""
    keep = dense_keep(problem)
    q, k, v = tensors.q, tensors.k, tensors.v
    return Prepared(lambda: unfused_attention(q, k, v, keep, problem.scale), problem.pattern)
