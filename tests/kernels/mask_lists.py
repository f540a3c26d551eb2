"""The mask format built the plain way, straight from its definition, so that kernels are not tested with their own code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from stof_kernels.kernels import raw

CELL = 16
ROW_WISE, BLOCK_WISE = (0, -1, -1, 0), (1, -1, -1, 0)
DEFAULT = (-1, -1, -1, -1)


@dataclass
class Lists:
    ptr: Tensor
    col: Tensor
    slot: Tensor
    bits: Tensor
    counts: Tensor
    batch: int
    heads: int


def lists_of(keep: np.ndarray, padding: int = 0) -> Lists:
    """Lists of a (Bm, Hm, Lq, Lk) bool array; ``padding`` undefined entries are appended to each of them."""
    batch, heads, q_len, kv_len = keep.shape
    strips, cells = -(-q_len // CELL), -(-kv_len // CELL)
    ptr, col, slot, bits = [0], [], [], []
    for plane in keep.reshape(batch * heads, q_len, kv_len):
        for s in range(strips):
            rows = plane[s * CELL : (s + 1) * CELL]
            for c in range(cells):
                cell = rows[:, c * CELL : (c + 1) * CELL]
                if not cell.any():
                    continue
                col.append(c)
                if cell.all() and cell.shape[1] == CELL:
                    slot.append(-1)
                    continue
                slot.append(len(bits))
                words = np.zeros(CELL, dtype=np.uint16)
                words[: cell.shape[0]] = (cell * (1 << np.arange(cell.shape[1]))).sum(axis=1)
                bits.append(words.view(np.int16))
            ptr.append(len(col))
    counts = [len(col), len(bits), int(keep.sum()), 0]
    junk = [2**31 - 1] * padding  # an entry past the end that is followed reads far outside
    all_bits = np.array(bits, dtype=np.int16).reshape(-1, CELL)
    return Lists(
        torch.tensor(ptr, dtype=torch.int32),
        torch.tensor(col + junk, dtype=torch.int32),
        torch.tensor(slot + junk, dtype=torch.int32),
        torch.from_numpy(np.concatenate([all_bits, np.full((padding, CELL), -1, dtype=np.int16)])),
        torch.tensor(counts, dtype=torch.int64),
        batch,
        heads,
    )


def unpack_layout(layout: Sequence[Tensor], shape: tuple[int, int, int, int], q_tile: int) -> tuple[Tensor, list[int]]:
    """Dense mask of a (batch, heads, q_len, kv_len) shape and, per work item, its length, read out of CUDA's block-wise layout.

    By its documented meaning; csrc/attention/cuda/problem.h.
    """
    ptr, col, items, bits = (t.cpu() for t in layout[:4])
    planes, q_len, kv_len = shape[0] * shape[1], shape[2], shape[3]
    rows, cols = -(-q_len // q_tile) * q_tile, -(-kv_len // 16) * 16
    dense = torch.zeros(planes, rows, cols, dtype=torch.bool)
    lengths = []
    for item in items[: ptr[0]].tolist():
        tile, first, count, _, full, slot, plane, _, *runs = item
        lengths.append(count)
        if count:
            assert runs == col[first].tolist()
        for t in range(count):
            words = None if t < full else bits[slot + t - full].view(q_tile // 16, 32).to(torch.int64)
            for r, c in enumerate(col[first + t].tolist()):
                if c < 0:
                    assert words is None or not ((words >> (8 * r)) & 255).any()
                    continue
                part = dense[plane, tile * q_tile : (tile + 1) * q_tile, c * 16 : (c + 1) * 16]
                if words is None:
                    part[:] = True
                    continue
                for lane in range(32):
                    byte = (words[:, lane] >> (8 * r)) & 255
                    for e in range(8):
                        row, column = lane // 4 + 8 * (e // 2 % 2), 8 * (e // 4) + 2 * (lane % 4) + e % 2
                        part[row::16, column] |= (byte >> e & 1).bool()
    return dense[:, :q_len, :kv_len].view(shape), lengths


def list_lengths(layout: Sequence[Tensor]) -> list[int]:
    """Per work item of CUDA's block-wise layout the longest part of its list; the parts of a list must stand together."""
    items = layout[2][: int(layout[0][0])].tolist()
    lists = [[item[2] for item in parts] for _, parts in groupby(items, key=lambda item: (item[6], item[0]))]
    assert len(lists) == len({(item[6], item[0]) for item in items})
    return [max(parts) for parts in lists for _ in parts]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    bias: Tensor | None = None,
    scale: float = 1.0,
    plan: tuple[int, ...] = DEFAULT,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """The raw operator on these lists."""
    return raw.sparse_attention(
        *(q, k, v, bias, lists.ptr, lists.col, lists.slot, lists.bits, lists.counts),
        torch.tensor(plan, dtype=torch.int64),
        *(q.shape[2], k.shape[2], lists.batch, lists.heads, scale, return_lse),
    )


def reference(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Dense attention in float64; removed pairs never touch the result, whatever the bias says there."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(t.double().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = scale * (q @ k.mT)
    if bias is not None:
        scores = scores + torch.where(keep, bias.double(), 0.0)
    scores = scores.masked_fill(~keep, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse).unsqueeze(-1))
    return weights @ v, lse
