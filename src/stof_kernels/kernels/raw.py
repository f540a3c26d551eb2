"""The registered operators ``stof::sparse_attention`` and ``stof::build_cells``.

The first call loads the library (building it if need be) and gives its operators their fake kernels; importing this
module does neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import loader

_ready = False


def load() -> bool:
    """Loads the library and registers what Python adds to its operators, once per process. Raises BuildError."""
    global _ready
    if not _ready:
        loader.load("cpu")  # holds the schemas, whatever device the kernels run on
        torch.library.register_fake("stof::sparse_attention", _fake_sparse_attention)
        torch.library.register_fake("stof::build_cells", _fake_build_cells)
        torch.library.define("stof::no_backward", "(Tensor grad, Tensor like) -> Tensor")
        torch.library.impl("stof::no_backward", "CompositeExplicitAutograd", _no_backward)
        torch.library.register_fake("stof::no_backward", lambda grad, like: torch.empty_like(like))
        torch.library.register_autograd("stof::sparse_attention", _backward, setup_context=_setup_context)
        _ready = True
    return True


# What torch.compiler.assume_constant_result sets: a graph that is traced before the first call loads while tracing.
# The decorator itself would import the whole compiler here.
load._dynamo_marked_constant = True


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    ptr: Tensor,
    col: Tensor,
    slot: Tensor,
    bits: Tensor,
    counts: Tensor,
    plan: Tensor,
    q_len: int,
    kv_len: int,
    mask_batch: int,
    mask_heads: int,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.stof.sparse_attention``: attention over the cells that the lists name.

    q (B, Hq, Lq, D); k, v (B, Hkv, Lk, D); bias None or 4 dimensions that broadcast to (B, Hq, Lq, Lk). (ptr, col, slot,
    bits) is the layout that the kernel of ``plan`` reads; the CPU reads a SparseMask's own lists. ``plan`` is
    [kernel, q_tile, kv_chunk, 0] on the CPU device; -1 leaves a choice to the kernel.

    Returns out, a (B, Hq, Lq, D) view of (B, Lq, Hq, D) memory in q's dtype, and lse, float32 (B, Hq, Lq), or of shape
    (0,) without ``return_lse``. Raises RuntimeError naming the argument, what it got and what is allowed.
    """
    _ready or load()
    args = (q, k, v, bias, ptr, col, slot, bits, counts, plan, q_len, kv_len, mask_batch, mask_heads, scale, return_lse)
    if torch.compiler.is_compiling() or _needs_grad(q, k, v, bias):
        return torch.ops.stof.sparse_attention.default(*args)
    # Nothing to differentiate: past the autograd layer, which is Python and costs as much as the rest of the call.
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.stof.sparse_attention.default(*args)


def build_cells(keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.stof.build_cells``: cell lists of a dense bool mask (Bm, Hm, Lq, Lk) of any strides.

    Returns strip_ptr, cell_col, cell_slot, cell_bits and counts as the mask format defines them, lists of exact size.
    """
    _ready or load()
    return torch.ops.stof.build_cells.default(keep)


def _needs_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    wanted = q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    return wanted and torch.is_grad_enabled()


def _fake_sparse_attention(q, k, v, bias, ptr, col, slot, bits, counts, plan, q_len, kv_len, *rest):
    batch, heads, length, dim = q.shape
    return_lse = rest[-1]
    out = q.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return out, q.new_empty((batch, heads, length) if return_lse else (0,), dtype=torch.float32)


def _fake_build_cells(keep: Tensor) -> tuple[Tensor, ...]:
    batch, heads, q_len, _ = keep.shape
    context = torch.library.get_ctx()
    listed, partial = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        keep.new_empty((batch * heads * ((q_len + 15) // 16) + 1,), dtype=torch.int32),
        keep.new_empty((listed,), dtype=torch.int32),
        keep.new_empty((listed,), dtype=torch.int32),
        keep.new_empty((partial, 16), dtype=torch.int16),
        keep.new_empty((4,), dtype=torch.int64),
    )


def _no_backward(grad: Tensor, like: Tensor) -> Tensor:
    raise NotImplementedError(
        "sparse_attention is forward only: it has no backward; call it under torch.no_grad() or on detached tensors"
    )


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx, grad_out: Tensor, grad_lse: Tensor) -> tuple:
    # An operator raises, not this function: torch.compile traces the backward of every forward on tensors that require
    # gradients, differentiated or not. It takes grad_out so that it cannot be moved into the forward.
    inputs = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    grads = [torch.ops.stof.no_backward(grad_out, t) if needed else None for t, needed in inputs]
    return (*grads, *[None] * 12)
