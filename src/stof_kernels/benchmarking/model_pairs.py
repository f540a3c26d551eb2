"""One pair of operators at one size: find the kernels of one way to run it, compare its output, and only then time it."""

from __future__ import annotations

from stof_kernels.baselines.pairs import PairProblem, PairReady

from .cell import Measured, numbers_of, rows_or_reason
from .check import same_output
from .experiments import Cell
from .measurement import Measurement
from .model_subject import relative_error
from .timing import device_arm, time_arms

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
"""Largest relative error of a right output against float32, whose weights are not rounded."""


def measure_pair(cell: Cell, job: Measured) -> list[Measurement]:
    """Rows of one cell. A way that is not possible or fails gives one row with its status and a one-line reason."""
    return rows_or_reason(cell.problem, job, _measure)


def _measure(problem: PairProblem, job: Measured) -> list[Measurement]:
    ready: PairReady = job.method.prepare(problem)  # type: ignore[misc, assignment]
    out = ready.run()
    error, allowed = relative_error(out, ready.reference), TOLERANCE[problem.dtype]
    if not error <= allowed:  # also true for nan
        found = float(f"{error:.3g}") if error == error else None
        return job.missing(problem, "wrong_result", f"relative error above {allowed:g}; {ready.note}", rel_err=found)
    arm = device_arm(ready.run, problem.device, job.budget)
    timing, beside = time_arms([arm, device_arm(ready.apart, problem.device, job.budget)], job.budget)
    if not same_output(out, ready.run(), allowed):
        return job.missing(problem, "wrong_result", "the output changed while it was timed")
    note = "; ".join(filter(None, (ready.note, arm.note)))
    checked = {"rel_err": float(f"{error:.3g}"), "note": note}
    return [
        job.row(problem, "device_time", **numbers_of(timing), **checked),
        job.row(problem, "control_time", **numbers_of(beside), note=ready.control),
    ]
