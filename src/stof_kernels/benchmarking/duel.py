"""Two methods against each other in one process: the same tensors, turn by turn, so that the machine's mood cancels.

Cards of one kind run at different clocks, and so does one card at different moments. Two medians from two runs differ by
more than close methods do; the ratio within a turn does not.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from dataclasses import dataclass

from stof_kernels import baselines
from stof_kernels.baselines import MethodSpec, Prepared, Problem, Tensors, Unsupported

from . import attention_forms
from .cell import Measured, kept_of, numbers_of, rows_or_reason, shared_tensors
from .experiments import Cell
from .measurement import Measurement
from .timing import Budget, Timing, device_arm, interleave, quantile
from .turns import turns

_OURS = "stof"
_BESIDE = frozenset(
    {
        "stof", "torch_native", "torch_compile", "sdpa", "sdpa_efficient", "sdpa_cudnn", "fa2", "fa4", "flex_attention",
        "flex_flash",
    }
)  # fmt: skip
"""Methods that may be prepared beside other jobs. Any other may choose kernels by their time, so it is alone for it."""


class DuelError(ValueError):
    """A duel that cannot be held, with the status that its row has. The message is one line."""

    def __init__(self, message: str, status: str = "unsupported"):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Outcome:
    """Times in microseconds, and how many times faster the first is: median and 20th and 80th percentile over turns."""

    first: Timing
    second: Timing
    ratio: Timing
    exact: tuple[bool, bool]
    rel_err: tuple[float, float]
    notes: tuple[str, str]

    def __str__(self) -> str:
        spread = f"{self.ratio.p20:.3f}-{self.ratio.p80:.3f} over {self.ratio.samples} turns"
        text = f"{self.first.median:.1f} us against {self.second.median:.1f} us: {self.ratio.median:.3f}x ({spread})"
        dense = [name for name, exact in zip(("first", "second"), self.exact, strict=True) if not exact]
        return text + (f"; the {' and the '.join(dense)} ignores the mask" if dense else "")


def duel(problem: Problem, first: str, second: str, budget: Budget, experiment: str = "mha") -> Outcome:
    """Check both methods, then time them in turn. DuelError if one cannot run the problem or gives a wrong result.

    Where jobs share the device, both are prepared and checked beside the others and timed alone.
    """
    import torch

    from .model_memory import give_back

    specs = [baselines.get(name) for name in (first, second)]
    beside = all(spec.id in _BESIDE for spec in specs)
    with torch.no_grad(), nullcontext() if beside else turns().alone():
        tensors = shared_tensors(problem)
        sides = [_ready(spec, problem, tensors, experiment) for spec in specs]
        outputs, errors = _checked(specs, sides, problem, tensors)
        give_back(problem.device)  # while this job waits for its turn, it holds its tensors alone
        with turns().alone():
            arms = [device_arm(side.run, problem.device, budget) for side in sides]
            taken = interleave(arms, budget)
            _unchanged(specs, sides, outputs, problem)
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(*taken, strict=True)]
    times = [Timing.of([t for turn in arm for t in turn]) for arm in taken]
    ratio = Timing(statistics.median(ratios), quantile(ratios, 0.2), quantile(ratios, 0.8), len(ratios))
    notes = tuple("; ".join(filter(None, (side.note, arm.note))) for side, arm in zip(sides, arms, strict=True))
    return Outcome(*times, ratio, tuple(side.exact for side in sides), errors, notes)


def measure_cell(cell: Cell, job: Measured) -> list[Measurement]:
    """Rows of a cell of another experiment, which ``operator`` names: the rival's time, ours of the same turns, the ratio."""
    of = cell.key.partition(":")[0]
    return rows_or_reason(cell.problem, job, lambda problem, job: _rows(problem, job, of))


def _rows(problem: Problem, job: Measured, of: str) -> list[Measurement]:
    kept = kept_of(problem)
    try:
        outcome = duel(problem, _OURS, job.method.id, job.budget)
    except DuelError as error:
        return job.missing(problem, error.status, str(error), kept=kept, operator=of)
    ours, theirs = (
        {"exact": exact, "rel_err": error, "kept": kept, "operator": of}
        for exact, error in zip(outcome.exact, outcome.rel_err, strict=True)
    )
    return [
        job.row(problem, "device_time", **numbers_of(outcome.second), **theirs, note=outcome.notes[1]),
        job.row(problem, "stof_time", **numbers_of(outcome.first), **ours, note=outcome.notes[0]),
        job.row(problem, "speedup", **numbers_of(outcome.ratio), exact=all(outcome.exact), kept=kept, operator=of),
    ]


def _ready(spec: MethodSpec, problem: Problem, tensors: Tensors, experiment: str) -> Prepared:
    why_not = spec.why_not(experiment, problem.device)
    if why_not:
        raise DuelError(f"{spec.id}: {why_not}")
    try:
        return attention_forms.prepare(spec, problem, tensors)
    except Unsupported as reason:
        raise DuelError(f"{spec.id}: {reason}") from None


def _checked(specs: list[MethodSpec], sides: list[Prepared], problem: Problem, tensors: Tensors) -> tuple:
    """(outputs, relative errors) of both sides; the reference is formed once where both apply the same mask."""
    from .check import TOLERANCE, relative_error, relative_errors

    outputs = [side.run() for side in sides]
    if sides[0].applied == sides[1].applied:
        errors = relative_errors(problem, tensors, sides[0].applied, outputs)
    else:
        pairs = zip(sides, outputs, strict=True)
        errors = [relative_error(problem, tensors, side.applied, out) for side, out in pairs]
    allowed = TOLERANCE[problem.dtype]
    for spec, error in zip(specs, errors, strict=True):
        if not error <= allowed:  # also true for nan
            raise DuelError(
                f"{spec.id}: wrong result, relative error {error:.1e}, allowed: {allowed:g}", "wrong_result"
            )
    return outputs, tuple(float(f"{error:.3g}") for error in errors)


def _unchanged(specs: list[MethodSpec], sides: list[Prepared], outputs: list, problem: Problem) -> None:
    from .check import TOLERANCE, same_output

    for spec, side, out in zip(specs, sides, outputs, strict=True):
        if not same_output(out, side.run(), TOLERANCE[problem.dtype]):
            raise DuelError(f"{spec.id}: the output changed while it was timed", "wrong_result")
