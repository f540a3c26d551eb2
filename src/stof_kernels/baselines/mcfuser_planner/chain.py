"""What is fused: two matrix products C = A B and E = f(C) D with an elementwise step or a softmax on C between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

LOOPS = "mnkh"
INDICES = {"A": "mk", "B": "kn", "M": "mn", "C": "mn", "D": "nh", "E": "mh"}
"""Loops that index each tensor; ``M`` is the additive mask of attention. ``k`` is the reduction of C, ``n`` that of E."""

STEPS = ("none", "relu", "gelu", "softmax", "softmax_exp")
"""What may stand between the products; ``softmax_exp`` takes exponentials without subtracting the row's maximum."""


@dataclass(frozen=True)
class Chain:
    """``batch`` independent chains of A (m, k), B (k, n), D (n, h), E (m, h), elements of ``element_bytes``.

    ``mask``: a tile of an (m, n) tensor is loaded and added to C before the softmax.
    """

    m: int
    n: int
    k: int
    h: int
    batch: int = 1
    step: str = "none"
    mask: bool = False
    element_bytes: int = 2

    def __post_init__(self) -> None:
        for name in (*LOOPS, "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"chain: {name} is {value!r}, allowed: an integer >= 1")
        if self.step not in STEPS:
            raise ValueError(f"chain: step is {self.step!r}, allowed: {', '.join(STEPS)}")
        if self.mask and not self.softmax:
            raise ValueError(f"chain: a mask with step {self.step!r}, allowed: softmax, softmax_exp")

    @property
    def softmax(self) -> bool:
        """Whether the step is a softmax over n."""
        return self.step.startswith("softmax")

    def length(self, loop: str) -> int:
        """Length of a dimension."""
        return getattr(self, loop)

    def intensity(self) -> float:
        """FLOP per byte of the first product if every tensor moves once: 2 m n k / (bytes of A, B and C). [inferred]"""
        moved = self.m * self.k + self.k * self.n + self.m * self.n
        return 2 * self.m * self.n * self.k / (self.element_bytes * moved)


def attention_chain(
    batch: int, heads: int, q_len: int, kv_len: int, head_dim: int, mask: bool = True, step: str = "softmax"
) -> Chain:
    """Attention as a chain: m = q_len, n = kv_len, k = h = head_dim, one chain per batch entry and head."""
    return Chain(q_len, kv_len, head_dim, head_dim, batch * heads, step, mask)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the four loops."""

    m: int
    n: int
    k: int
    h: int

    def __str__(self) -> str:
        return "x".join(str(getattr(self, f.name)) for f in fields(self))

    def size(self, loop: str) -> int:
        """Tile size of a loop."""
        return getattr(self, loop)

    def elements(self, tensor: str) -> int:
        """Elements of one tile of a tensor."""
        return math.prod(self.size(loop) for loop in INDICES[tensor])

    def extents(self, chain: Chain) -> dict[str, int]:
        """Tiles per dimension: how often each cross-tile loop runs."""
        return {loop: -(-chain.length(loop) // self.size(loop)) for loop in LOOPS}


@dataclass(frozen=True)
class Peaks:
    """What the model and the rules know of a device.

    ``bytes_per_s`` and ``flops_per_s`` (half-precision matrix products, float32 accumulation, dense) are the vendor's peaks.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float
    units: int
    shared_bytes: int

    @cached_property
    def balance(self) -> float:
        """FLOP per byte above which an operator is bound by arithmetic."""
        return self.flops_per_s / self.bytes_per_s


# Peaks from the vendor's data sheets; a name that is no whole product name is the 40 GB A100 and the SXM H100 and H200.
_KB = 1024
KNOWN = (
    Peaks("NVIDIA A100", 1.555e12, 312e12, 108, 164 * _KB),
    Peaks("NVIDIA A100 80GB PCIe", 1.935e12, 312e12, 108, 164 * _KB),
    Peaks("NVIDIA A100-SXM4-80GB", 2.039e12, 312e12, 108, 164 * _KB),
    Peaks("NVIDIA GeForce RTX 4090", 1.008e12, 165.2e12, 128, 100 * _KB),
    Peaks("NVIDIA H100", 3.35e12, 989.4e12, 132, 228 * _KB),
    Peaks("NVIDIA H200", 4.8e12, 989.4e12, 132, 228 * _KB),
)


def known_peaks(name: str) -> Peaks | None:
    """The entry with the longest name that a driver's name starts with."""
    return max((p for p in KNOWN if name.startswith(p.name)), key=lambda p: len(p.name), default=None)


def memory_bound(chain: Chain, peaks: Peaks) -> bool:
    """Whether fusing can pay: the first product moves more bytes than its FLOP can hide (short reduction).

    The published test compares the FLOP per byte of a product with the device's ratio of peaks [paper]; we take the whole
    product with every tensor moved once, which leaves no tile to choose [inferred].
    """
    return chain.intensity() < peaks.balance
