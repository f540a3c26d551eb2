"""The only timer. It runs calls in turn, so that every number has a control taken at the same moment.

On the CPU a sample is the wall time of one call. On CUDA the device time is a replay of a CUDA graph of several calls between
two events, divided by their number, which leaves launch gaps out; the host time is the wall time of eager calls. Caches are
warm for all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

_SLICES = 10  # turns that each arm gets within the budget: enough to follow a machine that speeds up or slows down
_REPLAY_US = 2000.0  # a graph replay should last this long, so that the events' resolution does not matter


@dataclass(frozen=True)
class Budget:
    """How long to measure one cell. ``budget_s`` is wall time for all arms together once they are warm.

    Sampling ends when the budget is spent and every arm has ``min_samples``, or when every arm has ``max_samples``. ``warmup``
    is the number of untimed calls; on CUDA, ``graph_calls`` is the most calls in one graph and ``host_calls`` the eager calls
    in one sample of the host time.
    """

    min_samples: int = 5
    max_samples: int = 200
    budget_s: float = 0.5
    warmup: int = 2
    graph_calls: int = 20
    host_calls: int = 50

    def __post_init__(self) -> None:
        for f in fields(self):
            value, low = getattr(self, f.name), 0 if f.name in ("warmup", "budget_s") else 1
            kinds = (int, float) if f.name == "budget_s" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or value < low:
                raise ValueError(f"timing: {f.name} is {value!r}, allowed: a number >= {low}")
        if self.max_samples < self.min_samples:
            raise ValueError(f"timing: max_samples is {self.max_samples}, allowed: >= min_samples ({self.min_samples})")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Budget:
        """Budget from a config section; ValueError for a key that it does not have."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise ValueError(f"timing: key {name!r} is unknown, allowed: {', '.join(known)}")
        return cls(**settings)


@dataclass(frozen=True)
class Timing:
    """Median and 20th and 80th percentile of single-call times, in microseconds."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """Summary of at least one time."""
        return cls(statistics.median(times), quantile(times, 0.2), quantile(times, 0.8), len(times))


def quantile(values: Sequence[float], share: float) -> float:
    """Value below which ``share`` of the values lie, interpolated linearly between the two nearest."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class Arm(Protocol):
    """One thing to time: ``sample()`` runs it and returns the time of one call in microseconds."""

    note: str

    def sample(self) -> float:
        """Run and return microseconds per call."""


class WallArm:
    """Wall time of one call on the CPU."""

    note = ""

    def __init__(self, run: Callable[[], object]):
        self._run = run

    def sample(self) -> float:
        """One call."""
        start = time.perf_counter_ns()
        self._run()
        return (time.perf_counter_ns() - start) / 1e3


class GraphArm:
    """Device time of one call: replays of a CUDA graph of several calls, between two events."""

    def __init__(self, run: Callable[[], object], most_calls: int):
        import torch

        estimate = _event_time_us(run, 3)
        self.note = ""
        self._calls = max(1, min(most_calls, math.ceil(_REPLAY_US / max(estimate, 1e-3))))
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(self._calls):
                    run()
            self._launch: Callable[[], object] = graph.replay
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            torch.cuda.synchronize()
            self.note = (
                f"no CUDA graph ({type(error).__name__}): device_time from events around {self._calls} eager calls"
            )
            self._launch = lambda: [run() for _ in range(self._calls)]
        self._launch()
        torch.cuda.synchronize()

    def sample(self) -> float:
        """One replay."""
        return _event_time_us(self._launch, 1) / self._calls


class HostArm:
    """Wall time of one eager call on CUDA, launches and any waiting included."""

    note = ""

    def __init__(self, run: Callable[[], object], calls: int):
        self._run, self._calls = run, calls

    def sample(self) -> float:
        """Some calls in a row between two synchronisations, divided by their number."""
        import torch

        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(self._calls):
            self._run()
        torch.cuda.synchronize()
        return (time.perf_counter_ns() - start) / 1e3 / self._calls


def _event_time_us(run: Callable[[], object], calls: int) -> float:
    import torch

    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / calls


def device_arm(run: Callable[[], object], device: str, budget: Budget) -> Arm:
    """Warm ``run`` up and make the arm that takes its device time."""
    for _ in range(budget.warmup):
        run()
    if device == "cpu":
        return WallArm(run)
    import torch

    torch.cuda.synchronize()
    return GraphArm(run, budget.graph_calls)


def interleave(
    arms: Sequence[Arm], budget: Budget, clock: Callable[[], float] = time.perf_counter
) -> list[list[list[float]]]:
    """Run the arms in turn; returns for each arm its times in microseconds, grouped by turn (all arms have as many turns)."""
    start = clock()
    slice_s = budget.budget_s / _SLICES / len(arms)
    turns: list[list[list[float]]] = [[] for _ in arms]
    counts = [0] * len(arms)
    while min(counts) < budget.min_samples or (clock() - start < budget.budget_s and min(counts) < budget.max_samples):
        for i, arm in enumerate(arms):
            turns[i].append(_turn(arm, slice_s, max(1, budget.max_samples - counts[i]), clock))
            counts[i] += len(turns[i][-1])
    return turns


def _turn(arm: Arm, slice_s: float, most: int, clock: Callable[[], float]) -> list[float]:
    """Samples for one slice of time. The first meets the caches as another arm left them: it counts only if it is alone."""
    start = clock()
    first = arm.sample()
    times: list[float] = []
    while clock() - start < slice_s and len(times) < most:
        times.append(arm.sample())
    return times or [first]


def time_arms(arms: Sequence[Arm], budget: Budget) -> list[Timing]:
    """Time the arms in turn and summarise each."""
    return [Timing.of([t for turn in turns for t in turn]) for turns in interleave(arms, budget)]


def time_alone(run: Callable[[], object], device: str, samples: int, budget_s: float) -> Timing:
    """Wall time of whole calls, such as building a mask: one untimed call, then up to ``samples`` within ``budget_s``."""
    arm: Arm = WallArm(run) if device == "cpu" else HostArm(run, 1)
    arm.sample()
    start, times = time.perf_counter(), []
    while not times or (len(times) < samples and time.perf_counter() - start < budget_s):
        times.append(arm.sample())
    return Timing.of(times)
