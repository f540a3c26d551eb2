"""Choosing a configuration: our cost model, and the paper's selector as a second, named policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .config import BLOCK_WISE, ROW_WISE, KernelConfig, candidates, infeasible
from .cost import predict_us
from .device import DeviceSpec
from .problem import AttentionProblem

POLICIES = ("cost", "paper")


@dataclass(frozen=True)
class Plan:
    """A chosen configuration and the reasons for it."""

    config: KernelConfig
    predicted_us: float
    policy: str
    why: str
    device: DeviceSpec
    problem: AttentionProblem
    ranking: tuple[tuple[KernelConfig, float], ...]
    rejected: tuple[tuple[KernelConfig, str], ...]
    notes: tuple[str, ...] = ()

    def explain(self) -> str:
        """Which kernel, which tile, predicted time, and why, as text of a few lines."""
        lines = [
            f"{self.config} on {self.device.name} ({self.device.units} units), predicted {self.predicted_us:.1f} us",
            f"  problem: {self.problem}",
            f"  policy {self.policy}: {self.why}",
            *(f"  candidate {c}: {us:.1f} us{' <- chosen' if c == self.config else ''}" for c, us in self.ranking),
            *(f"  candidate {c}: not feasible, {reason}" for c, reason in self.rejected),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def with_notes(self, notes: tuple[str, ...]) -> Plan:
        """The same plan with remarks of the caller, such as copies it will make."""
        return replace(self, notes=notes)


def choose(problem: AttentionProblem, device: DeviceSpec, policy: str = "cost") -> Plan:
    """The plan for a problem on a device.

    ``policy="cost"`` takes the cheapest feasible candidate by predicted time; ``"paper"`` takes the kernel that STOF's Equation
    1 names, with that kernel's default tile. ValueError for another policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"planner: policy {policy!r}, allowed: {', '.join(POLICIES)}")
    reasons = [(c, infeasible(c, device, problem)) for c in candidates(device)]
    rejected = tuple((c, reason) for c, reason in reasons if reason)
    feasible = [c for c, reason in reasons if not reason]
    # sorted() is stable: on equal predictions the earlier candidate, the default, wins.
    ranking = tuple(sorted(((c, predict_us(c, device, problem)) for c in feasible), key=lambda item: item[1]))
    if policy == "paper":
        score = paper_score(problem)
        kernel = ROW_WISE if score < 0 else BLOCK_WISE
        chosen = next(c for c in feasible if c.kernel == kernel)
        sign = "negative: row-wise" if score < 0 else "not negative: block-wise"
        why = f"Equation 1 gives {score:.4f}, {sign}"
    else:
        chosen = ranking[0][0]
        why = "cheapest of the feasible candidates"
    return Plan(chosen, dict(ranking)[chosen], policy, why, device, problem, ranking, rejected)


def paper_score(problem: AttentionProblem) -> float:
    """STOF's Equation 1: listed cells over all cells of one plane, minus 1.2 / (log2 n)**2 with n = ceil(S / 16).

    Source: STOF, PPoPP '26, doi 10.1145/3774934.3786434, Equation 1. For unequal lengths n is the geometric mean of the
    two; up to 16 positions (log2 n = 0) the equation has no value and the score is -inf, its limit.
    """
    stats = problem.mask
    rows = stats.strips // stats.planes
    n = math.sqrt(rows * stats.cols)
    if n <= 1:
        return -math.inf
    return stats.cells / (stats.strips * stats.cols) - 1.2 / math.log2(n) ** 2
