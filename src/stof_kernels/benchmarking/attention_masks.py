"""Masks as a config gives them: a family, or a family with parameters of its own; and the mask that differs per head.

No torch while importing: Snakemake reads this while it parses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from stof_kernels import masks
from stof_kernels.masks import Pattern
from stof_kernels.masks.drawing import hash32
from stof_kernels.masks.families import require_int, require_share

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stof_kernels.masks import MaskMod

HEAD_BLOCKS = "head_blocks"
FAMILIES: tuple[str, ...] = (*masks.FAMILIES, HEAD_BLOCKS)
"""What an entry can name: the registry of masks, and the mask of this module."""

_BLOCK, _FILL = 64, 0.1


class MaskError(ValueError):
    """An entry that is no mask. The message is one line: the entry, what is wrong, what is allowed."""


@dataclass(frozen=True)
class HeadBlocks(Pattern):
    """Another choice of whole blocks for every head: of each row of blocks the ``fill`` share with the highest scores.

    Scores are random, an integer hash of (seed, head, block), so this is what a front end that estimates block scores and keeps
    the top k hands over (at least one block of each row), without its estimate. The batch entries share their masks.
    """

    family: ClassVar[str] = HEAD_BLOCKS
    per_head: ClassVar[bool] = True
    heads: int
    block: int = _BLOCK
    fill: float = _FILL
    seed: int = 0

    def __post_init__(self):
        for name, low in (("heads", 1), ("block", 1), ("seed", 0)):
            require_int(self.family, name, getattr(self, name), low)
        require_share(self.family, "fill", self.fill)

    def table(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Tensor:
        """Bool (heads, ceil(q_len/block), ceil(kv_len/block)) on ``device``: which blocks are kept."""
        return _head_table(self.heads, q_len, kv_len, self.block, self.fill, self.seed).to(device)

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """A look-up in the table of kept blocks."""
        table, block = self.table(q_len, kv_len, device), self.block
        return lambda b, h, q, kv: table[h, q // block, kv // block]


@lru_cache(maxsize=8)
def _head_table(heads: int, q_len: int, kv_len: int, block: int, fill: float, seed: int) -> Tensor:
    import torch

    rows, cols = -(-q_len // block), -(-kv_len // block)
    index = torch.arange(heads * rows * cols, dtype=torch.int64)
    # Hash and index together are unique, so the order never depends on how ties are sorted.
    score = ((hash32(seed, index) >> 1) << 32 | index).view(heads, rows, cols)
    best = score.argsort(dim=-1, descending=True)[..., : max(1, round(fill * cols))]
    return torch.zeros(heads, rows, cols, dtype=torch.bool).scatter_(-1, best, True)


@dataclass(frozen=True)
class MaskEntry:
    """One entry of a list of masks: the family's mask at a length, with the ``given`` parameters instead of its own."""

    family: str
    given: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """``causal`` or ``sliding_window(w=1024)``: how cells are called."""
        inside = ",".join(f"{name}={_short(value)}" for name, value in self.given)
        return f"{self.family}({inside})" if inside else self.family

    def at(self, seq_len: int, heads: int = 1) -> Pattern:
        """The mask for ``seq_len`` queries and keys and, where it differs per head, ``heads`` heads; MaskError otherwise."""
        own = HeadBlocks(heads) if self.family == HEAD_BLOCKS else masks.get(self.family, seq_len)
        known = [f.name for f in fields(own) if f.name not in ("heads", "lengths")]  # type: ignore[arg-type]
        for name, _ in self.given:
            if name not in known:
                allowed = ", ".join(known) or "none"
                raise MaskError(f"mask {self.label}: parameter {name!r} is unknown, allowed: {allowed}")
        try:
            return replace(own, **dict(self.given))  # type: ignore[type-var]
        except (TypeError, ValueError) as error:
            raise MaskError(f"mask {self.label}: {error}") from None


def parse_mask(value: object) -> MaskEntry:
    """Entry of a config's list: a family's name, or a mapping of ``family`` and parameters; MaskError for anything else."""
    given = dict(value) if isinstance(value, Mapping) else {"family": value}
    family = given.pop("family", None)
    if family not in FAMILIES:
        raise MaskError(f"mask {family!r} is unknown, allowed: {', '.join(FAMILIES)}")
    entry = MaskEntry(family, tuple(given.items()))
    entry.at(_BLOCK)
    return entry


def _short(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
