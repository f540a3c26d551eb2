"""Whether cell lists can be followed: what a damaged file or a stray write does to them is said, not computed with."""

from __future__ import annotations

import torch

from .cells import CellLists, n_cols


def damage(lists: CellLists, kv_len: int, listed: int, bit_rows: int) -> str | None:
    """What is wrong with lists that say they hold ``listed`` cells and ``bit_rows`` rows of bits, or None."""
    ptr = lists.strip_ptr
    if int(ptr[0]) != 0 or int(ptr[-1]) != listed or bool((ptr.diff() < 0).any()):
        return f"strip_ptr does not rise from 0 to the {listed} listed cells"
    col, slot = lists.cell_col[:listed], lists.cell_slot[:listed]
    if listed and (int(col.min()) < 0 or int(col.max()) >= n_cols(kv_len)):
        return f"cell_col leaves 0..{n_cols(kv_len) - 1}"
    first = torch.zeros(listed + 1, dtype=torch.bool, device=col.device)
    first[ptr.to(torch.int64)] = True
    if bool(((col.diff() <= 0) & ~first[1:listed]).any()):
        return "cell_col does not ascend inside a strip"
    if listed and (int(slot.min()) < -1 or int(slot.max()) >= bit_rows):
        return f"cell_slot leaves -1..{bit_rows - 1}"
    return None
