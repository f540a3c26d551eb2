"""The two-stage search of STOF (PPoPP '26): first which operators share a kernel, then with which parameters.

Stage 1 goes depth first over the boundaries around compute-intensive operators. Each move is judged by the best of a fixed
number of samples per segment, before against after; what gains is kept and explored further, the rest is rolled back, and no
scheme is tried twice. Stage 2 tunes the parameters of the chosen scheme: a fixed number of samples per iteration, shared
equally at first, then by what each segment's tuning has gained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .blocks import Block, start_schemes
from .costs import Clock, Meter, OutOfTime, Space
from .graph import Kind, OpGraph
from .moves import moves
from .plan import BlockPlan, Choice, FusionPlan
from .scheme import MAX_COMPUTE, FusionScheme
from .segments import Segment, cut

Progress = Callable[[str], None]
_LATE_SHARE = 0.05  # of the unfused time: what a segment has to take for a compiler of seconds to be asked


@dataclass(frozen=True)
class SearchSettings:
    """``budget_s`` seconds in all; ``samples`` candidates per segment in stage 1; ``round_samples`` per round of stage 2.

    A candidate costs milliseconds on a GPU but seconds of a C++ compiler on the CPU, so ``samples`` 0 means 6 there and 2 here.
    ``gain`` is the share by which a move has to be faster to be kept: what is below is noise. ``templates`` restricts the
    templates (None: all); eager is always there. On CUDA Inductor is tried on segments that no template runs and that take a
    few percent of the time; ``thorough`` has it tried beside the templates too, which costs seconds a segment.
    """

    budget_s: float = 30.0
    samples: int = 0
    round_samples: int = 12
    gain: float = 0.005
    seed: int = 0
    templates: tuple[str, ...] | None = None
    thorough: bool = False

    def __post_init__(self):
        if not self.budget_s >= 0:
            raise ValueError(f"search: budget_s is {self.budget_s}, allowed: seconds >= 0")
        if self.samples < 0 or self.round_samples < 1:
            raise ValueError("search: samples is below 0 or round_samples below 1, allowed: integers from there on")

    def allows(self, template: str) -> bool:
        """Whether a template may be used."""
        return self.templates is None or template in self.templates


@dataclass
class Search:
    """One search over the blocks of a graph. `run` returns the best plan found within the budget, whatever happens."""

    graph: OpGraph
    blocks: list[Block]
    settings: SearchSettings
    meter: Meter
    clock: Clock
    progress: Progress = lambda line: None
    spaces: dict[str, Space] = field(default_factory=dict)
    schemes: dict[int, FusionScheme] = field(default_factory=dict)
    seen: set[tuple[int, int]] = field(default_factory=set)
    unfused: dict[int, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"schemes": 0, "kept": 0, "candidates": 0, "rounds": 0})
    _cuts: dict[tuple[int, int, int], Segment] = field(default_factory=dict)

    def run(self) -> FusionPlan:
        """Both stages; out of time, the plan is the best so far."""
        for i, block in enumerate(self.blocks):
            self.schemes[i] = FusionScheme.unfused(block.period)
        try:
            for i in sorted(range(len(self.blocks)), key=lambda i: -self.blocks[i].count):
                self._first_stage(i)
            self._second_stage()
        except OutOfTime:
            self.progress(f"search: budget of {self.settings.budget_s:g} s spent")
        return self.plan()

    def plan(self) -> FusionPlan:
        """The best plan so far; a segment that was never measured runs eagerly."""
        blocks = []
        for i, block in enumerate(self.blocks):
            choices = []
            for segment in self._segments(i, self.schemes[i]):
                best = self._space(segment).best
                choices.append(best or Choice())
            with self.clock.on("encoding"):
                word = self.schemes[i].encode()
            blocks.append(BlockPlan(block.start, block.period, block.count, word, tuple(choices)))
        return FusionPlan(blocks, {"total": self.clock.elapsed, **self.clock.spent}, dict(self.counts))

    # ---- stage 1 -----------------------------------------------------------------------------------------------------

    def _first_stage(self, i: int) -> None:
        block = self.blocks[i]
        kinds = [self.graph.ops[j].kind for j in block.layer(0)]
        self._ahead(i, kinds)
        # The unfused scheme is measured first, so that whatever happens later there is something to compare with.
        best = self._evaluate(i, self.schemes[i])
        self.unfused[i] = best * block.count if math.isfinite(best) else 0.0
        for scheme in start_schemes(self.graph, block):
            if self._is_new(i, scheme) and (cost := self._evaluate(i, scheme)) < best:
                best = self._keep(i, scheme, cost, "start")
        products = [j for j, kind in enumerate(kinds) if kind is Kind.COMPUTE]
        for product in products:
            while (improved := self._step(i, kinds, product, best)) is not None:
                best = improved
        self.progress(f"block {i + 1}/{len(self.blocks)}: {self.schemes[i]}, {best:.0f} us a layer")

    def _ahead(self, i: int, kinds: list[Kind]) -> None:
        """Have the kernels of all segments that the moves may come to compiled in the background, the shortest first."""
        prepare = getattr(self.meter, "prepare", None)
        if prepare is None or self.graph.ops[self.blocks[i].start].outputs[0].meta["val"].device.type != "cuda":
            return
        n = len(kinds)
        for length in range(1, n + 1):
            for start in range(n - length + 1):
                inside = kinds[start : start + length]
                if Kind.ATTENTION in inside or inside.count(Kind.COMPUTE) > MAX_COMPUTE:
                    continue
                space = self._space(self._cut(i, start, start + length))
                prepare(space.segment, space.waiting[: self._samples(space.segment)], rank=float(length))

    def _samples(self, segment: Segment) -> int:
        return self.settings.samples or (2 if segment.device.type == "cpu" else 6)

    def _step(self, i: int, kinds: list[Kind], product: int, best: float) -> float | None:
        """The first move around a product that gains, kept; None if none does."""
        for name, scheme in moves(self.schemes[i], kinds, product):
            if not self._is_new(i, scheme):
                continue
            cost = self._evaluate(i, scheme)
            if cost < best * (1 - self.settings.gain):
                return self._keep(i, scheme, cost, name)
        return None

    def _keep(self, i: int, scheme: FusionScheme, cost: float, move: str) -> float:
        self.schemes[i] = scheme
        self.counts["kept"] += 1
        self.progress(f"block {i + 1}/{len(self.blocks)}: {move} -> {scheme}, {cost:.0f} us a layer")
        return cost

    def _is_new(self, i: int, scheme: FusionScheme) -> bool:
        with self.clock.on("encoding"):
            word = scheme.encode()
            new = (i, word) not in self.seen
            self.seen.add((i, word))
        return new

    def _evaluate(self, i: int, scheme: FusionScheme) -> float:
        """Cost of a layer: the best of the samples of each of its segments."""
        with self.clock.on("encoding"):
            word = scheme.encode()
            self.seen.add((i, word))
        with self.clock.on("decoding"):
            decoded = FusionScheme.decode(word, scheme.operators)
        self.counts["schemes"] += 1
        total = 0.0
        segments = self._segments(i, decoded)
        for segment in segments:
            space = self._space(segment)
            if space.late and not space.covered and self._worth(space, self._apart(i, segment)):
                self._admit(space)
        if any(self._pointless(segment) for segment in segments):
            return math.inf
        for segment in segments:
            space = self._space(segment)
            missing = self._samples(segment) - space.tried
            if missing > 0:
                self.counts["candidates"] += space.sample(self.meter, missing)
            total += space.cost_us
        return total

    def _pointless(self, segment: Segment) -> bool:
        """Whether several operators could only run one by one: on CUDA, where that costs what they cost apart."""
        space = self._space(segment)
        alone = space.tried + len(space.waiting) == 1
        return len(segment.ops) > 1 and alone and segment.device.type == "cuda"

    def _apart(self, i: int, segment: Segment) -> float:
        """Microseconds of a segment's operators one by one over all layers, as far as they have been measured."""
        first = self.graph.ops.index(segment.ops[0]) - self.blocks[i].start
        costs = [self._space(self._cut(i, j, j + 1)).cost_us for j in range(first, first + len(segment.ops))]
        return self.blocks[i].count * sum(cost for cost in costs if math.isfinite(cost))

    # ---- stage 2 -----------------------------------------------------------------------------------------------------

    def _second_stage(self) -> None:
        """Rounds of samples over the segments of the chosen schemes until nothing is left to try."""
        weights: dict[str, float] = {}
        for i, block in enumerate(self.blocks):
            for segment in self._segments(i, self.schemes[i]):
                weights[segment.key] = weights.get(segment.key, 0.0) + block.count
        shares = {key: 1.0 for key in weights if self.spaces[key].waiting}
        prepare = getattr(self.meter, "prepare", None)
        for key in shares if prepare is not None else ():
            prepare(self.spaces[key].segment, self.spaces[key].waiting, rank=0.0)
        while shares:
            gains = self._round(shares, weights)
            with self.clock.on("reward"):
                shares = reward(shares, gains, [key for key in shares if self.spaces[key].waiting])
            self.counts["rounds"] += 1
            saved = sum(gains.values())
            self.progress(f"tuning round {self.counts['rounds']}: {saved:.0f} us saved, {len(shares)} segments left")
        self._late_candidates(weights)

    def _late_candidates(self, weights: dict[str, float]) -> None:
        """Inductor on what no template runs, or on everything if asked for, where most of the time is spent first."""
        spaces = [self.spaces[key] for key in weights if self.spaces[key].late and self.spaces[key].best]
        for space in sorted(spaces, key=lambda s: -weights[s.segment.key] * s.cost_us):
            if self._worth(space, weights[space.segment.key] * space.cost_us):
                self._admit(space)
                self.counts["candidates"] += space.sample(self.meter, len(space.waiting))

    def _worth(self, space: Space, cost: float) -> bool:
        """Whether late candidates of a segment are worth seconds of a compiler: its part of the time is large enough."""
        large = cost > 0 and cost >= _LATE_SHARE * sum(self.unfused.values())
        return large and (self.settings.thorough or (not space.covered and self._has_hole(space.segment)))

    def _has_hole(self, segment: Segment) -> bool:
        """Whether no template runs some memory-intensive operator of a segment: Inductor hardly betters what they run apart."""
        alone = (cut(self.graph, [self.graph.ops.index(op)]) for op in segment.ops if op.kind is Kind.MEMORY)
        return any(not self._space(single).covered for single in alone)

    def _admit(self, space: Space) -> None:
        space.waiting, space.late = space.waiting + space.late, []

    def _round(self, shares: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
        """Microseconds that each segment's samples of one round gained over all its layers."""
        total = sum(shares.values())
        gains = {}
        for key, share in shares.items():
            space = self.spaces[key]
            before = space.cost_us
            most = max(1, round(self.settings.round_samples * share / total))
            self.counts["candidates"] += space.sample(self.meter, most)
            gains[key] = weights[key] * (before - space.cost_us) if math.isfinite(before) else 0.0
        return gains

    # ---- segments ----------------------------------------------------------------------------------------------------

    def _segments(self, i: int, scheme: FusionScheme) -> list[Segment]:
        return [self._cut(i, part.start, part.stop) for part in scheme.segments]

    def _cut(self, i: int, first: int, stop: int) -> Segment:
        """Operators ``first`` to ``stop`` of a block's first layer."""
        at, start = (i, first, stop), self.blocks[i].start
        if at not in self._cuts:
            self._cuts[at] = cut(self.graph, range(start + first, start + stop))
        return self._cuts[at]

    def _space(self, segment: Segment) -> Space:
        if segment.key not in self.spaces:
            self.spaces[segment.key] = Space.of(segment, self.settings.seed, self.settings.allows)
        return self.spaces[segment.key]


def reward(shares: dict[str, float], gains: dict[str, float], left: list[str]) -> dict[str, float]:
    """Shares of the next round: half equal among the segments that have something left to try, half by what each gained."""
    if not left:
        return {}
    total = sum(max(0.0, gains.get(key, 0.0)) for key in left)
    equal = 1.0 / len(left)
    return {key: 0.5 * (equal + max(0.0, gains.get(key, 0.0)) / total) if total else equal for key in left}
