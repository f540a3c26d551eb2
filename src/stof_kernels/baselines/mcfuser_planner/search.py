"""The evolutionary search: estimate a population, measure its best, breed the next from the promising ones. [paper]

Population size, number measured and the end of the search are not published; the values here are ours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from .chain import LOOPS
from .expressions import Expression
from .pruning import Candidate

Measure = Callable[[Sequence[Candidate]], Sequence[float]]
"""Seconds of each candidate on the device, infinity for one that cannot run."""


@dataclass(frozen=True)
class SearchSettings:
    """``population`` candidates a round, the ``measured`` best of them timed.

    The search ends when the best measured time gained less than ``eps`` in each of the last ``patience`` rounds, or after
    ``budget_s`` seconds, looked at between rounds: one operator's published average is 35 to 40. Simulated with 40 seeds on
    times that an H200 gave for the kernels of four shapes, the worst search misses the best kernel by 12 %, one in ten by
    up to 5; with 8 a round and a patience of 2 these are 27 and 7 %. Kernels predicted beyond 3.5 times the best were not
    timed and count as four times as slow as the best.
    """

    population: int = 100
    measured: int = 16
    eps: float = 0.01
    patience: int = 3
    most_rounds: int = 12
    seed: int = 0
    budget_s: float = 60.0


@dataclass
class Search:
    """What a search found: ``times`` by candidate in the order of measuring, ``rounds``, and how it ended."""

    times: dict[Candidate, float] = field(default_factory=dict)
    rounds: int = 0
    ended: str = ""

    @property
    def best(self) -> Candidate:
        """The fastest measured candidate; ValueError if none could run."""
        found = min(self.times, key=self.times.__getitem__, default=None)
        if found is None or math.isinf(self.times[found]):
            raise ValueError("search: no candidate could be built and run")
        return found


def search(
    space: Sequence[Candidate],
    estimate: Callable[[Candidate], float],
    measure: Measure,
    settings: SearchSettings = SearchSettings(),  # frozen
    out_of_time: Callable[[], bool] = lambda: False,
) -> Search:
    """Search ``space`` by the model ``estimate`` (seconds) and by measuring; the same settings and times give the same search.

    Candidates that are the same kernel are measured once. ValueError for an empty space.
    """
    if not space:
        raise ValueError("search: no candidate survives the rules")
    rng, found, seconds = random.Random(settings.seed), Search(), {}
    population = rng.sample(list(space), min(settings.population, len(space)))
    moves, known, idle = Moves.of(space), {}, 0
    while True:
        for candidate in population:
            if candidate not in seconds:
                seconds[candidate] = estimate(candidate)
        before = min(known.values(), default=math.inf)
        new = promising(population, seconds, known, settings.measured)
        for candidate, time in zip(new, measure(new), strict=True):
            known[candidate.key] = found.times[candidate] = time
        found.rounds += 1
        after = min(known.values(), default=math.inf)
        idle = 0 if after < before * (1 - settings.eps) or math.isinf(after) else idle + 1
        if idle >= settings.patience or found.rounds >= settings.most_rounds or out_of_time():
            found.ended = "out of time" if out_of_time() else "converged" if idle >= settings.patience else "rounds"
            return found
        population = next_population(population, seconds, moves, rng)


def promising(
    population: Sequence[Candidate], seconds: dict[Candidate, float], known: Collection[str], count: int
) -> list[Candidate]:
    """The best-estimated candidates that are different kernels and not measured yet.

    The model knows no cost of a loop, so many estimates are equal: of those, fewer executed statements go first. [ours]
    """
    found: dict[str, Candidate] = {}
    for candidate in sorted(population, key=lambda c: (seconds[c], c.program.steps)):
        if candidate.key not in known:
            found.setdefault(candidate.key, candidate)
        if len(found) == count:
            break
    return list(found.values())


@dataclass(frozen=True)
class Moves:
    """What a mutation may choose from: the candidates of a space, and the values that each property has in it."""

    allowed: frozenset[Candidate]
    expressions: tuple[Expression, ...]
    sizes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, space: Sequence[Candidate]) -> Moves:
        """The moves inside a space."""
        expressions = tuple(sorted({c.expression for c in space}, key=str))
        sizes = {loop: tuple(sorted({c.tiles.size(loop) for c in space})) for loop in LOOPS}
        return cls(frozenset(space), expressions, sizes)


def mutated(parent: Candidate, moves: Moves, rng: random.Random, attempts: int = 20) -> Candidate:
    """``parent`` with one tile size or its expression changed, inside the space; itself if no attempt stays inside."""
    for _ in range(attempts):
        what = rng.choice((*LOOPS, "expression"))
        if what == "expression":
            child = replace(parent, expression=rng.choice(moves.expressions))
        else:
            child = replace(parent, tiles=replace(parent.tiles, **{what: rng.choice(moves.sizes[what])}))
        if child != parent and child in moves.allowed:
            return child
    return parent


def next_population(
    population: Sequence[Candidate], seconds: dict[Candidate, float], moves: Moves, rng: random.Random
) -> list[Candidate]:
    """As many children: parents drawn with weight 1/estimate, one thing about each changed. [paper]"""
    weights = [1.0 / seconds[c] for c in population]
    parents = rng.choices(list(population), weights, k=len(population))
    return [mutated(parent, moves, rng) for parent in parents]
