"""The problem as numbers: what the planner may look at. No tensors, no torch."""

from __future__ import annotations

from dataclasses import dataclass

CELL = 16
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class TileStats:
    """A mask packed into key tiles of 64 keys (four runs of 16) for one query tile, summed over its planes."""

    q_tile: int
    key_tiles: int
    longest: int
    """Key tiles of the longest query tile."""


@dataclass(frozen=True)
class MaskStats:
    """Size of a mask in cells of 16 x 16 positions, summed over its planes."""

    cells: int
    """Non-empty cells."""
    partial: int
    """Those of them that are not full."""
    kept: int
    """Kept (query, key) positions."""
    strips: int
    """Strips of 16 queries."""
    cols: int
    """Cells along the keys of one strip."""
    planes: int
    """Batch entries times heads that have a mask of their own; 1 where all share one."""
    tiles: tuple[TileStats, ...] = ()
    """For each query tile of the CUDA block-wise kernel; empty on the CPU."""

    def tiled(self, q_tile: int) -> TileStats:
        """Tile statistics for that query tile; KeyError if there are none."""
        return {t.q_tile: t for t in self.tiles}[q_tile]

    def __str__(self) -> str:
        possible = self.strips * self.cols
        share = self.cells / possible if possible else 0.0
        partial = self.partial / self.cells if self.cells else 0.0
        return f"{self.cells} cells listed ({share:.1%} of all, {partial:.0%} of them partial), {self.planes} plane(s)"


@dataclass(frozen=True)
class AttentionProblem:
    """One call of sparse attention: sizes, dtype and the mask's statistics."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str
    mask: MaskStats

    @property
    def repeats(self) -> float:
        """How often each plane of the mask is worked through: heads of all batch entries over planes."""
        return self.batch * self.heads / self.mask.planes

    @property
    def head_dim_padded(self) -> int:
        """Head dimension inside a kernel: the next of 32, 64, 96, 128, 192, 256."""
        return next(d for d in (32, 64, 96, 128, 192, 256) if d >= self.head_dim)

    def __str__(self) -> str:
        return (
            f"B={self.batch} Hq={self.heads} Hkv={self.kv_heads} Lq={self.q_len} Lk={self.kv_len} "
            f"D={self.head_dim} {self.dtype}; {self.mask}"
        )
