"""The public operator: validate -> plan -> launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Layout, SparseMask
from ..kernels import raw
from ..planner import Plan

# Names of this module, because a small call notices every look-up.
is_dynamo_compiling, is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack

HEAD_DIMS = range(8, 257, 8)
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SparseMask | Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention that skips what the mask removes. Forward only, deterministic bit for bit, never synchronises.

    q is (B, Hq, Lq, D), k and v are (B, Hkv, Lk, D) with Hq a multiple of Hkv (grouped queries); D from 8 to 256 in steps of 8;
    any strides, last stride 1 being the fast path. float32 or bfloat16 on the CPU, float16 or bfloat16 on CUDA. ``mask`` is a
    `SparseMask` whose batch and heads are 1 or B and Hq, or a bool tensor broadcastable to (B, Hq, Lq, Lk), True = attend, from
    which one is built at every call.

    scores = ``scale`` * q.k + ``bias``; scale defaults to 1/sqrt(D); bias is in q's dtype or float32, broadcastable to
    (B, Hq, Lq, Lk), read only where the mask keeps something, and -inf in it counts as removed. Softmax statistics are float32.

    Returns out (B, Hq, Lq, D) in q's dtype and (B, Lq, Hq, D) memory; with ``return_lse`` also the natural log-sum-exp, float32
    (B, Hq, Lq). A row with nothing to attend gives 0 and -inf. Raises TypeError or ValueError naming the argument, what it got
    and what is allowed; backward raises NotImplementedError.
    """
    if type(mask) is SparseMask and not is_dynamo_compiling() and not len_torch_dispatch_stack():
        # A call like an earlier one was checked then. Whatever the short way stumbles over is said by the long one.
        try:
            call = mask.calls.get(q.shape)
            if call is not None and not (is_grad_enabled() and _wants_grad(q, k, v, bias)):
                packed, attend, attend_lse = call
                if return_lse:
                    return attend_lse(q, k, v, packed, bias, scale)
                return (
                    attend(q, k, v, packed) if bias is None and scale is None else attend(q, k, v, packed, bias, scale)
                )
        except (AttributeError, TypeError, RuntimeError):
            pass
    return _first_attention(q, k, v, mask, bias, scale, return_lse)


def _first_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SparseMask | Tensor,
    bias: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The long way: every check, and what the next call like this one needs is left on the mask."""
    _check_qkv(q, k, v)
    given, mask = mask, _as_mask(mask, q, k)
    if bias is not None:
        bias = _check_bias(bias, q, k)
    layout = _layout(mask, q, k)
    default_scale = q.shape[-1] ** -0.5
    if given is mask and type(q) is type(k) is type(v) is Tensor and not _is_traced():
        mask.calls[q.shape] = _packed(q, k, v, mask, layout), *raw.repeaters()
    ptr, col, slot, bits, plan_words = layout.tensors
    out, lse = raw.sparse_attention(
        q,
        k,
        v,
        bias,
        ptr,
        col,
        slot,
        bits,
        mask.counts,
        plan_words,
        mask.q_len,
        mask.kv_len,
        mask.batch,
        mask.heads,
        default_scale if scale is None else float(scale),
        return_lse,
    )
    return (out, lse) if return_lse else out


def _packed(q: Tensor, k: Tensor, v: Tensor, mask: SparseMask, layout: Layout) -> Tensor:
    """The call but for its tensors, for `raw.repeaters`."""
    ptr, col, slot, bits, plan_words = layout.tensors
    sizes = mask.q_len, mask.kv_len, mask.batch, mask.heads
    return raw.pack_call(q, k, v, ptr, col, slot, bits, mask.counts, plan_words, *sizes)


def _is_traced() -> bool:
    """Whether a graph is being recorded, by torch.compile or a dispatch mode: it must hold tensors, not a packed call."""
    return torch.compiler.is_compiling() or len_torch_dispatch_stack() > 0


def _wants_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    return q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)


def plan(q: Tensor, k: Tensor, mask: SparseMask | Tensor, policy: str = "cost") -> Plan:
    """Which kernel and tile `sparse_attention` takes for q (B, Hq, Lq, D), k (B, Hkv, Lk, D) and this mask, and why.

    ``plan(...).explain()`` is the reason as text. ``policy="paper"`` shows what STOF's Equation 1 would choose.
    """
    _check_qkv(q, k, k)
    chosen = _as_mask(mask, q, k).plan_for(q, k, policy)
    notes = tuple(
        f"{name} has strides {t.stride()}: its last is not 1, so it is read through one packed copy"
        for name, t in (("q", q), ("k", k))
        if t.shape[-1] > 1 and t.stride(-1) != 1
    )
    return chosen.with_notes(notes)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"sparse_attention: {name} is {type(t).__name__}, allowed: a tensor")
        if t.dim() != 4:
            raise ValueError(f"sparse_attention: {name} has shape {tuple(t.shape)}, allowed: 4 dimensions (B, H, L, D)")
        if t.device != q.device:
            raise ValueError(f"sparse_attention: {name} is on {t.device}, allowed: q's device {q.device}")
        if t.dtype != q.dtype:
            raise TypeError(f"sparse_attention: {name} has dtype {t.dtype}, allowed: q's dtype {q.dtype}")
    allowed = _DTYPES.get(q.device.type)
    if allowed is None:
        raise ValueError(f"sparse_attention: q is on {q.device}, allowed: cpu or cuda")
    if q.dtype not in allowed:
        names = " or ".join(str(d) for d in allowed)
        raise TypeError(f"sparse_attention: q has dtype {q.dtype} on {q.device.type}, allowed: {names}")
    batch, heads, _, dim = q.shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"sparse_attention: head dim of q is {dim}, allowed: 8 to 256 in steps of 8")
    if k.shape[0] != batch or k.shape[3] != dim:
        want = f"({batch}, Hkv, Lk, {dim})"
        raise ValueError(
            f"sparse_attention: k has shape {tuple(k.shape)}, allowed: {want} to go with q {tuple(q.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"sparse_attention: v has shape {tuple(v.shape)}, allowed: that of k, {tuple(k.shape)}")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"sparse_attention: k has {k.shape[1]} heads, allowed: a divisor of q's {heads} heads")


def _as_mask(mask: SparseMask | Tensor, q: Tensor, k: Tensor) -> SparseMask:
    """The mask as a SparseMask that fits the problem."""
    batch, heads, q_len, kv_len = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if isinstance(mask, Tensor):
        if mask.dim() > 4 or not _broadcasts(mask.shape, (batch, heads, q_len, kv_len)):
            want = (batch, heads, q_len, kv_len)
            raise ValueError(f"sparse_attention: mask has shape {tuple(mask.shape)}, allowed: broadcastable to {want}")
        if mask.device != q.device:
            raise ValueError(f"sparse_attention: mask is on {mask.device}, allowed: q's device {q.device}")
        return SparseMask.from_dense(mask, q_len, kv_len)
    if not isinstance(mask, SparseMask):
        raise TypeError(f"sparse_attention: mask is {type(mask).__name__}, allowed: a SparseMask or a bool tensor")
    if mask.device != q.device:
        raise ValueError(f"sparse_attention: mask is on {mask.device}, allowed: q's device {q.device} (mask.to())")
    if mask.q_len != q_len or mask.kv_len != kv_len:
        got = f"{mask.q_len} x {mask.kv_len}"
        raise ValueError(f"sparse_attention: mask is for {got} positions, allowed: {q_len} x {kv_len} as in q and k")
    if mask.batch not in (1, batch) or mask.heads not in (1, heads):
        got, want = (mask.batch, mask.heads), (batch, heads)
        raise ValueError(f"sparse_attention: mask has (batch, heads) {got}, allowed: 1 or q's {want} in each")
    return mask


def _layout(mask: SparseMask, q: Tensor, k: Tensor) -> Layout:
    """What the planned kernel reads. A compiled graph cannot plan, so it passes on what `prepare` left on the mask."""
    if not torch.compiler.is_compiling():
        return mask.layout_for(q, k)
    if mask.layout is not None:
        return mask.layout
    if q.device.type != "cpu":
        raise RuntimeError(
            "sparse_attention: this mask is not prepared, and a compiled call cannot; call mask.prepare(q, k)"
        )
    return Layout(
        mask.strip_ptr, mask.cell_col, mask.cell_slot, mask.cell_bits, torch.full((4,), -1, dtype=torch.int64)
    )


def _check_bias(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The bias expanded to (B, Hq, Lq, Lk) without a copy."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"sparse_attention: bias is {type(bias).__name__}, allowed: a tensor or None")
    if bias.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"sparse_attention: bias has dtype {bias.dtype}, allowed: {q.dtype} or torch.float32")
    if bias.device != q.device:
        raise ValueError(f"sparse_attention: bias is on {bias.device}, allowed: q's device {q.device}")
    want = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if bias.dim() > 4 or not _broadcasts(bias.shape, want):
        raise ValueError(f"sparse_attention: bias has shape {tuple(bias.shape)}, allowed: broadcastable to {want}")
    return bias.expand(want)


def _broadcasts(shape: torch.Size, want: tuple[int, ...]) -> bool:
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(want), strict=False))
