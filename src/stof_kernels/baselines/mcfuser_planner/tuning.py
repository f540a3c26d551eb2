"""Tuning on the device at hand: the search's kernels are compiled and timed, then the winner's launch parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import inf, isfinite

import torch
from torch import Tensor

from stof_kernels.settings import max_build_jobs

from ..cuda_timing import between_events, device_is_usable, recorded
from .chain import Chain, Peaks, known_peaks
from .codegen import Layout
from .kernels import Kernel, Launch
from .model import estimate
from .pruning import ACCUMULATORS, Candidate, accumulators, space_of
from .search import SearchSettings, search

_WARPS, _STAGES = (4, 8), (4, 3, 2, 1)
_DEFAULT_STAGES = 3
_ENOUGH_US, _LONG_US, _GRAPH_US = 50_000.0, 300.0, 2000.0
_GIVE_UP = 4.0  # a candidate that is this many times slower than the best is timed roughly
# Half-precision FLOP per clock and multiprocessor, dense, float32 accumulation (vendor's architecture papers).
_FLOP_PER_CLOCK = {(8, 0): 2048, (8, 6): 512, (8, 7): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192, (12, 0): 512}


@dataclass(frozen=True)
class Trial:
    """One kernel that was measured: predicted and measured seconds (infinity with the reason where it could not run)."""

    kernel: Kernel
    predicted: float
    measured: float
    problem: str = ""


@dataclass(frozen=True)
class Tuned:
    """The chosen kernel, what was measured on the way to it, and the wall seconds of all that."""

    kernel: Kernel
    trials: tuple[Trial, ...]
    space: int
    rounds: int
    ended: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.kernel}; {len(self.trials)} of {self.space} candidates measured in {self.rounds} rounds"


def device_peaks(device: torch.device) -> Peaks:
    """What the model needs to know of a CUDA device: data sheet values of known cards, else from what the driver reports.

    ValueError for a card in no table whose clocks the driver does not tell.
    """
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_multiprocessor
    known = known_peaks(found.name)
    if known is not None:
        return replace(known, units=found.multi_processor_count, shared_bytes=shared)
    per_clock = _FLOP_PER_CLOCK.get((found.major, found.minor))
    clocks = [getattr(found, name, None) for name in ("memory_clock_rate", "memory_bus_width", "clock_rate")]
    if per_clock is None or not all(clocks):
        raise ValueError(
            f"mcfuser: peaks of {found.name!r} are unknown, allowed: a card of mcfuser_planner.chain.KNOWN"
        )
    memory_khz, bus_bits, clock_khz = clocks
    return Peaks(
        found.name,
        2e3 * memory_khz * bus_bits / 8,
        1e3 * clock_khz * per_clock * found.multi_processor_count,
        found.multi_processor_count,
        shared,
    )


def default_launch(candidate: Candidate, shared_bytes: int) -> Launch:
    """Triton 2.1's defaults where they fit: 4 warps unless 8 are needed for the accumulators, 3 stages unless too large."""
    warps = 4 if accumulators(candidate, 4) <= 2 * ACCUMULATORS / 3 else 8
    stages = next(s for s in _STAGES if s <= _DEFAULT_STAGES and (s == 1 or staged_bytes(candidate, s) <= shared_bytes))
    return Launch(warps, stages)


def launches(candidate: Candidate, shared_bytes: int) -> list[Launch]:
    """Warps and stages that can work for a candidate."""
    return [
        Launch(warps, stages)
        for warps in _WARPS
        for stages in _STAGES
        if stages > 1
        and accumulators(candidate, warps) <= ACCUMULATORS
        and staged_bytes(candidate, stages) <= shared_bytes
    ]


def staged_bytes(candidate: Candidate, stages: int) -> int:
    """Shared memory of the tiles that are loaded inside loops, each kept ``stages`` times."""
    program = candidate.program
    looped = {s.tensor for s in program.statements if s.kind == "L" and s.scope}
    return stages * candidate.chain.element_bytes * sum(candidate.tiles.elements(tensor) for tensor in looped)


def tune(
    chain: Chain,
    layout: Layout,
    tensors: Sequence[Tensor],
    peaks: Peaks,
    settings: SearchSettings = SearchSettings(),  # noqa: B008  # frozen
) -> Tuned:
    """Search by model and measurement, then the winner's warps and stages; E of ``tensors`` is overwritten.

    ValueError if no candidate survives the rules or runs.
    """
    began = time.perf_counter()

    def late() -> bool:
        return time.perf_counter() - began >= settings.budget_s

    meter = Meter(layout, tensors, peaks)
    space = space_of(chain, peaks)
    found = search(space, meter.predict, meter.candidates, settings, late)
    best = meter.best()
    if not late():
        others = launches(best.candidate, meter.shared_bytes)
        meter.kernels([replace(best, launch=launch) for launch in others if launch != best.launch])
    kernel = meter.best()
    return Tuned(
        kernel, tuple(meter.trials), len({c.key for c in space}), found.rounds, found.ended, time.perf_counter() - began
    )


@dataclass
class Meter:
    """Compiles and times kernels on the tensors that the result is for."""

    layout: Layout
    tensors: Sequence[Tensor]
    peaks: Peaks
    trials: list[Trial] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one block may have."""
        if self.device.type != "cuda":
            return self.peaks.shared_bytes
        return torch.cuda.get_device_properties(self.device).shared_memory_per_block_optin

    def predict(self, candidate: Candidate) -> float:
        """The model's seconds."""
        return estimate(candidate, self.peaks).seconds

    def best(self) -> Kernel:
        """The fastest kernel so far; ValueError with the first reason if none runs."""
        trial = min(self.trials, key=lambda t: t.measured, default=None)
        if trial is None or not isfinite(trial.measured):
            reason = trial.problem if trial is not None else "no candidate survives the rules"
            raise ValueError(f"mcfuser: no candidate could be built and run ({reason})")
        return trial.kernel

    def candidates(self, candidates: Sequence[Candidate]) -> list[float]:
        """Seconds of each candidate with its default launch."""
        return self.kernels([Kernel(c, self.layout, default_launch(c, self.shared_bytes)) for c in candidates])

    def kernels(self, kernels: Sequence[Kernel]) -> list[float]:
        """Seconds of each kernel, infinity for one that cannot be built or run. Compiled side by side, timed one by one."""
        if self.device.type == "cuda":
            import triton

            triton.runtime.driver.active.get_current_device()  # Triton's driver starts once, before there are threads
        with ThreadPoolExecutor(max_build_jobs()) as pool:
            problems = list(pool.map(self._compile, kernels))
        return [self._time(kernel, problem) for kernel, problem in zip(kernels, problems, strict=True)]

    def _compile(self, kernel: Kernel) -> str:
        """Compile; returns why it cannot run, or nothing."""
        try:
            if self.device.type != "cuda":
                return ""
            with torch.cuda.device(self.device):
                needed = kernel.compile(self.tensors).metadata.shared
        except Exception as error:  # a compiler's exceptions have no common base
            return _one_line(error)
        limit = self.shared_bytes
        return "" if needed <= limit else f"needs {needed} bytes of shared memory, allowed: {limit}"

    def _time(self, kernel: Kernel, problem: str) -> float:
        measured = inf
        if not problem:
            least = min((t.measured for t in self.trials), default=inf)
            try:
                measured = seconds_of(lambda: kernel(self.tensors), self.device, _GIVE_UP * least)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton's exceptions have no common base with torch's
                problem = _one_line(error)
                if not device_is_usable(self.device):
                    raise RuntimeError(
                        f"mcfuser: after {kernel} the device is unusable in this process: {problem}"
                    ) from error
        self.trials.append(Trial(kernel, self.predict(kernel.candidate), measured, problem))
        return measured


def seconds_of(run: Callable[[], object], device: torch.device, hopeless: float = inf) -> float:
    """Seconds of one call: wall time on the CPU, on CUDA of the device. One slower than ``hopeless`` is timed roughly."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
        return 1e-6 * device_us(lambda: between_events(run), lambda calls: _replayed(run, calls), 1e6 * hopeless)


def device_us(single: Callable[[], float], replayed: Callable[[int], float], hopeless: float = inf) -> float:
    """Microseconds by ``single()``, one call between events, or by ``replayed(calls)``, the mean of calls without the host.

    A call slower than 50 ms is timed once, one slower than ``hopeless`` twice. Below 0.3 ms ``single`` may be the host's time
    of a launch, so that only replays tell, also of what is hopeless.
    """
    once = single()
    if _LONG_US < once <= _ENOUGH_US:
        once = min(once, single())
    if once <= _LONG_US:
        return replayed(max(4, min(100, int(_GRAPH_US / once))))
    if once > min(_ENOUGH_US, hopeless):
        return once
    return min(once, single(), single())


def _replayed(run: Callable[[], object], calls: int) -> float:
    graph = recorded(run, calls)
    return min(between_events(graph.replay) for _ in range(4)) / calls


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
