"""Predicted time of a configuration, from the mask's statistics and measured unit costs."""

from __future__ import annotations

import math

from .config import HOPPER, ROW_WISE, SHAPES, KernelConfig
from .device import CPU_COSTS, CUDA_BLOCK_COSTS, CUDA_ROW_COSTS, CpuCosts, DeviceSpec
from .problem import CELL, AttentionProblem


def predict_us(config: KernelConfig, device: DeviceSpec, problem: AttentionProblem) -> float:
    """Predicted microseconds of one call; device.py says where the unit costs come from."""
    if device.kind == "cuda":
        return _cuda_us(config, device, problem)
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


def _cuda_us(config: KernelConfig, device: DeviceSpec, problem: AttentionProblem) -> float:
    if config.kernel == ROW_WISE:
        return _cuda_row_wise_us(device, problem)
    shape, stats = SHAPES[config.shape - 1], problem.mask.tiled(config.q_tile)
    costs, width = CUDA_BLOCK_COSTS[shape], problem.head_dim_padded / 64
    if shape in HOPPER:
        width = 1.0 if width <= 1 else 2.0  # its rows are whole blocks of 64 dims
    tiles = stats.key_tiles * problem.repeats
    items = -(-problem.q_len // config.q_tile) * problem.mask.planes * problem.repeats
    chunk = _fair_chunk(tiles, items, device.units * _BLOCKS_PER_UNIT)
    longest = min(stats.longest, chunk)
    slow = _slow_share(problem.mask.kept / max(1, stats.key_tiles * config.q_tile), longest) if costs.tile_slow else 0.0
    all_work = tiles / device.units * (costs.tile + costs.tile_dim * width + costs.tile_slow * slow)
    all_work += items / device.units * (costs.item + costs.item_dim * width)
    if costs.blocks:
        all_work += math.ceil(items / (device.units * costs.blocks)) * costs.turn
    spare = device.units - items
    if costs.halves and longest >= costs.halves and spare > 0:
        longest = max(-(-longest // 2), math.ceil(longest * (1 - spare / items)))
    one_list = longest * (costs.chain + costs.chain_dim * width + costs.chain_slow * slow)
    return costs.launch + _longer(all_work, one_list) + (costs.combine if stats.longest > chunk else 0.0)


def _longer(a: float, b: float) -> float:
    """The longer of two times that pass side by side; where they are about equal, each delays the other."""
    return (a**3 + b**3) ** (1 / 3)


def _slow_share(kept: float, tiles: int) -> float:
    """Share of a list's tiles in which a row of some warp of 16 meets its first key after others did.

    A row keeps ``kept`` keys of a tile on average, here and there (Poisson); the Hopper kernels look for such a row's maximum.
    """
    step = max(1, tiles // 256)
    meets = 1 - math.exp(-kept)
    slow = [1 - (1 - math.exp(-kept * before) * meets) ** 16 for before in range(0, tiles, step)]
    return sum(slow) / max(1, len(slow))


# Thread blocks of the block-wise kernel that a multiprocessor holds, and the shortest pieces that the layout builder cuts lists
# into: csrc/bindings/format_cuda.cpp and csrc/format/cuda/layout.cuh.
_BLOCKS_PER_UNIT = 4
_MIN_CHUNK, _MIN_CHUNK_FEW = 8, 16


def _fair_chunk(tiles: float, items: float, slots: int) -> int:
    """Key tiles after which the layout builder cuts a list: half more than a block's fair share."""
    least = _MIN_CHUNK_FEW if 8 * items <= 3 * slots else _MIN_CHUNK
    return max(math.ceil(1.5 * tiles / slots), least)


def _cuda_row_wise_us(device: DeviceSpec, problem: AttentionProblem) -> float:
    stats, costs, share = problem.mask, CUDA_ROW_COSTS, problem.repeats / device.units
    key = costs.key + costs.key_dim * problem.head_dim_padded / 64
    rows = problem.q_len * stats.planes
    return costs.launch + share * (rows * costs.row + stats.cells * CELL * costs.look + stats.kept * key)
