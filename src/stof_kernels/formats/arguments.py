"""Checks and normal forms of what a mask is built from."""

from __future__ import annotations

import torch
from torch import Tensor


def four_dims(keep: Tensor, q_len: int | None, kv_len: int | None, what: str = "keep") -> Tensor:
    """``keep`` as a 4-D bool view whose shared batch and head dimensions have size 1 and whose last two are full."""
    if not isinstance(keep, Tensor):
        raise TypeError(f"{what}: got {type(keep).__name__}, allowed: a bool tensor")
    if keep.dtype != torch.bool:
        raise TypeError(f"{what}: dtype {keep.dtype}, allowed: torch.bool (True = attend)")
    if not 1 <= keep.dim() <= 4:
        raise ValueError(f"{what}: {keep.dim()} dimensions, allowed: 1 to 4, broadcastable to (B, H, Lq, Lk)")
    given = tuple(keep.shape)
    keep = keep[(None,) * (4 - keep.dim())]
    for dim in (0, 1):
        if keep.shape[dim] == 0:
            raise ValueError(f"{what}: shape {given} has no planes, allowed: batch and head sizes >= 1")
        if keep.stride(dim) == 0 and keep.numel():  # strides of an empty tensor say nothing
            keep = keep.narrow(dim, 0, 1)
    for dim, length in ((2, q_len), (3, kv_len)):
        if length is not None and keep.shape[dim] not in (1, length):
            raise ValueError(f"{what}: shape {given}, allowed: the last two dimensions 1 or ({q_len}, {kv_len})")
    return keep.expand(-1, -1, keep.shape[2] if q_len is None else q_len, keep.shape[3] if kv_len is None else kv_len)


def block_table(chosen: Tensor, block: int, q_len: int, kv_len: int) -> Tensor:
    """``chosen`` as a 4-D bool table of blocks, (B, H, ceil(Lq/block), ceil(Lk/block)) with shared dimensions of size 1.

    Bool is the table itself; integers (..., ceil(Lq/block), k) name the kept blocks of each row, as top-k gives them; entries
    outside of the row, such as -1, name none. Nothing is read back from the device.
    """
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"from_blocks: block is {block!r}, allowed: an integer >= 1")
    rows, cols = -(-q_len // block), -(-kv_len // block)
    if isinstance(chosen, Tensor) and chosen.dtype in (torch.int32, torch.int64) and 2 <= chosen.dim() <= 4:
        # One column more takes the entries that name no block.
        index = chosen.clamp(-1, cols).remainder(cols + 1).to(torch.int64)
        table = torch.zeros(*chosen.shape[:-1], cols + 1, dtype=torch.bool, device=chosen.device)
        chosen = table.scatter_(-1, index, True)[..., :cols]
    return four_dims(chosen, rows, cols, what="keep_blocks")


def check_sizes(where: str, q_len: int, kv_len: int, batch: int, heads: int) -> None:
    """Raise TypeError or ValueError unless lengths are integers >= 0 and plane counts integers >= 1."""
    for name, value, low in (("q_len", q_len, 0), ("kv_len", kv_len, 0), ("batch", batch, 1), ("heads", heads, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{where}: {name} is {value!r}, allowed: an integer >= {low}")
        if value < low:
            raise ValueError(f"{where}: {name} is {value}, allowed: an integer >= {low}")


def shape_class(n: int) -> int:
    """The next power of two from 64 on."""
    return 1 << max(6, (n - 1).bit_length())


def buffer_sizes(capacity: int | str | None, n_cells: int, n_bits: int, most: int) -> tuple[int, int]:
    """Sizes of the cell and bit buffers; ``most`` is the number of all cells."""
    if capacity is None:
        return shape_class(n_cells), shape_class(n_bits)
    if capacity == "max":
        n = max(1, most)
    elif isinstance(capacity, int) and not isinstance(capacity, bool) and capacity >= 1:
        n = min(capacity, max(1, most))
    else:
        raise ValueError(f'capacity is {capacity!r}, allowed: None, "max" or a number of 16 x 16 cells >= 1')
    return n, n
