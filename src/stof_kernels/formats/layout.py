"""What a kernel reads: the canonical lists themselves, or a layout derived from them on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import raw
from ..planner import BLOCK_WISE, MOST_LAYOUT_KEYS, KernelConfig, MaskStats, TileStats
from .cells import CELL, n_cols, n_strips

if TYPE_CHECKING:
    from .sparse_mask import SparseMask

TILE_KEYS = 64
"""Keys of a packed tile of the CUDA block-wise kernel: four runs of 16."""
Q_TILES = (64, 128)
"""Its query tiles."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The (ptr, col, slot, bits) that one kernel reads, and its launch plan (int64 on the CPU)."""

    ptr: Tensor
    col: Tensor
    slot: Tensor
    bits: Tensor
    plan: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the operator's order."""
        return self.ptr, self.col, self.slot, self.bits, self.plan


def derive(mask: SparseMask, config: KernelConfig, copies: int) -> Layout:
    """The layout of a mask for one kernel configuration; ``copies`` is how many heads share each of its planes.

    A compact mask's layout is sized by one small read-back; with fixed capacity nothing is read back.
    """
    if mask.device.type == "cpu" or config.kernel != BLOCK_WISE:
        words = torch.tensor(config.words, dtype=torch.int64)
        return Layout(mask.strip_ptr, mask.cell_col, mask.cell_slot, mask.cell_bits, words)
    planes = mask.batch * mask.heads
    request = (mask.q_len, mask.kv_len, planes, config.q_tile, config.kv_chunk, copies)
    if not mask.fixed:
        ptr, col, slot, bits, words = raw.build_layout(*mask.lists.tensors, *request)
        words[3] = config.shape
        return Layout(ptr, col, slot, bits, words)
    buffers = raw.empty_layout(mask.strip_ptr, mask.q_len, planes, *request[3:], *most_tiles(mask, config.q_tile))
    words = torch.tensor((*config.words, -1, -1, -1, 0), dtype=torch.int64)
    layout = Layout(*buffers, words)
    refresh(mask, layout, config, copies)
    return layout


def most_tiles(mask: SparseMask, q_tile: int) -> tuple[int, int]:
    """How many key tiles, and how many of them with a bitmap, a mask of fixed capacity can need for a query tile."""
    planes, cols = mask.batch * mask.heads, -(-mask.kv_len // TILE_KEYS)
    everything = planes * -(-mask.q_len // q_tile) * cols
    side = min(mask.block, q_tile)  # rows that a query tile and a block share
    if mask.block % TILE_KEYS or max(mask.block, q_tile) % side:
        # A packed tile of four runs holds at least one cell.
        tiles = min(mask.capacity, everything)
        return tiles, tiles
    # Whole blocks fill their tiles, but for those that the end of the queries cuts, and one of each row of blocks, or query
    # tile, that the end of the keys does.
    whole = mask.capacity // (side // CELL * (TILE_KEYS // CELL))
    cut_rows = planes * cols if mask.q_len % side else 0
    cut_cols = planes * -(-mask.q_len // side) if mask.kv_len % TILE_KEYS else 0
    tiles = min(whole + cut_rows + cut_cols, everything)
    # Rows of blocks that share a query tile need bitmaps to tell their columns apart.
    return tiles, min(tiles if q_tile > mask.block else max(1, cut_cols), max(1, everything))


def stats_of(mask: SparseMask) -> MaskStats:
    """What the planner needs to know: of full buffers for a mask of fixed capacity, else by one small read-back."""
    planes = mask.batch * mask.heads
    strips, cols = planes * n_strips(mask.q_len), n_cols(mask.kv_len)
    tiles: tuple[TileStats, ...] = ()
    if mask.fixed:
        listed = min(mask.capacity, strips * cols)
        partial, kept = min(listed, mask.cell_bits.shape[0]), listed * CELL**2
        if mask.device.type == "cuda":
            longest = -(-mask.kv_len // TILE_KEYS)
            tiles = tuple(TileStats(q_tile, most_tiles(mask, q_tile)[0], longest) for q_tile in Q_TILES)
    elif mask.device.type == "cuda":
        listed, partial, kept, tiles = _read_back(mask)
    else:
        listed, _, kept, _ = mask.counts.tolist()
        partial = int((mask.cell_slot[:listed] >= 0).sum())
    return MaskStats(listed, partial, kept, strips, cols, planes, tiles)


def _read_back(mask: SparseMask) -> tuple[int, int, int, tuple[TileStats, ...]]:
    """Listed cells, partial ones, kept positions and key tiles of a compact mask on CUDA."""
    sizes = mask.q_len, mask.kv_len, mask.batch * mask.heads
    # Lists that are repeated for every plane share their bit rows, so partial cells are counted and not their rows.
    listed = torch.arange(mask.capacity, device=mask.device) < mask.counts[0]
    partial = ((mask.cell_slot >= 0) & listed).sum().view(1)
    q_tiles = Q_TILES if mask.kv_len <= MOST_LAYOUT_KEYS else ()
    headers = [raw.layout_sizes(*mask.lists.tensors, *sizes, q_tile) for q_tile in q_tiles]
    numbers = torch.cat([mask.counts, partial, *headers]).tolist()
    # A header is {items, parts, combines, key tiles, bitmap slots, longest item, overflow, leading items}.
    tiles = (numbers[5 + 8 * i : 13 + 8 * i] for i in range(len(q_tiles)))
    return (
        numbers[0],
        numbers[4],
        numbers[2],
        tuple(TileStats(q_tile, header[3], header[5]) for q_tile, header in zip(q_tiles, tiles, strict=True)),
    )


def build_in_place(
    mask: SparseMask,
    table: Tensor,
    block: int | None = None,
    layouts: Mapping[tuple[KernelConfig, int], Layout] | None = None,
) -> None:
    """The lists, and what ``layouts`` were derived from them, of another mask into the same buffers; CUDA, no read-back.

    ``table``: a dense mask (Bm, Hm, Lq, Lk), or with ``block`` a table of whole blocks, by `SparseMask`'s planes.
    """
    lists = mask.lists.tensors
    # Kernels that read the lists themselves have no layout of their own.
    own = [(layout, *key) for key, layout in (layouts or {}).items() if layout.ptr is not mask.strip_ptr]
    if block is None:
        raw.build_cells_out(table, *lists)
    elif not own:
        raw.build_blocks_out(table, block, mask.q_len, mask.kv_len, *lists)
    else:
        # Lists and layout together are less work than one after the other.
        layout, config, copies = own.pop(0)
        how, buffers = (config.q_tile, config.kv_chunk, copies), (layout.ptr, layout.col, layout.slot, layout.bits)
        raw.build_blocks_layout_out(table, block, mask.q_len, mask.kv_len, *lists, *how, *buffers)
    for layout, config, copies in own:
        refresh(mask, layout, config, copies)


def refresh(mask: SparseMask, layout: Layout, config: KernelConfig, copies: int) -> None:
    """Derive again into a layout's own buffers, without touching the host: after the mask's lists have changed."""
    request = (mask.q_len, mask.kv_len, mask.batch * mask.heads, config.q_tile, config.kv_chunk, copies)
    raw.build_layout_out(*mask.lists.tensors, *request, layout.ptr, layout.col, layout.slot, layout.bits)
