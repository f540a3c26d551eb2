"""Two methods against each other in one process: the same tensors, turn by turn, so that the machine's mood cancels."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from stof_kernels import baselines
from stof_kernels.baselines import MethodSpec, Problem, Unsupported

from .experiments import Cell, attention_cell
from .timing import Budget, Timing, device_arm, interleave, quantile


class DuelError(ValueError):
    """A duel that cannot be held. The message is one line."""


@dataclass(frozen=True)
class Outcome:
    """Times in microseconds, and how many times faster the first is: median and 20th and 80th percentile over turns."""

    first: Timing
    second: Timing
    ratio: float
    ratio_p20: float
    ratio_p80: float
    turns: int
    exact: tuple[bool, bool]

    def __str__(self) -> str:
        spread = f"{self.ratio_p20:.3f}-{self.ratio_p80:.3f} over {self.turns} turns"
        text = f"{self.first.median:.1f} us against {self.second.median:.1f} us: {self.ratio:.3f}x ({spread})"
        dense = [name for name, exact in zip(("first", "second"), self.exact, strict=True) if not exact]
        return text + (f"; the {' and the '.join(dense)} ignores the mask" if dense else "")


def parse_cells(text: str, settings: dict[str, Any], device: str) -> list[Cell]:
    """Cells of ``mha:causal:1x2048,mha:bigbird:8x512``; the experiment's name may be left out."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise DuelError(f"cells {text!r}: allowed: a comma list of MASK:BATCHxLENGTH such as mha:causal:1x2048")
    for name in names:
        head, _, rest = name.partition(":")
        if ":" in rest and head not in ("mha", "mha_artifact"):
            raise DuelError(f"cell {name!r}: experiment {head!r} cannot duel, allowed: mha, mha_artifact")
    return [attention_cell(name.removeprefix("mha_artifact:").removeprefix("mha:"), settings, device) for name in names]


def duel(problem: Problem, first: str, second: str, budget: Budget, experiment: str = "mha") -> Outcome:
    """Check both methods, then time them in turn. DuelError if one cannot run the problem or gives a wrong result."""
    import torch

    from stof_kernels.baselines.inputs import make_tensors

    tensors = make_tensors(problem)
    with torch.no_grad():
        sides = [_ready(baselines.get(name), problem, tensors, experiment) for name in (first, second)]
        turns = interleave([device_arm(side.run, problem.device, budget) for side in sides], budget)
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(*turns, strict=True)]
    times = [Timing.of([t for turn in arm for t in turn]) for arm in turns]
    exact = (sides[0].exact, sides[1].exact)
    spread = quantile(ratios, 0.2), quantile(ratios, 0.8)
    return Outcome(times[0], times[1], statistics.median(ratios), *spread, len(ratios), exact)


def _ready(spec: MethodSpec, problem: Problem, tensors, experiment: str):
    from .check import TOLERANCE, relative_error

    why_not = spec.why_not(experiment, problem.device)
    if why_not:
        raise DuelError(f"{spec.id}: {why_not}")
    try:
        prepared = spec.prepare(problem, tensors)
    except Unsupported as reason:
        raise DuelError(f"{spec.id}: {reason}") from None
    error = relative_error(problem, tensors, prepared.applied, prepared.run())
    if not error <= TOLERANCE[problem.dtype]:
        raise DuelError(f"{spec.id}: wrong result, relative error {error:.1e}, allowed: {TOLERANCE[problem.dtype]:g}")
    return prepared
