"""The specification of sparse attention: dense, plain, in any precision. Every kernel is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Masked attention of q (B, Hq, Lq, D) with k, v (B, Hkv, Lk, D), computed densely in ``dtype``.

    ``keep`` is bool and ``bias`` additive, both broadcastable to (B, Hq, Lq, Lk); scores are ``scale * q.k + bias`` with scale
    1/sqrt(D) by default. Returns out (B, Hq, Lq, D) and the natural log-sum-exp of the kept scores (B, Hq, Lq), both in
    ``dtype``. A row with nothing to attend, also when every kept bias is -inf, gives 0 and -inf.
    """
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.to(dtype) for t in (q, k, v))
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = scale * (q @ k.transpose(-1, -2))
    if bias is not None:
        # Where the mask removes a position the bias is not read, so a NaN or inf there must not matter.
        scores = scores + torch.where(keep, bias.to(dtype), 0)
    scores = scores.masked_fill(~keep, -torch.inf)
    lse = scores.new_full(scores.shape[:-1], -torch.inf) if scores.shape[-1] == 0 else torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return weights @ v, lse
