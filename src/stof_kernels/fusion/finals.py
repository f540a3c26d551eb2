"""The last comparison of a search: choices that cost nearly the same alone are compared inside the whole model, by replays.

A segment is timed among copies of itself. In the model other kernels stand before and after it, and on a GPU each starts while
the one before it ends: what is best there is one of the best few alone, not always the first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from .assemble import Built, Program
from .costs import Space, device_us
from .plan import Choice, FusionPlan
from .reasons import first_line, named_line
from .replay import capture, no_workspaces
from .search import Progress

Finalists = dict[str, list[Choice]]
"""By segment key: the chosen way and those that come near to it, best first."""
MOST_S = 2.5
"""Seconds that the comparison takes at most."""
_NEAR, _MOST = 1.5, 14  # up to so many times the best one's cost, and so many of them
_GAIN = 0.003  # share of a model's time by which an exchange has to be faster: what is below is noise
_SAMPLE_US, _TURNS = 1000.0, 7


class Judge(Protocol):
    """Compares a program as it is now with what it was; tests put one of their own here."""

    def faster(self) -> bool:
        """Whether the program has become faster; then later comparisons are with what it is now."""


def finalists(space: Space) -> list[Choice]:
    """The few best choices of a segment, best first."""
    ranked = sorted(space.measured, key=lambda choice: choice.cost_us)
    return [choice for choice in ranked[:_MOST] if choice.cost_us <= _NEAR * ranked[0].cost_us]


def refine(
    plan: FusionPlan,
    program: Program,
    near: Finalists,
    built: Built,
    judge: Judge,
    deadline: float,
    progress: Progress = lambda line: None,
) -> FusionPlan:
    """Exchange segments of the program where that makes it faster; returns the plan that it then runs.

    The second choices come first, those of segments that cost most before others, then the third ones and so on, until
    ``deadline`` (of `time.perf_counter`). What raises is not exchanged, and then nothing more is tried.
    """
    changed: dict[str, Choice] = {}
    tried = 0
    try:
        for key, choice in _in_order(plan, program, near):
            if time.perf_counter() >= deadline:
                break
            before, better = program.exchange(key, built[key, choice.template, choice.setting]), False
            tried += 1
            try:
                better = judge.faster()
            finally:
                if not better:
                    program.exchange(key, before)
            if better:
                changed[key] = choice
    except Exception as error:
        progress(f"finals: ended by {named_line(error)}")
    progress(f"finals: {len(changed)} segments exchanged, {tried} tried")
    plan.counts["finals"], plan.counts["exchanged"] = tried, len(changed)
    for key, choice in changed.items():
        for b, p in program.places[key]:
            choices = list(plan.blocks[b].choices)
            choices[p] = choice
            plan.blocks[b] = replace(plan.blocks[b], choices=tuple(choices))
    return plan


def _in_order(plan: FusionPlan, program: Program, near: Finalists) -> list[tuple[str, Choice]]:
    """What to try: by rank, then by what a segment costs in all its places."""
    blocks = plan.blocks
    costs = {
        key: sum(blocks[b].count * blocks[b].choices[p].cost_us for b, p in places)
        for key, places in program.places.items()
        if key in near
    }
    ranked = [(rank, -costs[key], key, choice) for key in costs for rank, choice in enumerate(near[key][1:])]
    return [(key, choice) for _, _, key, choice in sorted(ranked, key=lambda entry: entry[:3])]


def compared(
    plan: FusionPlan,
    program: Program,
    near: Finalists,
    built: Built,
    inputs: Sequence[Tensor],
    deadline: float,
    progress: Progress,
) -> FusionPlan:
    """`refine` by replays; the plan as it is where the program cannot be recorded."""
    judge = None
    try:
        judge = ReplayJudge(program, inputs)
        return refine(plan, program, near, built, judge, deadline, progress)
    except Exception as error:
        torch.cuda.synchronize()
        progress(f"finals: none, {first_line(error)}")
        return plan
    finally:
        if judge is not None:
            judge.close()


class ReplayJudge:
    """Compares by replays of CUDA graphs of the program, in turns. ``close`` gives back what it holds on the device."""

    def __init__(self, program: Program, inputs: Sequence[Tensor]):
        self._program, self._inputs = program, inputs
        self._stream = torch.cuda.Stream()
        self._pool: tuple | None = None
        self._best = self._recorded()
        self._best.replay()
        estimate = device_us(self._best.replay)
        self._replays = max(1, min(8, round(_SAMPLE_US / max(estimate, 1.0))))

    def faster(self) -> bool:
        """Record the program as it is now and replay it in turns with the best one so far."""
        new = self._recorded()
        new.replay()
        pairs = [[device_us(graph.replay, self._replays) for graph in (self._best, new)] for _ in range(_TURNS)]
        before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
        if after >= before * (1 - _GAIN):
            return False
        self._best = new
        return True

    def close(self) -> None:
        """Drop the graphs and their memory."""
        self._best = self._pool = self._stream = None
        with no_workspaces():
            torch.cuda.empty_cache()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        program, graph = self._program, torch.cuda.CUDAGraph()
        rest = (*(w.detach() for w in program.weights), *program.constants.current(self._inputs))
        call: Callable[[], object] = lambda: program.function(*self._inputs, *rest)  # noqa: E731
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            call()  # a kernel is loaded by its first launch, which may not be in a capture
            capture(graph, call, self._pool)
        self._pool = self._pool or graph.pool()
        torch.cuda.synchronize()
        return graph
