"""The experiment ``dynamic_mask``: another block mask per head at every call, as front ends that estimate block scores make.

Every method has rows of its attention alone, with a mask prepared beforehand (operator ``attention``). Those that can take a
new table of blocks on the device, ours and FlexAttention, also have the whole call, in which every replay builds the mask of
another table and then attends with it (operator ``build_and_attention``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from stof_kernels.baselines import MethodSpec, Problem, Tensors

from .attention_forms import flex_block_mask, flex_blocks_call, prepare
from .attention_masks import HeadBlocks
from .cell import Measured, host_time, kept_of, measure_attention, numbers_of, rows_or_reason, shared_tensors
from .experiments import Cell
from .measurement import Measurement
from .timing import device_arm, time_arms

if TYPE_CHECKING:
    from torch import Tensor

ALONE, WHOLE = "attention", "build_and_attention"
_TABLES = 4
"""Tables that the calls take in turn."""

Call = Callable[["Tensor"], "Tensor"]


def measure_cell(cell: Cell, job: Measured) -> list[Measurement]:
    """Rows of one cell: attention alone, then the whole call where the method has one. Each part may fail by itself."""
    alone = partial(measure_attention, prepare=prepare, operator=ALONE)
    rows = [_named(row, ALONE) for row in rows_or_reason(cell.problem, job, alone)]
    if job.method.id in _WHOLE and isinstance(cell.problem.pattern, HeadBlocks):
        rows += [_named(row, WHOLE) for row in rows_or_reason(cell.problem, job, _measure_whole)]
    return rows


def _named(row: Measurement, operator: str) -> Measurement:
    return row if row.operator else replace(row, operator=operator)


def _measure_whole(problem: Problem, job: Measured) -> list[Measurement]:
    from .check import TOLERANCE, same_output
    from .control import dense_control

    tensors, kept = shared_tensors(problem), kept_of(problem)
    patterns = [replace(problem.pattern, seed=problem.pattern.seed + i) for i in range(_TABLES)]
    tables = [p.table(problem.q_len, problem.kv_len, problem.device) for p in patterns]
    call = _WHOLE[job.method.id](job.method, problem, tensors, tables[0])
    error = _worst_error(problem, tensors, patterns, tables, call)
    if not error <= TOLERANCE[problem.dtype]:
        known = math.isfinite(error)
        note = f"relative error above {TOLERANCE[problem.dtype]:g}" if known else "the output is not finite"
        return job.missing(
            problem, "wrong_result", note, exact=True, rel_err=float(f"{error:.3g}") if known else None, kept=kept
        )
    first = call(tables[0])
    run = _in_turn(call, tables)
    control, control_name = dense_control(problem, tensors)
    arm = device_arm(run, problem.device, job.budget)
    timing, beside = time_arms([arm, device_arm(control, problem.device, job.budget)], job.budget)
    if not same_output(first, call(tables[0]), TOLERANCE[problem.dtype]):
        return job.missing(problem, "wrong_result", "the output changed while it was timed", exact=True, kept=kept)
    place = {"operator": WHOLE, "kept": kept}
    checked = place | {"exact": True, "rel_err": float(f"{error:.3g}")}
    rows = [job.row(problem, "device_time", **numbers_of(timing), **checked, note=arm.note)]
    if problem.device == "cuda":
        rows.append(job.row(problem, "host_time", **numbers_of(host_time(run, timing, job)), **checked))
    place = {"operator": WHOLE, "kept": 1.0}
    return [*rows, job.row(problem, "control_time", **numbers_of(beside), **place, note=control_name)]


def _worst_error(
    problem: Problem, tensors: Tensors, patterns: Sequence[HeadBlocks], tables: Sequence[Tensor], call: Call
) -> float:
    """Largest relative error over all tables; nan if any output holds nan."""
    from .check import relative_error

    errors = [
        relative_error(replace(problem, pattern=pattern), tensors, pattern, call(table))
        for pattern, table in zip(patterns, tables, strict=True)
    ]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def _in_turn(call: Call, tables: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A call without arguments that takes the next table each time; a graph of several calls holds several tables."""
    turn = 0

    def run() -> Tensor:
        nonlocal turn
        turn += 1
        return call(tables[turn % len(tables)])

    return run


def _stof(spec: MethodSpec, problem: Problem, tensors: Tensors, table: Tensor) -> Call:
    """Buffers with room for as many cells as every table of this problem has; updated in place, without the host."""
    from stof_kernels import SparseMask, sparse_attention

    q, k, v = tensors.q, tensors.k, tensors.v
    block, size = problem.pattern.block, (problem.q_len, problem.kv_len)  # type: ignore[attr-defined]  # HeadBlocks
    room = SparseMask.from_blocks(table[None], block, *size).counts[0]
    # Tables keep as many blocks each, but those at the ends may be narrower in one than in another.
    capacity = int(room) + table.shape[0] * (table.shape[1] + table.shape[2]) * (block // 16)
    mask = SparseMask.from_blocks(table[None], block, *size, capacity=capacity).prepare(q, k)

    def call(table: Tensor) -> Tensor:
        return sparse_attention(q, k, v, mask.update_blocks_(table[None], block), scale=problem.scale)

    return call


def _flex(spec: MethodSpec, problem: Problem, tensors: Tensors, table: Tensor) -> Call:
    """The block mask through its public constructor, by plain operators on the device, then the compiled call."""
    current, block = table.clone(), problem.pattern.block  # type: ignore[attr-defined]  # HeadBlocks

    # One function for all tables: FlexAttention compiles for each function it is given.
    def rule(b, h, q, kv):
        return current[h, q // block, kv // block]

    run, tile = flex_blocks_call(spec, problem, tensors, current, rule)

    def call(table: Tensor) -> Tensor:
        current.copy_(table)
        return run(flex_block_mask(problem, table, rule, tile))

    return call


_WHOLE: dict[str, Callable[[MethodSpec, Problem, Tensors, Tensor], Call]] = {
    "stof": _stof,
    "flex_attention": _flex,
    "flex_flash": _flex,
}
