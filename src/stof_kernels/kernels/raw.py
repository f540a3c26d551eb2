"""The registered operators ``stof::sparse_attention`` and ``stof::build_cells``.

The first call loads the library (building it if need be) and gives its operators their fake kernels; importing this
module does neither.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import loader
from .build import cuda_target

_ready = False
_cuda_ready = False


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


def load_cuda() -> bool:
    """Loads the CUDA kernels for the current device, once per process. Raises BuildError.

    One process holds the library of one architecture: where GPUs differ, that of the device in use at the first call.
    """
    global _cuda_ready
    if not _cuda_ready:
        load()
        loader.load(cuda_target(torch.cuda.get_device_capability()))
        torch.library.register_fake("stof::build_layout", _fake_build_layout)
        _cuda_ready = True
    return True


def _load_for(tensor: Tensor) -> None:
    """What an operator on this tensor's device needs."""
    _ready or load()
    if tensor.is_cuda:
        _cuda_ready or load_cuda()


# What torch.compiler.assume_constant_result sets: a graph that is traced before the first call loads while tracing.
# The decorator itself would import the whole compiler here.
load._dynamo_marked_constant = True
load_cuda._dynamo_marked_constant = True


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
    [kernel, q_tile, kv_chunk, 0] on the CPU device, or what `build_layout` returned; -1 leaves a choice to the kernel.

    Returns out, a (B, Hq, Lq, D) view of (B, Lq, Hq, D) memory in q's dtype, and lse, float32 (B, Hq, Lq), or of shape
    (0,) without ``return_lse``. Raises RuntimeError naming the argument, what it got and what is allowed.
    """
    _load_for(q)
    args = (q, k, v, bias, ptr, col, slot, bits, counts, plan, q_len, kv_len, mask_batch, mask_heads, scale, return_lse)
    if torch.compiler.is_compiling() or _needs_grad(q, k, v, bias):
        return torch.ops.stof.sparse_attention.default(*args)
    # Nothing to differentiate: past the autograd layer, which is Python and costs as much as the rest of the call.
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.stof.sparse_attention.default(*args)


def pack_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> Tensor:
    """``torch.ops.stof.pack_call``: a call of `sparse_attention`, checked, as one tensor for ``attend`` and ``attend_lse``.

    The result holds whatever follows from shapes, dtype, device, mask and plan, and keeps the mask's lists alive; their
    content is read at every call. Word 1 becomes 1 once a CUDA graph has captured it. It is meant for this process only and
    must not be changed, copied or stored. Raises RuntimeError as `sparse_attention`.
    """
    _load_for(q)
    args = (q, k, v, ptr, col, slot, bits, counts, plan, q_len, kv_len, mask_batch, mask_heads)
    return torch.ops.stof.pack_call.default(*args)


def repeaters() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """``torch.ops.stof.attend`` and ``attend_lse`` as plain functions of (q, k, v, packed, bias=None, scale=None).

    They return out, or out and lse, as `sparse_attention` does for the packed call, with nothing to differentiate. Where q, k
    or v differ from those that were packed in shape, dtype or device (or torch's thread count does, on the CPU) they raise
    RuntimeError and have done nothing. They have no fake kernels: a recorded graph must not hold a packed call.
    """
    _ready or load()
    # OpOverload.__call__ only forwards to _op; a small call notices the detour.
    return tuple(getattr(op, "_op", op) for op in (torch.ops.stof.attend.default, torch.ops.stof.attend_lse.default))


def build_cells(keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.stof.build_cells``: cell lists of a dense bool mask (Bm, Hm, Lq, Lk) of any strides.

    Returns strip_ptr, cell_col, cell_slot, cell_bits and counts as the mask format defines them, lists of exact size.
    """
    _load_for(keep)
    return torch.ops.stof.build_cells.default(keep)


def build_cells_out(
    keep: Tensor, strip_ptr: Tensor, cell_col: Tensor, cell_slot: Tensor, cell_bits: Tensor, counts: Tensor
) -> None:
    """``torch.ops.stof.build_cells_out`` (CUDA): the same lists into given buffers, without touching the host.

    A mask that does not fit sets counts[3]; what the buffers hold then is inside their capacity and otherwise undefined.
    """
    _cuda_ready or load_cuda()
    torch.ops.stof.build_cells_out.default(keep, strip_ptr, cell_col, cell_slot, cell_bits, counts)


def build_blocks(keep: Tensor, block: int, q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.stof.build_blocks`` (CUDA): cell lists, of exact size, of whole blocks.

    ``keep`` is bool (Bm, Hm, ceil(Lq/block), ceil(Lk/block)) of any strides, ``block`` a multiple of 16. One small read-back.
    """
    _cuda_ready or load_cuda()
    return torch.ops.stof.build_blocks.default(keep, block, q_len, kv_len)


def build_blocks_out(keep: Tensor, block: int, q_len: int, kv_len: int, *lists: Tensor) -> None:
    """``torch.ops.stof.build_blocks_out`` (CUDA): `build_blocks` into strip_ptr, cell_col, cell_slot, cell_bits and counts.

    Nothing is read back; over capacity as in `build_cells_out`.
    """
    _cuda_ready or load_cuda()
    torch.ops.stof.build_blocks_out.default(keep, block, q_len, kv_len, *lists)


def build_blocks_layout_out(*args: Tensor | int) -> None:
    """``torch.ops.stof.build_blocks_layout_out`` (CUDA): `build_blocks_out` and `build_layout_out` in one.

    Takes the former's arguments, then q_tile, kv_chunk and copies, then ptr, col, slot and bits. Where ``block`` is a multiple
    of 64 and of the query tile it takes two launches. Nothing is read back; over capacity as in both.
    """
    _cuda_ready or load_cuda()
    torch.ops.stof.build_blocks_layout_out.default(*args)


def layout_sizes(
    strip_ptr: Tensor,
    cell_col: Tensor,
    cell_slot: Tensor,
    cell_bits: Tensor,
    counts: Tensor,
    q_len: int,
    kv_len: int,
    planes: int,
    q_tile: int,
) -> Tensor:
    """``torch.ops.stof.layout_sizes`` (CUDA): int32 (8,) on the device, the header of a layout without cuts.

    {work items, parts, combines, key tiles, bitmap slots, key tiles of the longest item, 0, 0}; nothing is read back.
    """
    _cuda_ready or load_cuda()
    lists = strip_ptr, cell_col, cell_slot, cell_bits, counts
    return torch.ops.stof.layout_sizes.default(*lists, q_len, kv_len, planes, q_tile)


def build_layout(
    strip_ptr: Tensor,
    cell_col: Tensor,
    cell_slot: Tensor,
    cell_bits: Tensor,
    counts: Tensor,
    q_len: int,
    kv_len: int,
    planes: int,
    q_tile: int,
    kv_chunk: int,
    copies: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.stof.build_layout`` (CUDA): what the block-wise kernel reads, sized by one small read-back.

    ``q_tile`` is 64 or 128; ``kv_chunk`` the most key tiles of a work item, 0 for no limit, -1 for one that lets ``copies``
    uses of every mask plane fill the device. Returns ptr, col, slot, bits (csrc/attention/cuda/problem.h says what they
    hold) and plan, int64 (8,) on the CPU; plan[3] may be a shape (its place in ``instances.SHAPES`` plus one; 0 default).
    """
    _cuda_ready or load_cuda()
    return torch.ops.stof.build_layout.default(
        strip_ptr, cell_col, cell_slot, cell_bits, counts, q_len, kv_len, planes, q_tile, kv_chunk, copies
    )


def build_layout_out(*args: Tensor | int) -> None:
    """``torch.ops.stof.build_layout_out`` (CUDA): `build_layout`'s arguments, then ptr, col, slot and bits to fill.

    Nothing is read back; a mask that does not fit makes the kernel write NaN.
    """
    _cuda_ready or load_cuda()
    torch.ops.stof.build_layout_out.default(*args)


def empty_layout(
    strip_ptr: Tensor,
    q_len: int,
    planes: int,
    q_tile: int,
    kv_chunk: int,
    copies: int,
    tiles: int,
    slots: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.stof.empty_layout`` (CUDA): buffers for `build_layout_out` with room for ``tiles`` key tiles.

    ``slots`` of them (default: all) may be other than full, and have a bitmap.
    """
    _cuda_ready or load_cuda()
    slots = tiles if slots is None else slots
    return torch.ops.stof.empty_layout.default(strip_ptr, q_len, planes, q_tile, kv_chunk, copies, tiles, slots)


def _needs_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    wanted = q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    return wanted and torch.is_grad_enabled()


def _fake_sparse_attention(q, k, v, bias, ptr, col, slot, bits, counts, plan, q_len, kv_len, *rest):
    return_lse = rest[-1]
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)
    return out, q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)


def _fake_build_layout(strip_ptr: Tensor, *rest: Tensor | int) -> tuple[Tensor, ...]:
    q_tile = rest[-3]
    context = torch.library.get_ctx()
    combines, tiles, items, slots = (context.new_dynamic_size() for _ in range(4))
    return (
        strip_ptr.new_empty((8 + 4 * combines,)),
        strip_ptr.new_empty((tiles, 4)),
        strip_ptr.new_empty((items, 12)),
        strip_ptr.new_empty((slots, 2 * q_tile)),
        torch.empty(8, dtype=torch.int64, device="cpu"),
    )


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
