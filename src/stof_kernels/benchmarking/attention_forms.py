"""The forms in which a method takes a mask that its own module does not bring: a mask per head, packed documents, huge lengths.

A method's module says how it runs the masks of Figures 9 and 10, and rows of those depend on it. What the longer experiments
need beyond that is here, so that it is part of what their rows depend on and of no other's.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from stof_kernels.baselines import MethodSpec, Prepared, Problem, Tensors
from stof_kernels.masks.families import Document

from .attention_masks import HeadBlocks
from .cell import Measured, is_out_of_memory, measure_attention, one_line, rows_or_reason
from .experiments import Cell
from .measurement import Measurement

if TYPE_CHECKING:
    from torch import Tensor

_FLEX_TILES = {"flex_attention": (64, 128), "flex_flash": (128,)}
"""Block sizes that FlexAttention's block mask of 64 x 64 blocks may have, best first: at 64 no tile is wasted."""

_EAGER_BLOCK_MASK = 1 << 30
"""Positions up to which FlexAttention's block mask is made eagerly, through an S x S mask: its compiled form needs none."""


def measure_cell(cell: Cell, job: Measured) -> list[Measurement]:
    """Rows of one cell, each method in the form that fits the cell's mask."""
    return rows_or_reason(cell.problem, job, lambda problem, job: measure_attention(problem, job, prepare))


def measure_with_memory(cell: Cell, job: Measured) -> list[Measurement]:
    """The same with a row of the memory that the mask's form and a call take."""
    return rows_or_reason(cell.problem, job, lambda problem, job: measure_attention(problem, job, prepare, memory=True))


def prepare(spec: MethodSpec, problem: Problem, tensors: Tensors) -> Prepared:
    """``spec`` ready to run ``problem``: in one of this module's forms, or as its own module prepares it."""
    pattern = problem.pattern
    if isinstance(pattern, HeadBlocks):
        if spec.id == "stof":
            return _stof_blocks(problem, tensors, pattern)
        if spec.id in _FLEX_TILES:
            return _flex_blocks(spec, problem, tensors, pattern)
    if isinstance(pattern, Document) and problem.device == "cuda" and spec.id in _PACKED:
        _require_runnable(spec, problem)
        return _packed(problem, tensors, pattern, _PACKED[spec.id])
    if spec.id == "sdpa_efficient" and problem.grouped:
        return _repeated_heads(spec, problem, tensors)
    if spec.id in _FLEX_TILES and problem.q_len * problem.kv_len > _EAGER_BLOCK_MASK:
        return _flex_compiled_mask(spec, problem, tensors)
    return spec.prepare(problem, tensors)  # type: ignore[misc]  # absent methods never come here


def _require_runnable(spec: MethodSpec, problem: Problem) -> None:
    """Unsupported where the method's own module says so of a mask that it has a native form of."""
    if spec.id == "fa4":
        from stof_kernels.baselines.flex_flash import require_fa4

        require_fa4()


def _stof_blocks(problem: Problem, tensors: Tensors, pattern: HeadBlocks) -> Prepared:
    """The public call with a mask made from the table of blocks, one plane per head."""
    from stof_kernels import SparseMask, sparse_attention

    q, k, v = tensors.q, tensors.k, tensors.v
    table = pattern.table(problem.q_len, problem.kv_len, problem.device)[None]

    def build() -> SparseMask:
        return SparseMask.from_blocks(table, pattern.block, problem.q_len, problem.kv_len).prepare(q, k)

    mask = build()
    note = str(mask.plan_for(q, k).config)
    return Prepared(lambda: sparse_attention(q, k, v, mask, scale=problem.scale), pattern, note=note, mask_build=build)


# ---- FlexAttention ---------------------------------------------------------------------------------------------------


@cache
def _flex() -> Callable[..., Tensor]:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_call(
    spec: MethodSpec, problem: Problem, tensors: Tensors, options: dict[str, object] | None = None
) -> Callable[[Any], Tensor]:
    """Compiled FlexAttention as a function of its block mask; compiled at the first call."""
    import torch

    _require_flex(spec, problem)
    torch._dynamo.reset()  # each mask is a new function to Dynamo, which keeps a limited number of graphs and then refuses
    run = _flex()
    options = {"BACKEND": "FLASH"} if spec.id == "flex_flash" else options

    def call(block_mask: Any) -> Tensor:
        return run(
            tensors.q, tensors.k, tensors.v, block_mask=block_mask, scale=problem.scale, enable_gqa=problem.grouped,
            kernel_options=options,
        )  # fmt: skip

    return call


def flex_blocks_call(
    spec: MethodSpec, problem: Problem, tensors: Tensors, table: Tensor, rule: Callable
) -> tuple[Callable[[Any], Tensor], int]:
    """(call, block size of its block masks) for masks of blocks: of the best size that compiles here, tried with ``table``."""
    *finer, coarsest = _FLEX_TILES[spec.id]
    for tile in finer:
        options = {"BLOCK_M": tile, "BLOCK_N": tile} if problem.device == "cuda" else None
        call = flex_call(spec, problem, tensors, options)
        try:
            call(flex_block_mask(problem, table, rule, tile))
            return call, tile
        except Exception as error:
            if is_out_of_memory(error):
                raise
            print(f"{spec.id}: no block mask of {tile} x {tile} tiles here: {one_line(error)}", file=sys.stderr)
    return flex_call(spec, problem, tensors), coarsest


def _require_flex(spec: MethodSpec, problem: Problem) -> None:
    if spec.id == "flex_flash":
        from stof_kernels.baselines import Unsupported
        from stof_kernels.baselines.flex_flash import require_fa4

        if problem.dtype == "float32":
            raise Unsupported("FlashAttention-4 runs float16 and bfloat16 only")
        require_fa4()


def flex_block_mask(problem: Problem, table: Tensor, rule: Callable, tile: int) -> Any:
    """FlexAttention's block mask of a bool table of blocks (heads, rows, columns), through its public constructor.

    ``rule`` decides inside its tiles that are larger than the blocks and only partly kept.
    """
    from torch.nn.attention.flex_attention import BlockMask

    block = problem.pattern.block  # type: ignore[attr-defined]  # HeadBlocks
    some = full = table
    if tile != block:
        some, full = _coarser(table, tile // block)
    known = inspect.signature(BlockMask.from_kv_blocks).parameters
    only_forward = {"compute_q_blocks": False} if "compute_q_blocks" in known else {}
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~full),
        *_ordered(full),
        BLOCK_SIZE=tile,
        mask_mod=rule,
        seq_lengths=(problem.q_len, problem.kv_len),
        **only_forward,
    )


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """(number, indices in ascending order) of the set entries of each row, with a batch dimension of 1, int32."""
    import torch

    order = table.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32)[None], order.to(torch.int32)[None].contiguous()


def _coarser(table: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """Whether any, and whether every, of ``ratio`` x ``ratio`` blocks is kept; the last row and column may have fewer."""
    import torch.nn.functional as F

    rows, cols = (-size % ratio for size in table.shape[1:])
    shape = (table.shape[0], (table.shape[1] + rows) // ratio, ratio, (table.shape[2] + cols) // ratio, ratio)
    some, every = (F.pad(table, (0, cols, 0, rows), value=fill).view(shape) for fill in (False, True))
    return some.any(4).any(2), every.all(4).all(2)


def _flex_blocks(spec: MethodSpec, problem: Problem, tensors: Tensors, pattern: HeadBlocks) -> Prepared:
    """Compiled call with a block mask per head."""
    table = pattern.table(problem.q_len, problem.kv_len, problem.device)
    rule = pattern.bind(problem.q_len, problem.kv_len, problem.device)
    call, tile = flex_blocks_call(spec, problem, tensors, table, rule)

    def build() -> Any:
        return flex_block_mask(problem, table, rule, tile)

    block_mask = build()
    note = f"block mask of {tile} x {tile} tiles"
    return Prepared(lambda: call(block_mask), pattern, note=note, mask_build=build)


def _flex_compiled_mask(spec: MethodSpec, problem: Problem, tensors: Tensors) -> Prepared:
    """The block mask made by the compiled builder: the eager one forms the S x S mask."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    call = flex_call(spec, problem, tensors)
    rule = problem.pattern.bind(problem.q_len, problem.kv_len, problem.device)
    compiled = torch.compile(create_block_mask, dynamic=False)

    def build() -> Any:
        return compiled(rule, None, None, problem.q_len, problem.kv_len, device=problem.device)

    block_mask = build()
    return Prepared(lambda: call(block_mask), problem.pattern, note="compiled create_block_mask", mask_build=build)


# ---- packed documents ------------------------------------------------------------------------------------------------

Packed = Callable[..., "Tensor"]


def _fa2_packed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, causal: bool, scale: float) -> Tensor:
    import torch

    op = torch.ops.aten._flash_attention_forward.default
    return op(q, k, v, ends, ends, longest, longest, 0.0, causal, False, scale=scale)[0]


def _fa4_packed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, causal: bool, scale: float) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    known = inspect.signature(flash_attn_varlen_func).parameters
    most = {name: longest for name in ("max_seqlen_q", "max_seqlen_k") if name in known}
    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, softmax_scale=scale, causal=causal, **most
    )
    return out[0] if isinstance(out, tuple) else out


_PACKED: dict[str, Packed] = {"fa2": _fa2_packed, "fa4": _fa4_packed}


def packed_ends(pattern: Document, batch: int) -> list[int]:
    """Where each document of a packed batch ends, from 0 on: what varlen kernels call cumulative sequence lengths."""
    return list(accumulate(pattern.lengths * batch, initial=0))


def _packed(problem: Problem, tensors: Tensors, pattern: Document, run: Packed) -> Prepared:
    """Varlen call: q, k and v packed as (tokens, heads, head_dim), which is a view for a batch of 1."""
    import torch

    ends = torch.tensor(packed_ends(pattern, problem.batch), dtype=torch.int32, device=problem.device)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (tensors.q, tensors.k, tensors.v))
    longest = max(pattern.lengths)

    def call() -> Tensor:
        out = run(q, k, v, ends, longest, pattern.causal, problem.scale)
        return out.unflatten(0, (problem.batch, problem.q_len)).transpose(1, 2)

    copied = problem.batch > 1
    return Prepared(call, pattern, note="native varlen, packed beforehand" if copied else "native varlen")


# ---- grouped queries -------------------------------------------------------------------------------------------------


def _repeated_heads(spec: MethodSpec, problem: Problem, tensors: Tensors) -> Prepared:
    """The key heads repeated beforehand, for a kernel that knows no shared ones."""
    groups = problem.heads // problem.kv_heads
    k, v = (t.repeat_interleave(groups, dim=1) for t in (tensors.k, tensors.v))
    prepared = spec.prepare(replace(problem, kv_heads=problem.heads), Tensors(tensors.q, k, v))  # type: ignore[misc]
    note = "; ".join(filter(None, (prepared.note, "key heads repeated beforehand")))
    return replace(prepared, note=note)
