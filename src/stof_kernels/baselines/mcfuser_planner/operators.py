"""MCFuser's attention as an operator of torch, so that a compiler of the rest of a model sees one opaque call."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Form, tuned_attention
from .search import SearchSettings

_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float budget_s) -> Tensor"


@torch.library.custom_op("stof_baselines::mcfuser_attention", mutates_args=(), schema=_SCHEMA)
def mcfuser_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, budget_s: float) -> Tensor:
    """softmax(scale q k^T + mask) v as (B, Lq, H, D), tuned at the first call with tensors of these shapes and strides."""
    form, settings = Form(scale, tokens_first=True), SearchSettings(budget_s=budget_s)
    return tuned_attention(q, k, v, mask, form, settings)(q, k, v, mask).transpose(1, 2)


@mcfuser_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, budget_s: float) -> Tensor:
    batch, heads, q_len, head_dim = q.shape
    return q.new_empty(batch, q_len, heads, head_dim)
