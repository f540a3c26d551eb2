"""The masks that the authors' artifact (DOI 10.5281/zenodo.17705801) generates, which differ from the paper's text.

They form a second, named set with its own experiment (``mha_artifact``), so that its numbers can be set beside the published
ones without touching the paper's definitions. Parameters default to what the artifact's benchmarks pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from .drawing import hash32
from .families import SlidingWindow, band_bounds, require_int
from .pattern import Bounds, MaskMod, Pattern

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TILE = 32


@dataclass(frozen=True)
class ArtifactSlidingWindow(Pattern):
    """``abs(q - kv) <= w``, cut at the diagonal; for B > 1 the artifact's kernel got the two-sided band (``causal=False``)."""

    family: ClassVar[str] = "artifact_sliding_window"
    w: int = 64
    causal: bool = True

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """The band."""
        return SlidingWindow(self.w, self.causal).bind(q_len, kv_len, device)

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """The band."""
        return SlidingWindow(self.w, self.causal).bounds(q_len, kv_len, device)


@dataclass(frozen=True)
class ArtifactLongformer(Pattern):
    """Band plus two global strips of ``g`` tokens, at 0 and at S/2, as rows and as columns."""

    family: ClassVar[str] = "artifact_longformer"
    w: int = 32
    g: int = 32

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Band or a strip."""
        w, g, half_q, half_kv = self.w, self.g, q_len // 2, kv_len // 2

        def rule(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            strips = (q < g) | (kv < g) | ((q >= half_q) & (q < half_q + g)) | ((kv >= half_kv) & (kv < half_kv + g))
            return ((q - kv <= w) & (kv - q <= w)) | strips

        return rule

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Union of the band and the four strips."""
        band, g, half_q, half_kv = band_bounds(-self.w, self.w), self.g, q_len // 2, kv_len // 2

        def parts(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            maybe, full = band(q_lo, q_hi, kv_lo, kv_hi)
            for lo, hi, start in ((q_lo, q_hi, 0), (kv_lo, kv_hi, 0), (q_lo, q_hi, half_q), (kv_lo, kv_hi, half_kv)):
                maybe = maybe | ((lo < start + g) & (hi >= start))
                full = full | ((lo >= start) & (hi < start + g))
            return maybe, full

        return parts


@dataclass(frozen=True)
class ArtifactBigBird(Pattern):
    """Band, one global strip, and random cells in 32 x 32 tiles that always touch the diagonal band.

    Per tile row but the last one tile is picked beside the diagonal and int(1024 * fill) cells are drawn in it with
    replacement, at offsets 0 to 32 inclusive, so a cell can fall one past its tile. The artifact draws with a library
    generator; here the same distribution is drawn by an integer hash, so the kept share agrees and single cells do not.
    """

    family: ClassVar[str] = "artifact_bigbird"
    w: int = 32
    g: int = 32
    fill: float = 0.1
    seed: int = 0

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Band, strip or a look-up in the table of drawn cells around the diagonal."""
        w, g = self.w, self.g
        near = _near_diagonal_cells(q_len, kv_len, self.fill, self.seed).to(device)
        reach = near.shape[1] // 2

        def rule(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            distance = kv - q
            drawn = near[q, distance.clamp(-reach, reach) + reach] & (distance.abs() <= reach)
            return ((q - kv <= w) & (kv - q <= w)) | (q < g) | (kv < g) | drawn

        return rule

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Drawn cells lie within three tiles of the diagonal."""
        band, near, g = band_bounds(-self.w, self.w), band_bounds(-3 * _TILE, 3 * _TILE), self.g

        def parts(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            maybe, full = band(q_lo, q_hi, kv_lo, kv_hi)
            maybe = maybe | near(q_lo, q_hi, kv_lo, kv_hi)[0] | (q_lo < g) | (kv_lo < g)
            return maybe, full | (q_hi < g) | (kv_hi < g)

        return parts


@lru_cache(maxsize=16)
def _near_diagonal_cells(q_len: int, kv_len: int, fill: float, seed: int) -> Tensor:
    """Drawn cells as bool (q_len, 6 * 32 + 1): entry (q, d) says whether key q + d - 96 was drawn for query q."""
    import torch

    reach = 3 * _TILE
    near = torch.zeros(q_len, 2 * reach + 1, dtype=torch.bool)
    tiles = min(q_len, kv_len) // _TILE
    picked = max(0, tiles - 1)  # the last tile row gets none
    cells = int(_TILE * _TILE * fill)
    if not picked or not cells:
        return near
    row = torch.arange(picked)
    shift = hash32(seed, row) % 3 - 1
    shift[0] = hash32(seed, row[:1])[0] % 2  # the first row has no tile before the diagonal
    if picked > 1:
        shift[-1] = -(hash32(seed, row[-1:])[0] % 2)
    draw = hash32(seed + 1, torch.arange(picked * cells * 2)).view(picked, cells, 2) % (_TILE + 1)
    q = row[:, None] * _TILE + draw[..., 0]
    kv = (row + shift)[:, None] * _TILE + draw[..., 1]
    inside = (q < q_len) & (kv < kv_len)
    near[q[inside], (kv - q)[inside] + reach] = True
    return near


@dataclass(frozen=True)
class ArtifactDilated(Pattern):
    """Keys ``q - w - d, q - w - d + (d + 1), ...`` up to the query; the artifact generates it, no figure uses it."""

    family: ClassVar[str] = "artifact_dilated"
    w: int = 64
    d: int = 1

    def __post_init__(self):
        require_int(self.family, "w", self.w, 0)
        require_int(self.family, "d", self.d, 0)

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Causal band and residue."""
        reach, step = self.w + self.d, self.d + 1
        return lambda b, h, q, kv: (kv <= q) & (q - kv <= reach) & ((kv - q + reach) % step == 0)

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """The band; nothing is called full."""
        band = band_bounds(0, self.w + self.d)

        def parts(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            maybe, _ = band(q_lo, q_hi, kv_lo, kv_hi)
            return maybe, maybe & False

        return parts


def artifact_sliding_window(w: int = 64, causal: bool = True) -> ArtifactSlidingWindow:
    """The artifact's sliding window: w follows its tile size, 64 in the figures."""
    return ArtifactSlidingWindow(w, causal)


def artifact_longformer(w: int = 32, g: int = 32) -> ArtifactLongformer:
    """The artifact's Longformer with strips at 0 and S/2."""
    return ArtifactLongformer(w, g)


def artifact_bigbird(w: int = 32, g: int = 32, fill: float = 0.1, seed: int = 0) -> ArtifactBigBird:
    """The artifact's BigBird with random cells beside the diagonal."""
    return ArtifactBigBird(w, g, fill, seed)


def artifact_dilated(w: int = 64, d: int = 1) -> ArtifactDilated:
    """The artifact's dilated window."""
    return ArtifactDilated(w, d)
