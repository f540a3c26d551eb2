"""The planner's experiment: every feasible configuration of a cell, measured, beside what was predicted and chosen.

Its rows: one ``device_time`` and one ``predicted_time`` per configuration (named in ``operator``), and one ``regret`` per
policy: the time of the configuration that it chooses over the best of all.
"""

from __future__ import annotations

from collections.abc import Callable

from stof_kernels.baselines import Problem, Tensors
from stof_kernels.planner import POLICIES, KernelConfig

from .cell import Measured, kept_of, numbers_of, rows_or_reason
from .experiments import Cell
from .measurement import Measurement
from .timing import device_arm, time_arms


def measure_candidates(cell: Cell, job: Measured) -> list[Measurement]:
    """Rows of one cell; a failure gives one row with its status and a one-line reason."""
    return rows_or_reason(cell.problem, job, _measure)


def _measure(problem: Problem, job: Measured) -> list[Measurement]:
    from stof_kernels import SparseMask
    from stof_kernels.baselines.inputs import make_tensors
    from stof_kernels.baselines.stof import call_with

    tensors = make_tensors(problem)
    q, k = tensors.q, tensors.k
    mask = SparseMask.from_pattern(problem.pattern, problem.q_len, problem.kv_len, device=problem.device)
    plans = {policy: mask.plan_for(q, k, policy) for policy in POLICIES}
    predicted = dict(plans["cost"].ranking)
    runs = {config: call_with(tensors, mask, config, problem.scale) for config in predicted}
    errors = {config: _error(problem, tensors, run, config) for config, run in runs.items()}
    arms = [device_arm(run, problem.device, job.budget) for run in runs.values()]
    times = dict(zip(runs, time_arms(arms, job.budget), strict=True))
    kept = kept_of(problem)
    rows = []
    for config, timing in times.items():
        checked = {"exact": True, "rel_err": errors[config], "kept": kept, "operator": config.id}
        rows.append(job.row(problem, "device_time", **numbers_of(timing), **checked))
        rows.append(job.row(problem, "predicted_time", median=predicted[config], operator=config.id, kept=kept))
    best = min(timing.median for timing in times.values())
    for policy, plan in plans.items():
        ratio = times[plan.config].median / best
        rows.append(
            job.row(problem, "regret", median=ratio, operator=policy, kept=kept, note=f"chooses {plan.config.id}")
        )
    return rows


def _error(problem: Problem, tensors: Tensors, run: Callable, config: KernelConfig) -> float:
    from .check import TOLERANCE, relative_error

    error = relative_error(problem, tensors, problem.pattern, run())
    if not error <= TOLERANCE[problem.dtype]:
        raise RuntimeError(f"{config.id} is wrong: relative error {error:.1e}, allowed: {TOLERANCE[problem.dtype]:g}")
    return error
