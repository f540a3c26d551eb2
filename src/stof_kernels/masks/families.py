"""The named patterns: the four of the paper's figures and the ones beyond them.

Definitions of the paper's four: STOF, PPoPP '26 (doi 10.1145/3774934.3786434), Table 2, with band width and global
width round(sqrt(S)). BigBird's random part follows Zaheer et al. 2020: blocks anywhere in the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .drawing import block_table, rectangle_counts
from .pattern import Bounds, MaskMod, Pattern

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def require_int(owner: str, name: str, value: object, low: int | None) -> int:
    """``value`` as an int of at least ``low``, or one clear error."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} is {value!r} ({type(value).__name__}), allowed: an integer")
    if low is not None and value < low:
        raise ValueError(f"{owner}: {name} is {value}, allowed: an integer >= {low}")
    return value


def require_share(owner: str, name: str, value: object) -> float:
    """``value`` as a number from 0 to 1, or one clear error."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} is {value!r} ({type(value).__name__}), allowed: a share from 0 to 1")
    if not 0 <= value <= 1:
        raise ValueError(f"{owner}: {name} is {value}, allowed: a share from 0 to 1")
    return float(value)


def band_bounds(low: int, high: int) -> Bounds:
    """Rectangle test of ``low <= q - kv <= high``."""

    def band(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
        smallest, largest = q_lo - kv_hi, q_hi - kv_lo
        return (smallest <= high) & (largest >= low), (smallest >= low) & (largest <= high)

    return band


@dataclass(frozen=True)
class Full(Pattern):
    """Every query attends to every key."""

    family: ClassVar[str] = "full"

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """True everywhere."""
        return lambda b, h, q, kv: (q >= 0) & (kv >= 0)

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Full everywhere."""

        def everything(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            inside = (q_lo <= q_hi) & (kv_lo <= kv_hi)
            return inside, inside

        return everything


@dataclass(frozen=True)
class Causal(Pattern):
    """``kv <= q + offset``, aligned top left as in torch's SDPA; ``offset = Lk - Lq`` is for decoding."""

    family: ClassVar[str] = "causal"
    offset: int = 0

    def __post_init__(self):
        require_int("causal", "offset", self.offset, None)

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """``kv <= q + offset``."""
        return lambda b, h, q, kv: kv <= q + self.offset

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Band with an open lower side."""
        return band_bounds(-self.offset, q_len + kv_len + abs(self.offset))


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """``abs(q - kv) <= w``; with ``causal`` only the keys at or before the query."""

    family: ClassVar[str] = "sliding_window"
    w: int
    causal: bool = False

    def __post_init__(self):
        require_int("sliding_window", "w", self.w, 0)

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """The band."""
        if self.causal:
            return lambda b, h, q, kv: (q - kv <= self.w) & (kv <= q)
        return lambda b, h, q, kv: (q - kv <= self.w) & (kv - q <= self.w)

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """The band."""
        return band_bounds(0 if self.causal else -self.w, self.w)


@dataclass(frozen=True)
class Longformer(Pattern):
    """Sliding window plus global tokens: ``abs(q - kv) <= w or q < g or kv < g``."""

    family: ClassVar[str] = "longformer"
    w: int
    g: int

    def __post_init__(self):
        require_int(self.family, "w", self.w, 0)
        require_int(self.family, "g", self.g, 0)

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Band or global row or global column."""
        w, g = self.w, self.g
        return lambda b, h, q, kv: ((q - kv <= w) & (kv - q <= w)) | (q < g) | (kv < g)

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Union of the three parts."""
        band, g = band_bounds(-self.w, self.w), self.g

        def parts(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            maybe, full = band(q_lo, q_hi, kv_lo, kv_hi)
            return maybe | (q_lo < g) | (kv_lo < g), full | (q_hi < g) | (kv_hi < g)

        return parts


@dataclass(frozen=True)
class RandomBlocks(Pattern):
    """Random blocks alone: ``max(1, round(fill * n_blocks))`` of all ``block`` x ``block`` squares, drawn by hash.

    Blocks are drawn without replacement, those with the smallest integer hash of (seed, block index): the same on every device
    and version. ``block=1`` scatters single positions, a large block clusters them: the ends that a planner must tell apart.
    """

    family: ClassVar[str] = "random_blocks"
    block: int
    fill: float
    seed: int = 0

    def __post_init__(self):
        require_int(self.family, "block", self.block, 1)
        require_int(self.family, "seed", self.seed, 0)
        require_share(self.family, "fill", self.fill)

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """A look-up in the table of drawn blocks."""
        table, block = block_table(q_len, kv_len, self.block, self.fill, self.seed).to(device), self.block
        return lambda b, h, q, kv: table[q // block, kv // block]

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """A count of drawn blocks in the rectangle, from a summed-area table."""
        count = rectangle_counts(block_table(q_len, kv_len, self.block, self.fill, self.seed).to(device))
        block = self.block

        def parts(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            drawn, covered = count(q_lo // block, q_hi // block, kv_lo // block, kv_hi // block)
            return drawn > 0, drawn == covered

        return parts


@dataclass(frozen=True)
class BigBird(Pattern):
    """Longformer plus random blocks: exactly ``max(1, round(fill * n_blocks))`` of all blocks of the matrix.

    Blocks are ``block`` x ``block`` positions, drawn without replacement by an integer hash of (seed, block index), so the
    draw is the same on every device and version. Drawn blocks may coincide with the band or the global strips.
    """

    family: ClassVar[str] = "bigbird"
    w: int
    g: int
    block: int = 64
    fill: float = 0.1
    seed: int = 0

    def __post_init__(self):
        for name, low in (("w", 0), ("g", 0), ("block", 1), ("seed", 0)):
            require_int(self.family, name, getattr(self, name), low)
        require_share(self.family, "fill", self.fill)

    @property
    def _union(self) -> Pattern:
        return Longformer(self.w, self.g) | RandomBlocks(self.block, self.fill, self.seed)

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Longformer's predicate or a look-up in the table of drawn blocks."""
        return self._union.bind(q_len, kv_len, device)

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Longformer's test or that of the random blocks."""
        return self._union.bounds(q_len, kv_len, device)


@dataclass(frozen=True)
class Dilated(Pattern):
    """Dilated window: ``w`` keys on each side, ``dilation`` apart; with ``causal`` only those at or before the query."""

    family: ClassVar[str] = "dilated"
    w: int
    dilation: int = 2
    causal: bool = False

    def __post_init__(self):
        require_int("dilated", "w", self.w, 0)
        require_int("dilated", "dilation", self.dilation, 1)

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Band and residue."""
        band = SlidingWindow(self.w * self.dilation, self.causal).bind(q_len, kv_len, device)
        return lambda b, h, q, kv: band(b, h, q, kv) & ((q - kv) % self.dilation == 0)

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """The band says where something may be; a rectangle is full only without dilation or at a single kept position."""
        band = SlidingWindow(self.w * self.dilation, self.causal).bounds(q_len, kv_len, device)

        def parts(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            maybe, full = band(q_lo, q_hi, kv_lo, kv_hi)
            return maybe, full if self.dilation == 1 else full & ~maybe

        return parts


@dataclass(frozen=True)
class Strided(Pattern):
    """Strided pattern of Child et al. 2019: the last ``stride`` keys and every ``stride``-th key before them; causal."""

    family: ClassVar[str] = "strided"
    stride: int

    def __post_init__(self):
        require_int("strided", "stride", self.stride, 1)

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Near keys or keys a multiple of the stride away."""
        stride = self.stride
        return lambda b, h, q, kv: (kv <= q) & ((q - kv < stride) | ((q - kv) % stride == 0))

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Full in the near band; beyond it, empty where no multiple of the stride falls between the distances."""
        stride = self.stride

        def parts(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            smallest, largest = (q_lo - kv_hi).clamp(min=0), q_hi - kv_lo
            has_multiple = largest // stride * stride >= smallest
            full = (q_lo >= kv_hi) & ((largest < stride) if stride > 1 else (largest >= 0))
            return (largest >= 0) & ((smallest < stride) | has_multiple), full

        return parts


@dataclass(frozen=True)
class PrefixLM(Pattern):
    """Causal, and the first ``prefix`` keys are seen by every query."""

    family: ClassVar[str] = "prefix_lm"
    prefix: int

    def __post_init__(self):
        require_int("prefix_lm", "prefix", self.prefix, 0)

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Prefix or causal."""
        return lambda b, h, q, kv: (kv < self.prefix) | (kv <= q)

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Union of both."""

        def parts(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            return (kv_lo < self.prefix) | (kv_lo <= q_hi), (kv_hi < self.prefix) | (kv_hi <= q_lo)

        return parts


@dataclass(frozen=True)
class Document(Pattern):
    """Packed sequences: positions attend inside their own document of ``lengths``; with ``causal`` not to later keys.

    Queries and keys share the packing, so the lengths add up to both ``q_len`` and ``kv_len``.
    """

    family: ClassVar[str] = "document"
    lengths: tuple[int, ...]
    causal: bool = False

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(self.lengths))
        for n in self.lengths:
            require_int("document", "lengths", n, 1)

    def _ids(self, q_len: int, kv_len: int, device: torch.device | str) -> Tensor:
        import torch

        total = sum(self.lengths)
        if total != q_len or total != kv_len:
            raise ValueError(
                f"document: lengths add up to {total}, allowed: q_len and kv_len, here {q_len} and {kv_len}"
            )
        counts = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.lengths)), counts).to(device)

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Same document, by a look-up of each position's document."""
        ids = self._ids(q_len, kv_len, device)
        if self.causal:
            return lambda b, h, q, kv: (ids[q] == ids[kv]) & (kv <= q)
        return lambda b, h, q, kv: ids[q] == ids[kv]

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Documents are contiguous, so the ends of a range tell which documents it meets."""
        ids = self._ids(q_len, kv_len, device)

        def parts(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            maybe = (ids[q_lo] <= ids[kv_hi]) & (ids[kv_lo] <= ids[q_hi])
            full = (ids[q_lo] == ids[kv_hi]) & (ids[kv_lo] == ids[q_hi])
            return (maybe & (kv_lo <= q_hi), full & (kv_hi <= q_lo)) if self.causal else (maybe, full)

        return parts


def full() -> Full:
    """Every query attends to every key."""
    return Full()


def causal(offset: int = 0) -> Causal:
    """``kv <= q + offset``; top-left aligned like torch's SDPA, use ``offset=Lk-Lq`` when decoding."""
    return Causal(offset)


def sliding_window(w: int, causal: bool = False) -> SlidingWindow:
    """``abs(q - kv) <= w``, optionally only keys at or before the query."""
    return SlidingWindow(w, causal)


def longformer(w: int, g: int) -> Longformer:
    """``abs(q - kv) <= w or q < g or kv < g``."""
    return Longformer(w, g)


def bigbird(w: int, g: int, block: int = 64, fill: float = 0.1, seed: int = 0) -> BigBird:
    """Longformer's rule plus ``max(1, round(fill * n_blocks))`` random blocks drawn without replacement."""
    return BigBird(w, g, block, fill, seed)


def random_blocks(block: int, fill: float, seed: int = 0) -> RandomBlocks:
    """``max(1, round(fill * n_blocks))`` random ``block`` x ``block`` squares and nothing else."""
    return RandomBlocks(block, fill, seed)


def dilated(w: int, dilation: int = 2, causal: bool = False) -> Dilated:
    """``w`` keys on each side, ``dilation`` positions apart."""
    return Dilated(w, dilation, causal)


def strided(stride: int) -> Strided:
    """The last ``stride`` keys and every ``stride``-th one before; causal (Child et al. 2019)."""
    return Strided(stride)


def prefix_lm(prefix: int) -> PrefixLM:
    """Causal with a bidirectional prefix of ``prefix`` keys."""
    return PrefixLM(prefix)


def document(lengths: tuple[int, ...] | list[int], causal: bool = False) -> Document:
    """Packed sequences of the given lengths, each attending only to itself."""
    return Document(tuple(lengths), causal)
