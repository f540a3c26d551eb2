"""ACSR, affine-compressed sparse rows: a row's kept columns are one arithmetic progression, stored as three integers [C]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Acsr:
    """Kept columns of row i: ``stride[i] * j + offset[i]`` for j from 0 to ``count[i] - 1``; int32 arrays (rows,).

    Rows with one column are (1, column, 1), empty ones (1, 0, 0). A score lives at ``values[i][j]`` of an array
    (B, H, rows, W), W being the largest count; the rest of a row is unused.
    """

    stride: np.ndarray
    offset: np.ndarray
    count: np.ndarray
    columns: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.count)

    @cached_property
    def width(self) -> int:
        """W: the largest count of a row."""
        return int(self.count.max(initial=0))

    @cached_property
    def kept(self) -> int:
        """Kept positions of all rows."""
        return int(self.count.sum(dtype=np.int64))

    @property
    def metadata_bytes(self) -> int:
        """Bytes of the three arrays."""
        return self.stride.nbytes + self.offset.nbytes + self.count.nbytes

    @cached_property
    def last(self) -> np.ndarray:
        """Largest kept column of each row; one stride before the first where a row is empty."""
        return self.offset + self.stride * (self.count - 1)

    def slot(self, row: int, column: int) -> int | None:
        """Place j of ``column`` in its row, None if the row does not keep it: the inverse map."""
        j, rest = divmod(column - int(self.offset[row]), int(self.stride[row]))
        return j if rest == 0 and 0 <= j < self.count[row] else None

    def to_dense(self) -> np.ndarray:
        """The mask as bool (rows, columns)."""
        away = np.arange(self.columns)[None] - self.offset[:, None]
        j = away // self.stride[:, None]
        return (away % self.stride[:, None] == 0) & (j >= 0) & (j < self.count[:, None])


def _acsr(first: np.ndarray, last: np.ndarray, stride: int, columns: int) -> Acsr:
    """Rows from ``first`` to ``last`` (inclusive, ``last < first``: empty) in steps of ``stride``."""
    count = np.maximum(0, (last - first) // stride + 1)
    arrays = (np.where(count > 1, stride, 1), np.where(count > 0, first, 0), count)
    return Acsr(*(a.astype(np.int32) for a in arrays), columns)


def windowed(size: int, reach: int) -> Acsr:
    """Columns from i - reach to i + reach [C]."""
    i = np.arange(size)
    return _acsr(np.maximum(0, i - reach), np.minimum(size - 1, i + reach), 1, size)


def causal_windowed(size: int, reach: int) -> Acsr:
    """Columns from i - reach to i [C]."""
    i = np.arange(size)
    return _acsr(np.maximum(0, i - reach), i, 1, size)


def blocked(size: int, block: int) -> Acsr:
    """Columns of the row's own block and of the block before it; ``block`` divides ``size`` [C]."""
    if block < 1 or size % block:
        raise ValueError(f"blocked: block is {block}, allowed: a divisor of {size}")
    start = np.arange(size) // block * block
    return _acsr(np.maximum(0, start - block), start + block - 1, 1, size)


def strided(size: int, stride: int) -> Acsr:
    """Columns that leave the row's remainder when divided by ``stride`` [C]."""
    if stride < 1:
        raise ValueError(f"strided: stride is {stride}, allowed: an integer >= 1")
    first = np.arange(size) % stride
    return _acsr(first, np.full(size, size - 1), stride, size)


def prefix(size: int, columns: np.ndarray) -> Acsr:
    """The first ``columns[i]`` columns: causal, prefix and full masks."""
    return _acsr(np.zeros(size, np.int64), np.clip(columns, 0, size) - 1, 1, size)


def dilated(size: int, reach: int, step: int, causal: bool = False) -> Acsr:
    """``reach`` columns on each side of i (with ``causal`` before it only), ``step`` apart."""
    i = np.arange(size)
    first = i - np.minimum(reach, i // step) * step
    return _acsr(first, i if causal else i + np.minimum(reach, (size - 1 - i) // step) * step, step, size)


def generate(family: str, params: dict[str, object], size: int) -> Acsr | None:
    """ACSR of one of this project's patterns in O(size) by a generator; None where there is none for its family."""
    i = np.arange(size)
    if family == "full":
        return prefix(size, np.full(size, size))
    if family == "causal":
        return prefix(size, i + 1 + params["offset"])
    if family == "prefix_lm":
        return prefix(size, np.maximum(i + 1, params["prefix"]))
    if family in ("sliding_window", "artifact_sliding_window"):
        return (causal_windowed if params["causal"] else windowed)(size, params["w"])
    if family == "dilated":
        return dilated(size, params["w"], params["dilation"], params["causal"])
    return None
