"""One whole model at one size: prepare a method, compare its output with the reference, and only then time it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from stof_kernels.baselines import Problem
from stof_kernels.baselines.models import ModelProblem, ModelReady
from stof_kernels.masks import full

from .cell import Measured, kept_of, numbers_of, rows_or_reason
from .check import same_output
from .experiments import Cell
from .measurement import Measurement
from .model_caches import empty_caches, warm_up
from .model_memory import give_back, peak_mib
from .model_share import kept_rows
from .model_subject import BenchSubject, relative_error, subject, tolerance
from .timing import Arm, HostArm, Timing, device_arm, time_arms
from .turns import TOGETHER, turns

_SAMPLE_US = 5_000.0  # one sample of such calls lasts about this long, so that the host is ahead of the device
_HOST_SAMPLES = 5
_HOST_SAMPLE_US = 50_000.0  # one sample of the host time lasts about this long


def measure_model(cell: Cell, job: Measured) -> list[Measurement]:
    """Rows of one cell. A method that fails gives one row with its status and a one-line reason."""
    with turns().joined():
        return kept_rows(rows_or_reason(cell.problem, job, _measure), job.experiment)


def _measure(problem: ModelProblem, job: Measured) -> list[Measurement]:
    bench = subject(problem)
    if job.method.tuned and problem.tuning_s:
        warm_up(problem.device)
    with nullcontext() if job.method.id in TOGETHER else turns().alone():
        return _prepared_and_timed(bench, job)


def _prepared_and_timed(bench: BenchSubject, job: Measured) -> list[Measurement]:
    problem = bench.problem
    want, eager_error = bench.reference()
    with empty_caches() if job.method.tuned else nullcontext():
        ready: ModelReady = job.method.prepare(bench)  # type: ignore[misc, assignment]
        beside = turns().others() if job.method.id in TOGETHER else 0
        if turns().active:
            give_back(problem.device)  # a job that is about to wait for others holds only what it needs
        with turns().alone():
            out = ready.run().clone()  # a graph's next replay may write over its results
            error, allowed = relative_error(out, want), tolerance(problem, eager_error)
            if not error <= allowed:  # also true for nan
                return _wrong(problem, job, error, f"relative error above {allowed:.2g}")
            del want
            return _timed(problem, job, ready, out, error, allowed, beside)


def _timed(
    problem: ModelProblem, job: Measured, ready: ModelReady, out: Tensor, error: float, allowed: float, beside: int
) -> list[Measurement]:
    """Rows of a method whose output ``out`` was found right; ``beside``: with how many other jobs it was prepared."""
    memory = _memory(problem, job, ready.run)  # before the timer's own graph holds some
    arm = _arm(ready.run, ready.own_graphs, problem, job)
    control = device_arm(_control(problem), problem.device, job.budget)
    timing, control_timing = time_arms([arm, control], job.budget)
    if not same_output(out, ready.run(), allowed):
        return _wrong(problem, job, math.nan, "the output changed while it was timed")
    checked = {"exact": True, "rel_err": float(f"{error:.3g}"), "kept": kept_of(problem)}
    note = "; ".join(filter(None, (ready.note, arm.note, _length_note(problem))))
    rows = _speed(problem, job, timing, {**checked, "note": note})
    if problem.device == "cuda":
        rows.append(job.row(problem, "host_time", **numbers_of(_host_time(ready.run, timing)), **checked))
    rows += memory
    rows += _tuning(problem, job, ready, beside)
    beside_it = numbers_of(control_timing)
    rows.append(job.row(problem, "control_time", **beside_it, kept=1.0, note="dense attention of one layer"))
    return rows


def _wrong(problem: ModelProblem, job: Measured, error: float, note: str) -> list[Measurement]:
    known = math.isfinite(error)
    note = note if known or "changed" in note else "the output is not finite"
    found = float(f"{error:.3g}") if known else None
    return job.missing(problem, "wrong_result", note, exact=True, rel_err=found, kept=kept_of(problem))


class EventArm:
    """Device time of one call that replays a CUDA graph of its own: events around several calls, divided by their number."""

    def __init__(self, run: Callable[[], object], most_calls: int):
        self._run, self._calls = run, 1
        self._calls = max(1, min(most_calls, math.ceil(_SAMPLE_US / max(self.sample(), 1e-3))))
        self.note = f"replays its own CUDA graph: events around {self._calls} calls in a row, its copies included"

    def sample(self) -> float:
        """Microseconds per call."""
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self._calls):
            self._run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3 / self._calls


def _arm(run: Callable[[], object], own_graphs: bool, problem: ModelProblem, job: Measured) -> Arm:
    """Replays of a CUDA graph where the call can be captured, else events around it; wall time on the CPU."""
    if problem.device == "cpu" or not own_graphs:
        return device_arm(run, problem.device, job.budget)
    for _ in range(job.budget.warmup):
        run()
    return EventArm(run, job.budget.graph_calls)


def _control(problem: ModelProblem) -> Callable[[], object]:
    """Dense attention of one layer's shape: the same work beside every method."""
    from stof_kernels.baselines.inputs import make_tensors

    from .control import dense_control

    shape = problem.columns()
    heads, head_dim = shape["heads"], shape["head_dim"]
    dense = Problem(
        full(), problem.batch, problem.tokens, problem.tokens, heads, heads, head_dim, problem.dtype, problem.device
    )
    return dense_control(dense, make_tensors(dense))[0]


def _length_note(problem: ModelProblem) -> str:
    return "" if problem.tokens == problem.seq_len else f"{problem.tokens} tokens: the image nearest below"


def _speed(problem: ModelProblem, job: Measured, timing: Timing, checked: dict[str, object]) -> list[Measurement]:
    """Latency, and tokens of the sequence (of each stack, where there are two) per second."""
    tokens = problem.batch * problem.tokens
    us = (timing.median, timing.p80, timing.p20)  # the slower call has the lower rate
    rates = dict(zip(("median", "p20", "p80"), (float(f"{1e6 * tokens / t:.6g}") for t in us), strict=True))
    in_ms = Timing(timing.median / 1e3, timing.p20 / 1e3, timing.p80 / 1e3, timing.samples)
    return [
        job.row(problem, "latency", **numbers_of(in_ms), **checked),
        job.row(problem, "throughput", **rates, samples=timing.samples, **checked),
    ]


def _host_time(run: Callable[[], object], device: Timing) -> Timing:
    arm = HostArm(run, max(1, min(20, int(_HOST_SAMPLE_US / max(device.median, 1e-3)))))
    return Timing.of([arm.sample() for _ in range(_HOST_SAMPLES)])


def _memory(problem: ModelProblem, job: Measured, run: Callable[[], object]) -> list[Measurement]:
    peak = peak_mib(run, problem.device)
    if peak is None:
        return []
    note = "resident memory of the process" if problem.device == "cpu" else "reserved by the allocator"
    return [job.row(problem, "peak_memory", median=float(f"{peak:.6g}"), samples=1, note=note)]


def _tuning(problem: ModelProblem, job: Measured, ready: ModelReady, beside: int) -> list[Measurement]:
    """The tuning's wall time in seconds and the tuner's own work in milliseconds, where there was any.

    ``beside``: how many other jobs prepared theirs on the same device at that time.
    """
    if ready.tuning_s is None:
        return []
    company = f"compiled beside {beside} other jobs on the same device and cores" if beside else ""
    note = "; ".join(filter(None, (ready.note, company)))
    rows = [job.row(problem, "tuning_time", median=float(f"{ready.tuning_s:.6g}"), samples=1, note=note)]
    for part, seconds in ready.overheads.items():
        took = {"median": float(f"{seconds * 1e3:.6g}"), "samples": 1}
        rows.append(job.row(problem, "overhead_time", operator=part, **took))
    return rows
