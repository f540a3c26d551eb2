"""One cell of a measurement: prepare a method, check its output, and only then time it. A failing method gives a row."""

from __future__ import annotations

import gc
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from stof_kernels.baselines import MethodSpec, Prepared, Problem, Unsupported

from . import experiments
from .experiments import Cell
from .measurement import Measurement
from .timing import Budget, HostArm, Timing, device_arm, time_alone, time_arms

_BUILD_SAMPLES = 5
_HOST_SAMPLES = 5
_HOST_SAMPLE_US = 20_000.0  # one sample of the host time lasts about this long, unless `host_calls` are done before
_ABSOLUTE_PATH = re.compile(r"(?<![\w.~])~?(?:/[\w.+@~-]+)+/([\w.+@~-]+)")


@dataclass(frozen=True)
class Measured:
    """What every row of a job has in common."""

    gpu: str
    experiment: str
    method: MethodSpec
    budget: Budget

    def row(self, problem: Problem, metric: str, **values: object) -> Measurement:
        """Row of one metric of ``problem``."""
        return Measurement(
            experiment=self.experiment,
            gpu=self.gpu,
            method=self.method.id,
            metric=metric,
            **problem.columns(),  # type: ignore[arg-type]
            **values,  # type: ignore[arg-type]
        )

    def missing(self, problem: Problem, status: str, note: str, **values: object) -> list[Measurement]:
        """The one row of a cell that has no number of the experiment's own metric."""
        return [self.row(problem, experiments.get(self.experiment).metric, status=status, note=note, **values)]


def measure_cell(cell: Cell, job: Measured) -> list[Measurement]:
    """Rows of one cell. A method that fails gives one row with its status and a one-line reason."""
    return rows_or_reason(cell.problem, job, _measure)


def rows_or_reason(
    problem: Problem, job: Measured, measure: Callable[[Problem, Measured], list[Measurement]]
) -> list[Measurement]:
    """``measure(problem, job)``, or one row that says why there is no time."""
    import torch

    try:
        with torch.no_grad(), _released_memory(problem.device):
            return measure(problem, job)
    except Unsupported as reason:
        return job.missing(problem, "unsupported", str(reason), kept=kept_of(problem))
    except Exception as error:
        if _is_out_of_memory(error):
            return job.missing(problem, "oom", one_line(error), kept=kept_of(problem))
        traceback.print_exc(file=sys.stderr)  # for the job's log; the row holds one line
        return job.missing(problem, "error", one_line(error), kept=kept_of(problem))


def _measure(problem: Problem, job: Measured) -> list[Measurement]:
    from stof_kernels.baselines.inputs import make_tensors

    from .check import TOLERANCE, relative_error, same_output
    from .control import dense_control

    tensors = make_tensors(problem)
    prepared = job.method.prepare(problem, tensors)  # type: ignore[misc]  # absent methods never come here
    kept = kept_of(problem)
    out = prepared.run()
    error = relative_error(problem, tensors, prepared.applied, out)
    tolerance = TOLERANCE[problem.dtype]
    if not error <= tolerance:  # also true for nan
        return _wrong(problem, job, error, f"relative error above {tolerance:g}", prepared, kept)
    control, control_name = dense_control(problem, tensors)
    arm = device_arm(prepared.run, problem.device, job.budget)
    timing, beside = time_arms([arm, device_arm(control, problem.device, job.budget)], job.budget)
    if not same_output(out, prepared.run(), tolerance):
        return _wrong(problem, job, math.nan, "the output changed while it was timed", prepared, kept)
    note = "; ".join(filter(None, (prepared.note, arm.note)))
    checked = {"exact": prepared.exact, "rel_err": float(f"{error:.3g}"), "kept": kept}
    rows = [job.row(problem, "device_time", **numbers_of(timing), **checked, note=note)]
    if problem.device == "cuda":
        rows.append(job.row(problem, "host_time", **numbers_of(_host_time(prepared, timing, job)), **checked))
    if prepared.mask_build is not None:
        built = time_alone(prepared.mask_build, problem.device, _BUILD_SAMPLES, job.budget.budget_s)
        rows.append(job.row(problem, "mask_build_time", **numbers_of(built), kept=kept))
    rows.append(job.row(problem, "control_time", **numbers_of(beside), kept=1.0, note=control_name))
    return rows


def _wrong(
    problem: Problem, job: Measured, error: float, note: str, prepared: Prepared, kept: float
) -> list[Measurement]:
    known = math.isfinite(error)
    note = note if known or "changed" in note else "the output is not finite"
    return job.missing(
        problem, "wrong_result", note, exact=prepared.exact, rel_err=float(f"{error:.3g}") if known else None, kept=kept
    )


def _host_time(prepared: Prepared, device: Timing, job: Measured) -> Timing:
    calls = max(1, min(job.budget.host_calls, int(_HOST_SAMPLE_US / max(device.median, 1e-3))))
    arm = HostArm(prepared.run, calls)
    return Timing.of([arm.sample() for _ in range(_HOST_SAMPLES)])


def numbers_of(timing: Timing) -> dict[str, object]:
    """A timing as the columns of a row."""
    """Six digits: more would be noise, and would make tables hard to read."""
    rounded = {name: float(f"{getattr(timing, name):.6g}") for name in ("median", "p20", "p80")}
    return {**rounded, "samples": timing.samples}


def kept_of(problem: Problem) -> float:
    """Share of (query, key) pairs that the problem's mask keeps."""
    from .check import kept_share

    return kept_share(problem.pattern, problem.q_len, problem.kv_len)


@contextmanager
def _released_memory(device: str) -> Iterator[None]:
    """Give GPU memory back after a cell, so that one cell's peak is not the next one's out-of-memory."""
    try:
        yield
    finally:
        if device == "cuda":
            import torch

            gc.collect()  # compiled functions sit in reference cycles
            torch.cuda.empty_cache()


def device_is_usable(device: str) -> bool:
    """False once a CUDA error has left the process without its GPU: no later cell can be measured in it."""
    if device == "cpu":
        return True
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def one_line(error: BaseException, length: int = 240) -> str:
    """An exception as one printable line: its type and first two lines of text, with paths cut to their last part."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__
    text = "".join(c if c.isprintable() else " " for c in _ABSOLUTE_PATH.sub(r"\1", text))
    return text if len(text) <= length else text[: length - 3] + "..."
