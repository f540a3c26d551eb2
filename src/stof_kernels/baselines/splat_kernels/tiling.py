"""Where tiles lie: blocks of rows with their spans, and the tiles that R-SDDMM computes. NumPy only.

Rows of one block share their stride and their remainder (transformation alignment [C]): a *row map* lists such rows one after
the other, each set padded with -1 to whole blocks. Counted in steps of its stride, a set of strided rows is a band like any.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from .acsr import Acsr


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """Blocks of ``height`` positions and the columns that each spans, from ``start`` on in steps of ``step``, below ``end``.

    ``order`` gives the row at each position, -1 for padding; None where position and row are the same. ``sets`` are the ranges
    of positions of one stride and remainder. Blocks without a kept column have ``end == start``.
    """

    order: np.ndarray | None
    positions: int
    height: int
    start: np.ndarray
    end: np.ndarray
    step: np.ndarray
    sets: tuple[tuple[int, int], ...]


def row_blocks(acsr: Acsr, height: int, rows: np.ndarray | None = None) -> RowBlocks:
    """Blocks of the mask's rows, or of ``rows`` alone, with a row map where strides are not all 1."""
    sets, steps = _aligned_sets(acsr, rows)
    if len(sets) == 1:
        order, bounds = rows, ((0, len(sets[0])),)
    else:
        padded = [np.pad(s, (0, -len(s) % height), constant_values=-1) for s in sets]
        ends = np.cumsum([len(s) for s in padded])
        order = np.concatenate(padded)
        bounds = tuple((int(e) - len(p), int(e) - len(p) + len(s)) for e, p, s in zip(ends, padded, sets, strict=True))
    positions = len(sets[0]) if order is None else len(order)
    blocks = -(-positions // height)
    at = np.arange(positions) if order is None else order
    at = np.pad(at, (0, blocks * height - positions), constant_values=-1).reshape(blocks, height)
    used = (at >= 0) & (acsr.count[at] > 0)
    some = used.any(1)
    step = np.repeat(steps, [-(-len(s) // height) for s in sets])
    start = np.where(some, np.where(used, acsr.offset[at], acsr.columns).min(1), 0)
    end = np.where(some, np.where(used, acsr.last[at], -1).max(1) + step, 0)
    order = None if order is None else order.astype(np.int32)
    return RowBlocks(order, positions, height, *(a.astype(np.int32) for a in (start, end, step)), bounds)


def _aligned_sets(acsr: Acsr, rows: np.ndarray | None) -> tuple[list[np.ndarray], list[int]]:
    """Rows by stride and remainder, and each set's stride. Rows of at most one column fit any: they take the usual one."""
    rows = np.arange(acsr.rows) if rows is None else rows
    stride, free = acsr.stride[rows], acsr.count[rows] <= 1
    if free.all() or (stride[~free] == 1).all():
        return [rows], [1]
    stride = np.where(free, np.bincount(stride[~free]).argmax(), stride)
    remainder = acsr.offset[rows] % stride
    keys, which = np.unique(np.stack([stride, remainder]), axis=1, return_inverse=True)
    which = which.reshape(-1)
    return [rows[which == k] for k in range(keys.shape[1])], [int(a) for a in keys[0]]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Anchors of R-SDDMM's tiles, int32 (n, 3): first position, first column, step between columns.

    ``naive`` and ``poset`` are the numbers of tiles of the two ways to place them (the smaller was taken), ``bound`` a number
    that no placement can be under; ``poset`` is None where the naive way already reaches it.
    """

    anchors: np.ndarray
    naive: int
    poset: int | None
    bound: int


def place_tiles(acsr: Acsr, blocks: RowBlocks, width: int) -> Tiles:
    """Tiles of ``blocks.height`` x ``width`` over every kept position, at naive or, where those are fewer, poset anchors."""
    naive = _naive(blocks, width)
    at = np.arange(blocks.positions) if blocks.order is None else blocks.order
    bound = sum(_bound(acsr.count[at[low:high]], blocks.height, width) for low, high in blocks.sets)
    if len(naive) == bound:
        return Tiles(naive, len(naive), None, bound)
    parts = [_poset(acsr, at, low, high, int(blocks.step[low // blocks.height]), blocks.height, width)
             for low, high in blocks.sets]  # fmt: skip
    poset = np.concatenate(parts)
    return Tiles(poset if len(poset) < len(naive) else naive, len(naive), len(poset), bound)


def _naive(blocks: RowBlocks, width: int) -> np.ndarray:
    """For each block of rows from its smallest kept column on, a tile every ``width`` columns up to the largest [C]."""
    count = -(-(blocks.end - blocks.start) // (width * blocks.step))
    block = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(block)) - np.repeat(np.cumsum(count) - count, count)
    step = blocks.step[block]
    return np.stack([block * blocks.height, blocks.start[block] + nth * width * step, step], axis=1).astype(np.int32)


def _bound(count: np.ndarray, height: int, width: int) -> int:
    """Fewest tiles possible: positions ``width`` apart in rows ``height`` apart can share none [I]."""
    rows = np.pad(count, (0, -len(count) % height)).reshape(-1, height)
    return int((-(-rows // width)).sum(0).max(initial=0))


def _poset(acsr: Acsr, at: np.ndarray, low: int, high: int, step: int, height: int, width: int) -> np.ndarray:
    """Greedy cover of one set of rows; anchors at minimal elements of what is uncovered [I, our reading of "poset tiling" [S]].

    Positions are ordered by row and column at once. Of the minimal uncovered ones the leftmost is taken, then the topmost: no
    uncovered position is left of it, so each row stays one interval that loses its left end, and tiles need no row grid.
    """
    rows = at[low:high]
    left = (acsr.offset[rows] // step).tolist()  # the remainder is the same for all and returns below
    end = [a + n for a, n in zip(left, acsr.count[rows].tolist(), strict=True)]
    heap = [(column, row) for row, column in enumerate(left) if column < end[row]]
    heapq.heapify(heap)
    anchors = []
    while heap:
        column, top = heapq.heappop(heap)
        if left[top] != column:
            continue  # a tile has covered it since
        anchors.append((top, column))
        for row in range(top, min(top + height, len(rows))):
            if left[row] < column + width and left[row] < end[row]:
                left[row] = column + width
                if left[row] < end[row]:
                    heapq.heappush(heap, (left[row], row))
    found = np.array(sorted(anchors), dtype=np.int64).reshape(-1, 2)
    kept = rows[acsr.count[rows] > 0]
    remainder = int(acsr.offset[kept[0]]) % step if len(kept) else 0
    return np.stack([found[:, 0] + low, found[:, 1] * step + remainder, np.full(len(found), step)], 1).astype(np.int32)
