"""ACSR of any mask, read off its kept columns row by row; refuses what ACSR cannot store, naming the row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..inputs import keep_rows
from ..registry import Problem, Unsupported
from .acsr import Acsr, generate

_STRIP_POSITIONS = 1 << 24  # positions of the mask that are looked at together
MOST_PIECES = 4


def acsr_of(problem: Problem) -> Acsr:
    """ACSR of the problem's mask, by a generator where its family has one. Raises `Unsupported` if a row is no progression."""
    pattern = problem.pattern
    made = generate(pattern.family, pattern.params, problem.q_len)
    return made if made is not None else _join([_progressions(*strip) for strip in _planes(problem)], problem.kv_len)


def is_one_acsr(problem: Problem) -> bool:
    """Whether `acsr_of` can store the problem's mask."""
    try:
        acsr_of(problem)
    except Unsupported:
        return False
    return True


def pieces_of(problem: Problem) -> list[Acsr]:
    """The mask as disjoint ACSRs: piece k holds the k-th run of neighbouring columns of every row (ours, not SPLAT's).

    Raises `Unsupported` if a row has more than `MOST_PIECES` runs.
    """
    strips = [_runs(*strip) for strip in _planes(problem)]
    most = max(len(strip) for strip in strips)
    return [_join([strip[k] if k < len(strip) else _nothing(strip[0]) for strip in strips], problem.kv_len)
            for k in range(most)]  # fmt: skip


def from_dense(keep: Tensor) -> Acsr:
    """ACSR of a bool mask (rows, columns). Raises `Unsupported` if a row is no progression."""
    return _join([_progressions(keep, 0)], keep.shape[1])


_Rows = tuple[Tensor, Tensor, Tensor]  # stride, offset, count


def _join(strips: list[_Rows], columns: int) -> Acsr:
    return Acsr(*(torch.cat(parts).cpu().numpy().astype(np.int32) for parts in zip(*strips, strict=True)), columns)


def _planes(problem: Problem) -> Iterator[tuple[Tensor, int]]:
    """Strips of the mask, bool (rows, kv_len), each with its first row. Raises `Unsupported` where planes differ."""
    planes = problem.batch * problem.heads if problem.pattern.per_head else 1
    step = max(1, min(problem.q_len, _STRIP_POSITIONS // (problem.kv_len * planes)))
    for start in range(0, problem.q_len, step):
        keep = keep_rows(problem, problem.pattern, start, min(start + step, problem.q_len)).flatten(0, 1)
        if len(keep) > 1 and not bool((keep == keep[:1]).all()):
            raise Unsupported("SPLAT compiles one mask for all batch entries and heads; this one differs between them")
        yield keep[0], start


def _extremes(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns (1, kv_len), first kept column of each row (kv_len if none) and last (-1 if none), as (rows, 1)."""
    columns = torch.arange(keep.shape[1], device=keep.device)[None]
    first = columns.where(keep, keep.shape[1]).amin(1, keepdim=True)
    return columns, first, columns.where(keep, -1).amax(1, keepdim=True)


def _progressions(keep: Tensor, start: int) -> _Rows:
    """Stride and offset from a row's first two columns [C], and the proof that they give all of them."""
    columns, first, last = _extremes(keep)
    count = keep.sum(1, keepdim=True)
    second = columns.where(keep & (columns > first), keep.shape[1]).amin(1, keepdim=True)
    stride = torch.where(count > 1, second - first, 1)
    regular = (last - first == stride * (count - 1)) & ~(keep & ((columns - first) % stride != 0)).any(1, keepdim=True)
    wrong = ~(regular | (count == 0)).flatten()
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise Unsupported(_refusal(keep[row], start + row))
    offset = torch.where(count > 0, first, 0)
    return stride.flatten(), offset.flatten(), count.flatten()


def _refusal(row: Tensor, number: int) -> str:
    breaks = int((row[1:] & ~row[:-1]).sum() + row[0])
    return (
        f"ACSR stores one arithmetic progression of columns per row; row {number} keeps {int(row.sum())} of {len(row)} columns "
        f"in {breaks} runs that form none"
    )


def _runs(keep: Tensor, start: int) -> list[_Rows]:
    """The k-th run of every row for k = 0, 1, ... until no row has one."""
    found, left = [], keep.clone()
    while True:
        columns, first, _ = _extremes(left)
        if found and not bool(left.any()):
            return found
        if len(found) == MOST_PIECES:
            row = int(left.any(1).int().argmax())
            raise Unsupported(
                f"more than {MOST_PIECES} runs of columns in a row, no union of a few pieces; first in row {start + row}"
            )
        end = columns.where(~left & (columns > first), keep.shape[1]).amin(1, keepdim=True)
        count = (end - first).clamp(min=0).flatten()
        found.append((torch.ones_like(count), torch.where(count > 0, first.flatten(), 0), count))
        left &= columns >= end


def _nothing(like: _Rows) -> _Rows:
    stride, offset, count = like
    return torch.ones_like(stride), torch.zeros_like(offset), torch.zeros_like(count)
