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
from .reasons import first_line, named_line
from .replay import capture, no_workspaces
from .segments import Run, Segment
from .templates import TEMPLATES, Setting
from .templates.compiler import CompilerPool

_WARMUP, _SAMPLES, _SLICE_S = 1, 15, 0.05
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_FIRST_COMPILE_S = 12.0  # Inductor's first segment in a process also starts its compiler
_KERNEL_S = 6.0  # a kernel of usual size compiles in a fraction of a second; what takes longer spills registers
_INDUCTOR_SHARE = (
    0.4  # of a budget on CUDA, where a segment takes Inductor seconds and Triton's templates a fraction of one
)
_REPLAY_US, _MOST_CALLS, _REPLAYS = 500.0, 32, 5  # a replay's length, calls in it, and timed replays
_PARTS = ("building", "waiting", "inductor", "measuring")
"""Where a search spends its time beside `OVERHEADS`; waiting for Triton's compilers and Inductor are parts of building."""


class OutOfTime(Exception):
    """The budget of a search is spent."""


@dataclass
class Clock:
    """Wall time of a search by what it is spent on, and its budget in seconds."""

    budget: float
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*OVERHEADS, *_PARTS), 0.0))
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

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """No budget for what is done inside; its time counts for what comes after."""
        budget, self.budget = self.budget, math.inf
        try:
            yield
        finally:
            self.budget = budget

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

    ``built`` keeps what was built for `assemble`, ``refused`` says why candidates were none. With a ``pool``, `prepare` has
    kernels compiled by other processes before `cost` needs them.
    """

    def __init__(self, graph: OpGraph, values: dict[fx.Node, Tensor], clock: Clock, pool: CompilerPool | None = None):
        self._values, self.clock, self._pool = values, clock, pool
        self._compile_s = _FIRST_COMPILE_S
        self._timer = DeviceTimer()
        self._expected: tuple[str, tuple[Tensor, ...]] = ("", ())
        self._made: dict[tuple[str, str, Setting], Run] = {}
        self.refused: dict[str, str] = {}
        self.built: dict[tuple[str, str, Setting], Run] = {}

    def close(self) -> None:
        """Give back what measuring has held on the device; what was built stays."""
        self._values.clear()
        self._expected = ("", ())
        self._timer.close()

    def prepare(self, segment: Segment, candidates: list[tuple[str, Setting]], rank: float) -> None:
        """Have these candidates' kernels compiled in the background, those of lower rank first."""
        if self._pool is None:
            return
        with self.clock.on("building"):
            for template, setting in candidates:
                if template not in ("eager", "inductor"):
                    for launch in getattr(self._build(segment, template, setting), "launches", ()):
                        self._pool.submit(launch.task, rank)

    def _build(self, segment: Segment, template: str, setting: Setting) -> Run | None:
        key = (segment.key, template, setting)
        if key not in self._made:
            try:
                self._made[key] = TEMPLATES[template].build(segment, setting)
            except Exception:
                return None  # `cost` meets it again and says why
        return self._made[key]

    def cost(self, segment: Segment, template: str, setting: Setting) -> float:
        """Build, compare with the segment's own result, time. Raises `OutOfTime` before what would not fit the budget."""
        self.clock.require()
        if template == "inductor" and segment.device.type == "cpu":
            self.clock.require(self._compile_s)
        inputs = [self._values[node] for node in segment.sources]
        try:
            with self.clock.on("building"), torch.no_grad():
                run, produced = self._first_call(segment, template, setting, inputs)
            with self.clock.on("measuring"), torch.no_grad():
                wrong = disagreement(produced, self._reference(segment, inputs)) if template != "eager" else None
                del produced
                if wrong is None:
                    self.built[segment.key, template, setting] = run
                    return self._timer.time_us(run, segment, inputs)
        except torch.OutOfMemoryError:
            wrong = "out of memory"
        except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
            wrong = first_line(error)
        except Exception as error:
            # A compiler's own exceptions have no common base: a candidate that does not build is no candidate.
            wrong = named_line(error)
        self.refused[f"{segment} by {Choice(template, setting)}"] = wrong
        return math.inf

    def _first_call(
        self, segment: Segment, template: str, setting: Setting, inputs: list[Tensor]
    ) -> tuple[Run, tuple[Tensor, ...]]:
        began = time.perf_counter()
        if template == "inductor":
            self._admit(segment)
        run = self._made.get((segment.key, template, setting)) or TEMPLATES[template].build(segment, setting)
        if self._pool is not None:
            for launch in getattr(run, "launches", ()):
                with self.clock.on("waiting"):
                    reason = self._pool.wait(self._pool.submit(launch.task, rank=-1.0), _KERNEL_S)
                if reason is not None:
                    raise RuntimeError(reason)
        produced = run(*inputs)
        if template == "inductor":
            self._compile_s = time.perf_counter() - began
            self.clock.spent["inductor"] += self._compile_s
        return run, produced

    def _admit(self, segment: Segment) -> None:
        """Raises RuntimeError where Inductor would take more than its share of the time, beside templates on CUDA."""
        share, spent = _INDUCTOR_SHARE * self.clock.budget, self.clock.spent["inductor"]
        expected = self._compile_s if spent else _FIRST_COMPILE_S
        left = self.clock.budget - self.clock.elapsed
        if segment.device.type == "cuda" and (expected > left or (spent and spent + expected > share)):
            raise RuntimeError(
                f"Inductor would take {expected:.0f} s of the {left:.0f} s left, {share:.0f} s are its share"
            )

    def _reference(self, segment: Segment, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The segment's own results, kept until another segment is asked for."""
        if self._expected[0] != segment.key:
            self._expected = ("", ())
            self._expected = (segment.key, segment.module(*inputs))
        return self._expected[1]


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
        wide = torch.float64 if b.dtype in (torch.float32, torch.float64) else torch.float32
        error = float(((a.to(wide) - b.to(wide)).abs().max() / scale) if a.numel() else 0.0)
        if not error <= _TOLERANCE.get(a.dtype, 1e-4):
            return f"a result differs by {error:.1e} of its range"
    return None


def time_us(run: Run, inputs: list[Tensor], device: torch.device) -> float:
    """Best wall time of one call in microseconds, out of a few samples; on CUDA the best of events around single calls."""
    for _ in range(_WARMUP):
        run(*inputs)
    sample = device_us if device.type == "cuda" else _wall_us
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < _SAMPLES and time.perf_counter() - began < _SLICE_S):
        times.append(sample(lambda: run(*inputs)))
    return min(times)


def _wall_us(call: Callable[[], object]) -> float:
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1e3


def device_us(call: Callable[[], object], times: int = 1) -> float:
    """Microseconds between two events around so many calls on the current stream."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


class DeviceTimer:
    """Times segments; on CUDA by replays of a graph of several calls, as the model will run them.

    In the model every layer has its own weights, which come from memory. So the calls of a graph take turns on copies of the
    weights, enough of them that the L2 cache cannot hold all; where activations alone overflow it there is no need.
    """

    def __init__(self):
        self._pool: tuple | None = None
        self._holder: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._sets: tuple[str, list[list[Tensor]]] = ("", [])

    def time_us(self, run: Run, segment: Segment, inputs: list[Tensor]) -> float:
        """Microseconds of one call."""
        if segment.device.type != "cuda":
            return time_us(run, inputs, segment.device)
        estimate = device_us(lambda: run(*inputs))
        sets = self._turns(segment, inputs)
        calls = max(1, min(_MOST_CALLS, math.ceil(_REPLAY_US / max(1.0, estimate))))
        if len(sets) > 1:
            calls = min(_MOST_CALLS, max(calls, len(sets)))
        graph = torch.cuda.CUDAGraph()
        try:
            self._record(graph, lambda: _in_turn(run, sets, calls))
        except torch.OutOfMemoryError:
            raise
        except Exception:
            torch.cuda.synchronize()
            return time_us(run, inputs, segment.device)
        graph.replay()
        return min(device_us(graph.replay) for _ in range(_REPLAYS)) / calls

    def close(self) -> None:
        """Give back the copies and the memory of the graphs."""
        self._sets = ("", [])
        if self._holder is not None:
            self._holder = self._pool = self._stream = None
            with no_workspaces():
                torch.cuda.empty_cache()

    def _record(self, graph: torch.cuda.CUDAGraph, call: Callable[[], None]) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
            self._holder = torch.cuda.CUDAGraph()  # as long as one graph lives, its pool's memory is there for the next
            with torch.cuda.stream(self._stream):
                capture(self._holder, lambda: torch.zeros(1, device="cuda"))
            self._pool = self._holder.pool()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            capture(graph, call, self._pool)

    def _turns(self, segment: Segment, inputs: list[Tensor]) -> list[list[Tensor]]:
        """The inputs, and as often as the cache asks for, with copies of the weights."""
        if self._sets[0] == segment.key:
            return self._sets[1]
        self._sets = ("", [])
        cache = torch.cuda.get_device_properties(segment.device).L2_cache_size
        heavy = {i for i, t in enumerate(inputs) if segment.weights[i] and t.numel() >= 1 << 16 and _dense(t)}
        weights = sum(inputs[i].nbytes for i in heavy)
        moved = sum(t.nbytes for i, t in enumerate(inputs) if not segment.weights[i])
        count = 1 if not heavy or moved > cache else min(_MOST_CALLS, -(-2 * cache // weights))
        sets = [inputs] + [[t.clone() if i in heavy else t for i, t in enumerate(inputs)] for _ in range(count - 1)]
        self._sets = (segment.key, sets)
        return sets


def _in_turn(run: Run, sets: list[list[Tensor]], calls: int) -> None:
    for i in range(calls):
        run(*sets[i % len(sets)])


def _dense(t: Tensor) -> bool:
    """Whether a copy takes as much memory as the tensor seems to: nothing in it is repeated."""
    return all(stride != 0 or size == 1 for size, stride in zip(t.shape, t.stride(), strict=True))


@dataclass
class Space:
    """Candidates of one segment in a fixed random order, how many were ``tried``, and the ``measured`` ones of them that run.

    ``late`` are those that the search admits one segment at a time, where it is worth their time. ``covered``: some template
    beside eager and Inductor could run the segment.
    """

    segment: Segment
    waiting: list[tuple[str, Setting]]
    late: list[tuple[str, Setting]] = field(default_factory=list)
    covered: bool = True
    measured: list[Choice] = field(default_factory=list)
    tried: int = 0

    @classmethod
    def of(cls, segment: Segment, seed: int, allowed: Callable[[str], bool]) -> Space:
        """All that any template offers: eager first, then each template's default, then the rest shuffled by the seed.

        On CUDA Inductor is late: it takes seconds to compile what a template compiles in a fraction of one, on another core.
        """
        first, rest, supported = [("eager", ())], [], set()
        for name, template in TEMPLATES.items():
            if name == "eager" or not allowed(name):
                continue
            if template.supports(segment) is not None:
                continue
            supported.add(name)
            if not template.promising(segment):
                continue
            settings = template.settings(segment)
            first.append((name, settings[0]))
            rest += [(name, s) for s in settings[1:]]
        random.Random(f"{seed} {segment.key}").shuffle(rest)
        late: list[tuple[str, Setting]] = []
        if segment.device.type == "cuda":
            late = [candidate for candidate in first + rest if candidate[0] == "inductor"]
        covered = bool(supported - {"inductor"})
        return cls(segment, [c for c in first + rest if c not in late], late=late, covered=covered)

    def sample(self, meter: Meter, most: int) -> int:
        """Measure up to ``most`` more candidates; returns how many there were."""
        before = self.tried
        while self.waiting and self.tried - before < most:
            template, setting = self.waiting[0]
            cost = meter.cost(self.segment, template, setting)  # may run out of time: then it is still waiting
            self.waiting.pop(0)
            self.tried += 1
            if math.isfinite(cost):
                self.measured.append(Choice(template, setting, cost))
        return self.tried - before

    @property
    def best(self) -> Choice | None:
        """The fastest so far; None before anything has run."""
        return min(self.measured, key=lambda choice: choice.cost_us, default=None)

    @property
    def cost_us(self) -> float:
        """Its microseconds; infinite before anything has run."""
        return self.best.cost_us if self.best else math.inf
