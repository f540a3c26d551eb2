"""One cell of a measurement: prepare a method, check its output, and only then time it. A failing method gives a row."""

from __future__ import annotations

import gc
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

from stof_kernels import masks
from stof_kernels.baselines import MethodSpec, Prepared, Problem, Tensors, Unsupported

from . import experiments
from .attention_memory import held, peak_of
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
    return rows_or_reason(cell.problem, job, measure_attention)


def rows_or_reason(
    problem: Problem, job: Measured, measure: Callable[[Problem, Measured], list[Measurement]]
) -> list[Measurement]:
    """``measure(problem, job)``, or one row that says why there is no time."""
    import torch

    try:
        with torch.no_grad(), _released_memory(problem.device):
            return measure(problem, job)
    except Unsupported as reason:
        status, note = "unsupported", str(reason)
    except Exception as error:
        status, note = failure(error)
    return job.missing(problem, status, note, kept=_kept_or_none(problem))


def failure(error: Exception) -> tuple[str, str]:
    """(status, reason in one line) of a failed cell; the traceback of what is not for want of memory goes to the job's log."""
    if is_out_of_memory(error):
        return "oom", one_line(error)
    traceback.print_exc(file=sys.stderr)
    return "error", one_line(error)


def _own_form(spec: MethodSpec, problem: Problem, tensors: Tensors) -> Prepared:
    return spec.prepare(problem, tensors)  # type: ignore[misc]  # absent methods never come here


def measure_attention(
    problem: Problem,
    job: Measured,
    prepare: Callable[[MethodSpec, Problem, Tensors], Prepared] = _own_form,
    operator: str = "",
    memory: bool = False,
) -> list[Measurement]:
    """Rows of one attention problem, checked before it is timed.

    ``prepare`` where a method is not run in the form that its module prepares. ``operator``: what the rows call this part of
    what the experiment measures. ``memory``: also a row of the memory that the mask's form and a call take on CUDA.
    """
    from .check import TOLERANCE, relative_error, same_output
    from .control import dense_control

    tensors = shared_tensors(problem)
    before = held() if memory and problem.device == "cuda" else None
    prepared = prepare(job.method, problem, tensors)
    kept = kept_of(problem)
    out = prepared.run()
    error = relative_error(problem, tensors, prepared.applied, out)
    tolerance = TOLERANCE[problem.dtype]
    if not error <= tolerance:  # also true for nan
        return _wrong(problem, job, error, f"relative error above {tolerance:g}", prepared, kept, operator)
    checked = {"exact": prepared.exact, "rel_err": float(f"{error:.3g}"), "kept": kept, "operator": operator}
    rows = []
    if before is not None:
        del out  # the peak is that of one call
        peak = peak_of(prepared.run, before).most
        out = prepared.run()
        rows.append(job.row(problem, "peak_memory", median=float(f"{peak:.6g}"), **checked))
    control, control_name = dense_control(problem, tensors)
    arm = device_arm(prepared.run, problem.device, job.budget)
    timing, beside = time_arms([arm, device_arm(control, problem.device, job.budget)], job.budget)
    if not same_output(out, prepared.run(), tolerance):
        return _wrong(problem, job, math.nan, "the output changed while it was timed", prepared, kept, operator)
    note = "; ".join(filter(None, (prepared.note, arm.note)))
    rows.insert(0, job.row(problem, "device_time", **numbers_of(timing), **checked, note=note))
    if problem.device == "cuda":
        rows.insert(1, job.row(problem, "host_time", **numbers_of(host_time(prepared.run, timing, job)), **checked))
    if prepared.mask_build is not None:
        built = time_alone(prepared.mask_build, problem.device, _BUILD_SAMPLES, job.budget.budget_s)
        rows.append(job.row(problem, "mask_build_time", **numbers_of(built), kept=kept, operator=operator))
    place = {"kept": 1.0, "operator": operator}
    rows.append(job.row(problem, "control_time", **numbers_of(beside), **place, note=control_name))
    return rows


def shared_tensors(problem: Problem) -> Tensors:
    """q, k, v of ``problem``, drawn once for the cells in a row that differ in their mask alone."""
    return _tensors(replace(problem, pattern=masks.full()))


@lru_cache(maxsize=1)
def _tensors(problem: Problem) -> Tensors:
    from stof_kernels.baselines.inputs import make_tensors

    return make_tensors(problem)


def _wrong(
    problem: Problem, job: Measured, error: float, note: str, prepared: Prepared, kept: float, operator: str
) -> list[Measurement]:
    known = math.isfinite(error)
    note = note if known or "changed" in note else "the output is not finite"
    checked = {"exact": prepared.exact, "rel_err": float(f"{error:.3g}") if known else None, "kept": kept}
    return job.missing(problem, "wrong_result", note, **checked, operator=operator)


def host_time(run: Callable[[], object], device: Timing, job: Measured) -> Timing:
    """Wall time of one eager call on CUDA; ``device`` is its device time."""
    calls = max(1, min(job.budget.host_calls, int(_HOST_SAMPLE_US / max(device.median, 1e-3))))
    arm = HostArm(run, calls)
    return Timing.of([arm.sample() for _ in range(_HOST_SAMPLES)])


def numbers_of(timing: Timing) -> dict[str, object]:
    """A timing as the columns of a row."""
    """Six digits: more would be noise, and would make tables hard to read."""
    rounded = {name: float(f"{getattr(timing, name):.6g}") for name in ("median", "p20", "p80")}
    return {**rounded, "samples": timing.samples}


def kept_of(problem: Problem) -> float:
    """Share of (query, key) pairs that the problem's mask keeps, over all heads where they differ."""
    from .check import kept_share

    heads = problem.heads if problem.pattern.per_head else 1
    return kept_share(problem.pattern, problem.q_len, problem.kv_len, heads, problem.device)


def _kept_or_none(problem: Problem) -> float | None:
    """The kept share, or None where counting it fails too: a CUDA error can leave the process without its GPU."""
    try:
        return kept_of(problem)
    except Exception:
        return None


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


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, as torch's allocators say it on the CPU and on CUDA."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def one_line(error: BaseException, length: int = 240) -> str:
    """An exception as one printable line: its type and first two lines of text, with paths cut to their last part."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__
    text = "".join(c if c.isprintable() else " " for c in _ABSOLUTE_PATH.sub(r"\1", text))
    return text if len(text) <= length else text[: length - 3] + "..."
