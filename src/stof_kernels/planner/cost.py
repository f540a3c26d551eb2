"""Predicted time of a configuration, from the mask's statistics and measured unit costs."""

from __future__ import annotations

from .config import ROW_WISE, KernelConfig
from .device import DeviceSpec
from .problem import CELL, DTYPE_BYTES, AttentionProblem


def predict_us(config: KernelConfig, device: DeviceSpec, problem: AttentionProblem) -> float:
    """Predicted microseconds of one call; see `CpuCosts` for where the unit costs come from."""
    costs = device.cpu
    if costs is None:
        raise ValueError(f"planner: no cost model for {device.name}, allowed: a DeviceSpec with unit costs")
    work = _row_wise_ns(costs, problem) if config.kernel == ROW_WISE else _block_wise_ns(config, costs, problem)
    # Strips are dealt to threads one by one, so the longest possible imbalance is one average strip.
    tasks = max(1.0, problem.mask.strips * problem.repeats)
    rounds = -(-tasks // device.units) / tasks
    return (costs.call + work * rounds) / 1000


def _row_wise_ns(costs, problem: AttentionProblem) -> float:
    stats, dim = problem.mask, problem.head_dim
    rows = stats.strips * CELL
    ns = rows * costs.row_row + stats.cells * CELL * costs.row_cell
    ns += stats.kept * (costs.row_key + costs.row_key_dim * dim * DTYPE_BYTES[problem.dtype] / 4)
    return ns * problem.repeats


def _block_wise_ns(config: KernelConfig, costs, problem: AttentionProblem) -> float:
    stats, dim = problem.mask, problem.head_dim
    # A strip's cells are taken kv_chunk keys at a time; a last, shorter chunk costs its bookkeeping in full.
    per_chunk = config.kv_chunk // CELL
    per_strip = stats.cells / stats.strips if stats.strips else 0.0
    chunks = stats.strips * -(-per_strip // per_chunk)
    ns = stats.cells * (costs.block_cell + costs.block_cell_dim * dim) + stats.partial * costs.block_partial
    ns += (stats.strips + chunks) * costs.block_strip * dim
    packed = problem.batch * problem.kv_heads * problem.kv_len * dim * costs.pack_per_key
    return ns * problem.repeats + packed
