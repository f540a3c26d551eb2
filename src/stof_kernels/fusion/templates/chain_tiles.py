"""Settings of two products in a row whose inner width is cut into parts: a rough roofline of one block orders them.

A block keeps its rows of a part of the inner activation and stores float32 sums of its share of the result, which a second
pass reads again. Fewer parts mean fewer sums and longer blocks. Rates are those of `tiles`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .base import Setting, setting
from .tiles import BYTES_PER_US, FLOP_PER_US, LATENCY_US, Device, power_of_two

_MEMORY_BYTES_PER_US, _CACHED = 4.3e6, 40e6  # of an H200, and what its L2 cache keeps of partial results
_REGISTERS = 168  # of a thread by the estimate of `_Tile.registers`; Triton 3.6's kernels spill from 176 on
_MOST_PARTS, _WASTE = 64, 1.15  # parts, and their width together by the inner width


@dataclass(frozen=True)
class Chain:
    """Two products of so many ``rows``: ``count`` of ``depth`` to ``inner`` columns, then one to ``columns``.

    ``size`` is the bytes of an operand's element.
    """

    rows: int
    depth: int
    inner: int
    columns: int
    count: int
    size: int

    def settings(self, device: Device, most: int = 8) -> list[Setting]:
        """The best guesses, best first; none where the inner width is too small to be cut.

        BM rows, ``slices`` of BH inner columns a part, BN columns of the result at a time, BK deep steps.
        """
        ranked: dict[tuple[int, int], tuple[float, Setting]] = {}
        for m, width, slices in itertools.product((16, 32, 64, 128), (16, 32, 64, 128, 256), (4, 3, 2, 1)):
            tile = _Tile(self, m, width, slices)
            stages = tile.stages(device)
            if tile.fits and stages >= 2 and tile.registers <= _REGISTERS:
                # Of one part's width the widest slices come last: they read the rows least often.
                ranked[m, tile.span] = tile.cost(device), tile.setting(stages)
        if not ranked and self.inner > 16:
            least = {"BM": 16, "BH": 16, "slices": 1, "BN": 16, "BK": 16, "warps": 4, "stages": 2}
            return [setting(parts=-(-self.inner // 16), **least)]
        return [found for _, found in sorted(ranked.values())[:most]]

    @property
    def step(self) -> int:
        """Depth of a step of the first products."""
        return next((s for s in (64, 32, 16) if self.depth % s == 0), min(64, power_of_two(self.depth)))


@dataclass(frozen=True)
class _Tile:
    """What a block takes: ``m`` rows, ``slices`` of ``width`` inner columns."""

    chain: Chain
    m: int
    width: int
    slices: int

    @property
    def span(self) -> int:
        """Inner columns of a part."""
        return self.width * self.slices

    @property
    def parts(self) -> int:
        """Parts of the inner width."""
        return -(-self.chain.inner // self.span)

    @property
    def fits(self) -> bool:
        """Whether it is no taller than the rows and cuts the inner width into a sensible number of parts."""
        few = 2 <= self.parts <= _MOST_PARTS and self.parts * self.span <= _WASTE * self.chain.inner
        return few and self.m <= max(16, power_of_two(self.chain.rows))

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return 8 if self.m == 128 or self.m * self.width * self.chain.count > 64 * 128 else 4

    @property
    def wide(self) -> int:
        """Columns of the result at a time."""
        return min(128 if self.span <= 256 else 64, power_of_two(self.chain.columns))

    @property
    def stage(self) -> int:
        """Bytes of one step's operands, of the product that needs more."""
        first = (self.m + self.chain.count * self.width) * self.chain.step
        return max(first, self.span * self.wide) * self.chain.size

    @property
    def held(self) -> tuple[int, int]:
        """Bytes of the inner activation in registers, where each warp has rows of its own, and else in shared memory."""
        size = self.m * self.span * self.chain.size
        return (size, 0) if 16 * self.warps <= self.m else (0, size)

    def stages(self, device: Device) -> int:
        """Steps that shared memory has room for, beside what the results pass through on their way out."""
        return min(4, (device.shared - 4 * self.m * self.wide - self.held[1]) // self.stage)

    @property
    def registers(self) -> float:
        """Of a thread, about: sums of either product, the inner activation, and addresses of a step."""
        lanes, held = 32 * self.warps, self.held[0] / 4
        first = self.m * self.width * self.chain.count + held * (self.slices - 1) / self.slices
        copies = 24 if held and self.slices > 1 else 0
        return max(first, self.m * self.wide + held) / lanes + 2 * self.stage / (16 * lanes) + copies

    def cost(self, device: Device) -> float:
        """Microseconds of both passes: what a block multiplies or moves, and the partial results on their way back."""
        chain = self.chain
        blocks = -(-chain.rows // self.m) * self.parts
        efficiency = (0.6 if self.m >= 64 else 0.3) * min(1.0, (self.width + 64) / 128)
        weights = self.span * (chain.count * chain.depth + chain.columns)
        work = 2 * self.m * weights / (FLOP_PER_US * efficiency)
        moved = (self.slices * self.m * chain.depth + weights) * chain.size + self.m * chain.columns * 4
        rounds = -(-blocks // device.multiprocessors)
        partial = self.parts * chain.rows * chain.columns * 4
        back = partial / (device.multiprocessors * BYTES_PER_US)
        if partial > _CACHED:
            back += 2 * partial / _MEMORY_BYTES_PER_US
        return rounds * (max(work, moved / BYTES_PER_US) + LATENCY_US) + back + LATENCY_US

    def setting(self, stages: int) -> Setting:
        """As parameters of the template."""
        values = {"parts": self.parts, "BM": self.m, "BH": self.width, "slices": self.slices, "BN": self.wide}
        return setting(**values, BK=self.chain.step, warps=self.warps, stages=stages)
