"""Measured costs of segments: candidates are built, checked against the segment, timed, and never tried twice."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, fx

from .graph import OpGraph
from .plan import OVERHEADS, Choice
from .segments import Run, Segment
from .templates import TEMPLATES, Setting

_WARMUP, _SAMPLES, _SLICE_S = 1, 15, 0.05
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_FIRST_COMPILE_S = 12.0  # Inductor's first segment in a process also starts its compiler


class OutOfTime(Exception):
    """The budget of a search is spent."""


@dataclass
class Clock:
    """Wall time of a search by what it is spent on, and its budget in seconds."""

    budget: float
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*OVERHEADS, "building", "measuring"), 0.0))
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count the time of a block to ``what``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] += time.perf_counter() - began

    @property
    def elapsed(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self.start

    def require(self, seconds: float = 0.0) -> None:
        """Raises `OutOfTime` if fewer than ``seconds`` of the budget are left."""
        if self.elapsed + seconds >= self.budget:
            raise OutOfTime


class Meter(Protocol):
    """What a search asks for the cost of a candidate; tests put a function of their own here."""

    def cost(self, segment: Segment, template: str, setting: Setting) -> float:
        """Microseconds of one call, or infinity for a candidate that cannot run or is wrong."""


class DeviceMeter:
    """Costs measured on the device that the tensors are on, with the values that the model really has there.

    ``built`` keeps what was built for `assemble`, ``refused`` says why candidates were none.
    """

    def __init__(self, graph: OpGraph, values: dict[fx.Node, Tensor], clock: Clock):
        self._graph, self._values, self._clock = graph, values, clock
        self._compile_s = _FIRST_COMPILE_S
        self.refused: dict[str, str] = {}
        self.built: dict[tuple[str, str, Setting], Run] = {}

    def cost(self, segment: Segment, template: str, setting: Setting) -> float:
        """Build, compare with the segment's own result, time. Raises `OutOfTime` before what would not fit the budget."""
        if template == "inductor":
            self._clock.require(self._compile_s)
        self._clock.require()
        inputs = [self._values[node] for node in segment.sources]
        try:
            with self._clock.on("building"), torch.no_grad():
                began = time.perf_counter()
                run = TEMPLATES[template].build(segment, setting)
                produced = run(*inputs)
                if template == "inductor":
                    self._compile_s = time.perf_counter() - began
            with self._clock.on("measuring"), torch.no_grad():
                wrong = disagreement(produced, segment.module(*inputs)) if template != "eager" else None
                if wrong is None:
                    self.built[segment.key, template, setting] = run
                    return time_us(run, inputs, segment.device)
        except torch.OutOfMemoryError:
            wrong = "out of memory"
        except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
            wrong = (str(error).splitlines() or [type(error).__name__])[0]
        except Exception as error:
            # A compiler's own exceptions have no common base: a candidate that does not build is no candidate.
            wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.refused[f"{segment} by {Choice(template, setting)}"] = wrong
        return math.inf


def disagreement(got: list[Tensor] | tuple[Tensor, ...], want: tuple[Tensor, ...]) -> str | None:
    """How results differ from the reference beyond rounding, or None."""
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"a result is {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}"
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return "an integer result differs"
            continue
        scale = b.abs().max().nan_to_num().clamp(min=1.0)
        error = float(((a.double() - b.double()).abs().max() / scale) if a.numel() else 0.0)
        if not error <= _TOLERANCE.get(a.dtype, 1e-4):
            return f"a result differs by {error:.1e} of its range"
    return None


def time_us(run: Run, inputs: list[Tensor], device: torch.device) -> float:
    """Best wall time of one call in microseconds, out of a few samples; on CUDA the best of events around single calls."""
    for _ in range(_WARMUP):
        run(*inputs)
    sample = _cuda_sample if device.type == "cuda" else _wall_sample
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < _SAMPLES and time.perf_counter() - began < _SLICE_S):
        times.append(sample(run, inputs))
    return min(times)


def _wall_sample(run: Run, inputs: list[Tensor]) -> float:
    began = time.perf_counter_ns()
    run(*inputs)
    return (time.perf_counter_ns() - began) / 1e3


def _cuda_sample(run: Run, inputs: list[Tensor]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run(*inputs)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


@dataclass
class Space:
    """Candidates of one segment in a fixed random order, and the best one measured so far."""

    segment: Segment
    waiting: list[tuple[str, Setting]]
    best: Choice | None = None

    @classmethod
    def of(cls, segment: Segment, seed: int, allowed: Callable[[str], bool]) -> Space:
        """All that any template offers: eager first, then each template's default, then the rest shuffled by the seed."""
        first, rest = [("eager", ())], []
        for name, template in TEMPLATES.items():
            if name == "eager" or not allowed(name) or template.supports(segment) is not None:
                continue
            settings = template.settings(segment)
            first.append((name, settings[0]))
            rest += [(name, s) for s in settings[1:]]
        random.Random(f"{seed} {segment.key}").shuffle(rest)
        return cls(segment, first + rest)

    def sample(self, meter: Meter, most: int) -> int:
        """Measure up to ``most`` more candidates; returns how many there were."""
        tried = 0
        while self.waiting and tried < most:
            template, setting = self.waiting[0]
            cost = meter.cost(self.segment, template, setting)  # may run out of time: then it is still waiting
            self.waiting.pop(0)
            tried += 1
            if self.best is None or cost < self.best.cost_us:
                self.best = Choice(template, setting, cost)
        return tried
