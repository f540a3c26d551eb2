"""Cell lists of whole blocks written into buffers of fixed capacity, without the host: what a captured graph can replay."""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import CELL, CellLists, n_cols, n_strips


def can_write(block: int, kv_len: int) -> bool:
    """Whether every cell of a block is full, so that its lists need no bitmaps."""
    return block % CELL == 0 and kv_len % CELL == 0


def write_blocks(lists: CellLists, keep_blocks: Tensor, block: int, q_len: int, kv_len: int) -> None:
    """Overwrite ``lists`` with those of bool (B, H, ceil(Lq/block), ceil(Lk/block)) blocks; needs `can_write`.

    Plain operators whose shapes follow from capacity and lengths alone. Where the buffers are too small only the overflow flag
    and the number of cells are right, and no strip lists anything.
    """
    device, ratio = keep_blocks.device, block // CELL
    table = keep_blocks.flatten(0, 1)
    _, block_rows, block_cols = table.shape
    strips, capacity = n_strips(q_len), lists.cell_col.numel()
    # Kept block columns of each block row in order: every block goes to the place of its rank, those removed past the end.
    rank = table.cumsum(-1, dtype=torch.int32)
    place = torch.where(table, rank - 1, block_cols).to(torch.int64)
    columns = torch.arange(block_cols, dtype=torch.int32, device=device).expand_as(rank)
    ordered = rank.new_zeros(*rank.shape[:2], block_cols + 1).scatter_(-1, place, columns).flatten()
    narrower = block_cols * ratio - n_cols(kv_len)  # the last block may be cut by the end of the keys
    per_row = rank[..., -1] * ratio - table[..., -1] * narrower
    per_strip = per_row.repeat_interleave(ratio, dim=1)[:, :strips]
    ends = per_strip.flatten().cumsum(0, dtype=torch.int32)
    total, overflow = ends[-1], ends[-1] > capacity
    # Each place of the lists finds its strip, then its cell inside the strip's blocks.
    at = torch.arange(capacity, dtype=torch.int32, device=device)
    strip = torch.searchsorted(ends, at, right=True, out_int32=True).clamp_(max=ends.numel() - 1)
    inside = at - (ends - per_strip.flatten())[strip]
    row = strip // strips * block_rows + strip % strips // ratio
    nth = (inside // ratio).clamp_(max=block_cols)
    lists.cell_col.copy_(ordered[row * (block_cols + 1) + nth] * ratio + inside % ratio)
    lists.cell_slot.fill_(-1)
    lists.strip_ptr[0] = 0
    lists.strip_ptr[1:] = torch.where(overflow, 0, ends)
    queries = (q_len - torch.arange(strips, device=device) * CELL).clamp(max=CELL)
    kept = (per_strip * queries).sum() * CELL
    lists.counts.copy_(torch.stack([total.to(torch.int64), torch.zeros_like(kept), kept, overflow.to(torch.int64)]))
