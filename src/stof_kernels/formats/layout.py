"""What a kernel reads: the canonical lists themselves, or a layout derived from them on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import raw
from ..planner import BLOCK_WISE, KernelConfig, TileStats

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
    # A packed tile of four runs holds at least one cell, and no more tiles exist than the matrix has.
    strips, cols = -(-mask.q_len // config.q_tile), -(-mask.kv_len // TILE_KEYS)
    tiles = min(mask.capacity, planes * strips * cols)
    buffers = raw.empty_layout(mask.strip_ptr, mask.q_len, planes, *request[3:], tiles)
    words = torch.tensor((*config.words, -1, -1, -1, 0), dtype=torch.int64)
    layout = Layout(*buffers, words)
    refresh(mask, layout, config, copies)
    return layout


def tile_stats(mask: SparseMask) -> tuple[TileStats, ...]:
    """Key tiles of the mask for each query tile that a CUDA kernel has; of full buffers where the capacity is fixed."""
    planes, found = mask.batch * mask.heads, []
    for q_tile in Q_TILES:
        rows = planes * -(-mask.q_len // q_tile)
        if mask.fixed:
            most = -(-mask.kv_len // TILE_KEYS)
            found.append(TileStats(q_tile, min(mask.capacity, rows * most), most))
            continue
        ptr, *_ = raw.build_layout(*mask.lists.tensors, mask.q_len, mask.kv_len, planes, q_tile, 0, 1)
        header = ptr[:8].tolist()  # {items, parts, combines, key tiles, bitmap slots, longest item, overflow, 0}
        found.append(TileStats(q_tile, header[3], header[5]))
    return tuple(found)


def refresh(mask: SparseMask, layout: Layout, config: KernelConfig, copies: int) -> None:
    """Derive again into the same buffers, without touching the host: after the mask's lists have changed."""
    if layout.ptr is mask.strip_ptr:
        return
    request = (mask.q_len, mask.kv_len, mask.batch * mask.heads, config.q_tile, config.kv_chunk, copies)
    raw.build_layout_out(*mask.lists.tensors, *request, layout.ptr, layout.col, layout.slot, layout.bits)
