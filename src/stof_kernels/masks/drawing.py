"""A draw of random blocks that is the same on every device, torch version and Python version."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_MASK32 = 0xFFFFFFFF


def hash32(seed: int, index: Tensor) -> Tensor:
    """32-bit mix of ``seed`` and each entry of the int64 tensor ``index``, as int64 values in [0, 2**32).

    Two rounds of multiply and xor-shift; integer arithmetic only, so the values never depend on the platform.
    """
    x = (index + (seed + 1) * 0x9E3779B9) & _MASK32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK32
    return x ^ (x >> 15)


@lru_cache(maxsize=16)
def block_table(q_len: int, kv_len: int, block: int, fill: float, seed: int) -> Tensor:
    """Bool (ceil(q_len/block), ceil(kv_len/block)) on the CPU with exactly max(1, round(fill * n)) of n blocks set.

    The blocks with the smallest hash of (seed, block index) are taken, the index breaking ties. Not to be written to.
    """
    import torch

    rows, cols = -(-q_len // block), -(-kv_len // block)
    n = rows * cols
    table = torch.zeros(n, dtype=torch.bool)
    if n:
        index = torch.arange(n, dtype=torch.int64)
        # The hash is cut to 31 bits so that hash and index together stay a positive int64.
        order = torch.argsort(((hash32(seed, index) >> 1) << 32) | index)
        table[order[: max(1, round(fill * n))]] = True
    return table.view(rows, cols)


def rectangle_counts(table: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Counter of set entries in inclusive rectangles of a bool table: (r_lo, r_hi, c_lo, c_hi) -> (set, covered)."""
    import torch

    sums = torch.zeros(table.shape[0] + 1, table.shape[1] + 1, dtype=torch.int32, device=table.device)
    sums[1:, 1:] = table.to(torch.int32).cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)

    def count(r_lo: Tensor, r_hi: Tensor, c_lo: Tensor, c_hi: Tensor) -> tuple[Tensor, Tensor]:
        r_end, c_end = r_hi + 1, c_hi + 1
        inside = sums[r_end, c_end] - sums[r_lo, c_end] - sums[r_end, c_lo] + sums[r_lo, c_lo]
        return inside, (r_end - r_lo) * (c_end - c_lo)

    return count
