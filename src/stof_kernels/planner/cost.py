"""Predicted time of a configuration, from the mask's statistics and measured unit costs."""

from __future__ import annotations

from .config import ROW_WISE, KernelConfig
from .device import CPU_COSTS, CpuCosts, DeviceSpec
from .problem import CELL, AttentionProblem


def predict_us(config: KernelConfig, device: DeviceSpec, problem: AttentionProblem) -> float:
    """Predicted microseconds of one call; see `CpuCosts` for where the unit costs come from."""
    costs = CPU_COSTS[problem.dtype]
    work = _row_wise_ns(costs, problem) if config.kernel == ROW_WISE else _block_wise_ns(costs, problem)
    # Strips are dealt to threads one by one, so the longest possible imbalance is one average strip.
    tasks = max(1.0, problem.mask.strips * problem.repeats)
    rounds = -(-tasks // device.units) / tasks
    return (costs.call + work * rounds) / 1000


def _row_wise_ns(costs: CpuCosts, problem: AttentionProblem) -> float:
    stats = problem.mask
    rows_per_strip = min(CELL, problem.q_len)
    ns = rows_per_strip * (stats.strips * costs.row_row + stats.cells * costs.row_cell)
    ns += stats.kept * (costs.row_key + costs.row_key_dim * problem.head_dim)
    return ns * problem.repeats


def _block_wise_ns(costs: CpuCosts, problem: AttentionProblem) -> float:
    stats, dim = problem.mask, problem.head_dim
    ns = stats.cells * (costs.block_cell + costs.block_cell_dim * dim) + stats.partial * costs.block_partial
    packed = problem.batch * problem.kv_heads * problem.kv_len * dim * costs.pack_per_key
    return ns * problem.repeats + packed
