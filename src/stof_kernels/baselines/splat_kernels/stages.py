"""A mask on the device, and the three kernels as stages that know their tiles and launch themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..registry import Unsupported
from . import kernels
from .acsr import Acsr
from .tiling import RowBlocks, place_tiles, row_blocks

_PITCH = 8  # rows of values begin on 16-byte boundaries in half precision [I]; the port's follow each other without a gap [C]
_INDEX_LIMIT = 1 << 31  # the kernels address one plane of values with 32 bits
_MOST_PLANES = 65535  # batch entries times heads: CUDA's limit on the grid's second and third dimension


class Sddmm(NamedTuple):
    """Rows and columns of a tile, and warps."""

    rows: int
    columns: int
    warps: int


class Softmax(NamedTuple):
    """Rows per program, and warps."""

    rows: int
    warps: int


class Spmm(NamedTuple):
    """Rows of a tile, columns of the mask per step of its loop, and warps."""

    rows: int
    inner: int
    warps: int


class Stored:
    """One mask on the device: an ACSR of all rows, or, for ``rows`` alone or several ``pieces``, a union of ACSRs (ours).

    Values are (planes, rows, pitch), a plane being one head of one batch entry: entry j of a row at slot j, the pieces of a row
    one after the other. Raises `Unsupported` if a plane is too large.
    """

    def __init__(self, pieces: list[Acsr], device: str, rows: np.ndarray | None = None):
        self.pieces, self.rows, self.device = pieces, rows, device
        totals = np.sum([piece.count for piece in pieces], axis=0)
        seen = totals if rows is None else totals[rows]
        self.height, self.width = len(seen), int(seen.max(initial=0))
        self.pitch = max(_PITCH, -(-self.width // _PITCH) * _PITCH)
        if self.height * self.pitch >= _INDEX_LIMIT:
            raise Unsupported(f"{self.height} x {self.pitch} values per head, allowed: fewer than {_INDEX_LIMIT}")
        base = np.cumsum([np.zeros_like(totals), *(piece.count for piece in pieces[:-1])], axis=0)
        self.stride, self.offset, self.count = upload(
            device, *(np.stack([getattr(p, name) for p in pieces]) for name in ("stride", "offset", "count"))
        )
        self.base, self.total = upload(device, base, totals) if len(pieces) > 1 else (self.count, self.count)

    @property
    def union(self) -> bool:
        """Whether this is more than one ACSR of all rows."""
        return len(self.pieces) > 1 or self.rows is not None

    @cached_property
    def from_zero(self) -> bool:
        """Whether every row begins at column 0, as causal masks do: slot and column are then the same."""
        piece = self.pieces[0]
        return not (self.union or piece.offset.any() or (piece.stride != 1).any())

    def empty_values(self, planes: int, dtype: torch.dtype) -> Tensor:
        """Array for the values of all planes. Raises MemoryError, naming the size, if the device has no room for it."""
        if planes > _MOST_PLANES:
            raise Unsupported(f"{planes} batch entries times heads, allowed: up to {_MOST_PLANES}")
        try:
            return torch.empty(planes, self.height, self.pitch, dtype=dtype, device=self.device)
        except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
            if "memory" not in str(error).lower():
                raise
            size = planes * self.height * self.pitch * dtype.itemsize / 1e9
            raise MemoryError(
                f"out of memory: scores and probabilities, W = {self.width}, take {size:.1f} GB each"
            ) from None


def upload(device: str, *arrays: np.ndarray) -> list[Tensor]:
    """int32 copies of the arrays on the device, by one transfer, each on a 16-byte boundary (Triton compiles for that)."""
    flat = [np.pad(a.reshape(-1).astype(np.int32), (0, -a.size % 4)) for a in arrays]
    parts = torch.from_numpy(np.concatenate(flat)).to(device).split([a.size for a in flat])
    return [part[: a.size].view(a.shape) for part, a in zip(parts, arrays, strict=True)]


@dataclass(frozen=True)
class Job:
    """Tensors of a call: q, k, v (B, H, S, D) contiguous, two arrays of values, and the factor on the scores.

    ``simt``: products by float32 FMA on CUDA cores instead of Tensor Cores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    probs: Tensor
    scale: float
    simt: bool = False

    @property
    def planes(self) -> int:
        """Batch entries times heads."""
        return self.q.shape[0] * self.q.shape[1]


class SddmmStage:
    """R-SDDMM with its tiles."""

    def __init__(self, mask: Stored, config: Sddmm):
        self.mask, self.config = mask, config
        blocks = [row_blocks(piece, config.rows, mask.rows) for piece in mask.pieces]
        placed = [place_tiles(p, b, config.columns) for p, b in zip(mask.pieces, blocks, strict=True)]
        anchors = np.concatenate([np.pad(t.anchors, ((0, 0), (0, 1)), constant_values=i) for i, t in enumerate(placed)])
        self.tiles, self.naive, self.blocks = len(anchors), sum(tiles.naive for tiles in placed), blocks[0]
        # Anchors on a grid let whole vectors be stored, where slots are columns.
        align = math.gcd(16, *anchors[:, 1].tolist()) if mask.from_zero else 1
        self.flags = {**_flags(mask, blocks[0]), "BM": config.rows, "BN": config.columns, "ALIGN": align}
        self.anchors, self.map = upload(mask.device, anchors, _order(blocks[0]))

    def launch(self, job: Job) -> object:
        """Write the scores; returns the compiled kernel."""
        mask, (size, d) = self.mask, job.q.shape[2:]
        return kernels.sddmm[(self.tiles, job.planes)](
            job.q, job.k, job.scores, self.anchors, self.map, mask.stride, mask.offset, mask.count, mask.base,
            job.scale, size, self.blocks.positions, mask.height, mask.pitch // 8,
            D=d, BD=min(64, power_of_two(d)), SIMT=job.simt, **self.flags, num_warps=self.config.warps,
        )  # fmt: skip

    def __str__(self) -> str:
        way = f"poset, {self.naive} naive" if self.tiles < self.naive else "naive"
        return f"R-SDDMM {self.config.rows}x{self.config.columns}, {self.tiles} tiles ({way})"


class SoftmaxStage:
    """R-softmax."""

    def __init__(self, mask: Stored, config: Softmax):
        self.mask, self.config = mask, config
        (self.map,) = upload(mask.device, np.zeros(1) if mask.rows is None else mask.rows)

    def launch(self, job: Job) -> object:
        """Turn scores into probabilities; returns the compiled kernel."""
        mask, rows = self.mask, self.config.rows
        return kernels.softmax[(-(-mask.height // rows), job.planes)](
            job.scores, job.probs, mask.total, self.map, mask.height, mask.pitch // 8,
            BM=rows, BN=power_of_two(mask.width), GROUPED=mask.rows is not None, num_warps=self.config.warps,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"R-softmax {self.config.rows} rows"


class SpmmStage:
    """R-SpMM with the spans of its row blocks."""

    def __init__(self, mask: Stored, config: Spmm):
        self.mask, self.config = mask, config
        blocks = [row_blocks(piece, config.rows, mask.rows) for piece in mask.pieces]
        self.blocks, self.count = blocks[0], len(blocks[0].start)
        spans = [np.stack([getattr(b, name) for b in blocks]) for name in ("start", "end")]
        self.start, self.end, self.step, self.map = upload(mask.device, *spans, blocks[0].step, _order(blocks[0]))
        self.flags = {**_flags(mask, blocks[0]), "BM": config.rows, "BK": config.inner}

    def launch(self, job: Job, out: Tensor) -> object:
        """Write this mask's rows of ``out`` (B, H, S, D); returns the compiled kernel."""
        mask, (size, d) = self.mask, job.v.shape[2:]
        wide = min(128 if self.config.rows <= 32 else 64, power_of_two(d))
        return kernels.spmm[(-(-d // wide), self.count, job.planes)](
            job.probs, job.v, out, self.start, self.end, self.step, self.map, mask.offset, mask.count, mask.base,
            size, self.blocks.positions, mask.height, mask.pitch // 8, self.count,
            D=d, BD=wide, SIMT=job.simt, **self.flags, num_warps=self.config.warps,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"R-SpMM {self.config.rows}x{self.config.inner}"


def _order(blocks: RowBlocks) -> np.ndarray:
    return np.zeros(1) if blocks.order is None else blocks.order


def _flags(mask: Stored, blocks: RowBlocks) -> dict[str, bool | int]:
    return {
        "MAPPED": blocks.order is not None,
        "STRIDED": bool((blocks.step != 1).any()),
        "FROM_ZERO": mask.from_zero,
        "GROUPED": mask.rows is not None,
        "PIECES": len(mask.pieces),
    }


def power_of_two(n: int) -> int:
    """The next power of two from 16 on, the least that a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())
