"""From every candidate to those worth a prediction: the four published rules in their order, and what Triton needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .chain import LOOPS, Chain, Peaks, Tiles
from .expressions import Expression, all_expressions
from .program import Program, build

GRAIN = 16
"""Tile sizes are multiples of it, the edge of a Tensor Core operand. [paper]"""
PADDING = 0.05
"""Most that tiles may add to a dimension that is no power of two. [inferred]"""
SHARED_SLACK = 1.2
"""Estimates of shared memory may exceed the limit by this factor, because the compiler reuses buffers. [paper]"""
MOST_WARPS = 8
ACCUMULATORS = 192
"""Most float32 accumulators per thread of 255 registers. [ours]"""


@dataclass(frozen=True)
class Candidate:
    """An expression with tile sizes, for one chain."""

    expression: Expression
    tiles: Tiles
    chain: Chain

    def __str__(self) -> str:
        return f"{self.expression} {self.tiles}"

    @cached_property
    def program(self) -> Program:
        """What one block runs."""
        return build(self.expression, self.tiles.extents(self.chain), self.chain.step != "none", self.chain.mask)

    @cached_property
    def key(self) -> str:
        """Candidates of one key are the same kernel."""
        return f"{self.program} {self.tiles}"


def deduplicated(expressions: Iterable[Expression] | None = None) -> list[Expression]:
    """Rule 1: one expression for each per-block program after spatial loops are bound to blocks; 26 become 5. [paper]

    Of equals the flat one stands for all, else the first in the order m, h, n, k.
    """
    ranked = sorted(expressions or all_expressions(), key=lambda e: (not e.flat, ["mhnk".index(c) for c in e.order]))
    found: dict[str, Expression] = {}
    for expression in ranked:
        found.setdefault(str(build(expression)), expression)
    return list(found.values())


def without_partial_tiles(expressions: Iterable[Expression]) -> list[Expression]:
    """Rule 2: drop expressions that keep several partial tiles of C on chip (its reduction is outside n); 5 become 3.

    The rule is published, which expressions it leaves is not. Several tiles of E (flat expressions) stay allowed. [inferred]
    """
    return [e for e in expressions if not build(e).partial_tiles("C")]


def padded(length: int) -> int:
    """A dimension rounded up to the grain: what tensors are padded to."""
    return -(-length // GRAIN) * GRAIN


def every_tile(length: int) -> list[int]:
    """All tile sizes of a dimension: 16, 32, 48, ... up to it."""
    return list(range(GRAIN, padded(length) + 1, GRAIN))


def tiles_with_little_padding(length: int, threshold: float = PADDING, powers: bool = True) -> list[int]:
    """Rule 3: powers of two are cut by powers of two (if ``powers``), others with at most ``threshold`` of padding. [paper]"""
    whole = padded(length)
    if powers and is_power(whole):
        return [tile for tile in every_tile(length) if is_power(tile)]
    return [tile for tile in every_tile(length) if -(-whole // tile) * tile / whole - 1 <= threshold]


def is_power(n: int) -> bool:
    """Whether n is a power of two."""
    return n & (n - 1) == 0


def shared_estimate(tiles: Tiles, element_bytes: int = 2) -> int:
    """Bytes of one tile of each tensor, the published estimate of a block's shared memory. [paper]"""
    return element_bytes * sum(tiles.elements(tensor) for tensor in "ABCDE")


def fits_shared(tiles: Tiles, limit: int, element_bytes: int = 2) -> bool:
    """Rule 4: the estimate is within 1.2 times the shared memory of a multiprocessor. [paper]"""
    return shared_estimate(tiles, element_bytes) <= SHARED_SLACK * limit


def accumulators(candidate: Candidate, warps: int = MOST_WARPS) -> float:
    """float32 accumulators per thread: all tiles of C and E that a block holds at once."""
    held = sum(candidate.tiles.elements(x) * candidate.program.tiles_on_chip(x) for x in "CE")
    return held / (32 * warps)


def buildable_tiles(length: int, threshold: float = PADDING) -> list[int]:
    """What rule 3 leaves and Triton can build: its tiles are powers of two. [ours]"""
    return [tile for tile in tiles_with_little_padding(length, threshold) if is_power(tile)]


def can_be_built(candidate: Candidate) -> bool:
    """Tiles that Triton can build, and accumulators that fit the registers of 8 warps. [ours]

    The second saves compiling kernels that would spill; it can only help the method.
    """
    return all(is_power(candidate.tiles.size(loop)) for loop in LOOPS) and accumulators(candidate) <= ACCUMULATORS


@dataclass(frozen=True)
class Count:
    """How many expressions and candidates are left after a rule."""

    rule: str
    expressions: int
    candidates: int


def space_of(chain: Chain, peaks: Peaks, threshold: float = PADDING) -> list[Candidate]:
    """Candidates that survive every rule and can be built."""
    sizes = [buildable_tiles(chain.length(loop), threshold) for loop in LOOPS]
    expressions = without_partial_tiles(deduplicated())
    return [c for c in _after_shared(chain, peaks, expressions, sizes) if can_be_built(c)]


def counts(chain: Chain, peaks: Peaks, threshold: float = PADDING, powers: bool = True) -> list[Count]:
    """Expressions and candidates before any rule and after each."""
    everything = math.prod(len(every_tile(chain.length(loop))) for loop in LOOPS)
    all_of, unique = all_expressions(), deduplicated()
    left = without_partial_tiles(unique)
    sizes = [tiles_with_little_padding(chain.length(loop), threshold, powers) for loop in LOOPS]
    little = math.prod(map(len, sizes))
    shared = list(_after_shared(chain, peaks, left, sizes))
    built = [c for c in shared if can_be_built(c)]
    return [
        Count("all", len(all_of), len(all_of) * everything),
        Count("1 deduplicate", len(unique), len(unique) * everything),
        Count("2 partial tiles", len(left), len(left) * everything),
        Count("3 padding", len(left), len(left) * little),
        Count("4 shared memory", len(left), len(shared)),
        Count("buildable", len({str(c.expression) for c in built}), len(built)),
    ]


def _after_shared(
    chain: Chain, peaks: Peaks, expressions: Sequence[Expression], sizes: Sequence[Sequence[int]]
) -> Iterator[Candidate]:
    for tiles in itertools.starmap(Tiles, itertools.product(*sizes)):
        if fits_shared(tiles, peaks.shared_bytes, chain.element_bytes):
            for expression in expressions:
                yield Candidate(expression, tiles, chain)
