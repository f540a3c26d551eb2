"""Tile sizes worth trying for a matrix product: a rough roofline of one block orders them, measuring decides.

A block is bound by its share of the matrix rate or by what it pulls through its own port to the L2 cache; blocks beyond the
number of multiprocessors come in waves. The rates are an H200's (780 TFLOP/s dense fp16 over 132 multiprocessors, 64 bytes a
clock from L2 for each); only their ratio matters for the order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch

from .base import Setting, setting

_FLOP_PER_US, _BYTES_PER_US = 5.9e6, 110e3  # of one multiprocessor
_LATENCY_US = 0.6  # of one trip to memory, hidden by as many stages as there are
_MEMORY_BYTES_PER_US, _CACHED = 4.3e6, 40e6  # of the card, and what its L2 cache keeps of partial results
_ROUNDS = 4
_REGISTERS = 168  # of a thread by the estimate of `_registers`; Triton 3.6's kernels spill from 176 on
_MOST_PARTS, _WASTE = 64, 1.15  # parts of a chain, and their width together by the inner width
_DEEP = 12  # stages at most
# Share of the matrix rate that tiles of this area reach; below 64 rows there is no warpgroup instruction.
_EFFICIENCY = {256: 0.85, 128: 0.75, 64: 0.6}


@dataclass(frozen=True)
class Device:
    """What bounds tiles: multiprocessors, shared memory per block in bytes."""

    multiprocessors: int = 128
    shared: int = 96 * 1024  # what the smallest of the supported cards gives one block


@lru_cache(maxsize=16)
def device_of(device: torch.device) -> Device:
    """Limits of a card; the smallest supported ones where kernels are interpreted."""
    if device.type != "cuda":
        return Device()
    found = torch.cuda.get_device_properties(device)
    return Device(found.multi_processor_count, found.shared_memory_per_block_optin)


def power_of_two(n: int) -> int:
    """The next power of two from 16 on, the smallest tile that all kernels accept."""
    return max(16, 1 << (n - 1).bit_length())


def candidates(
    rows: int, columns: int, depth: int, count: int, sides: int, size: int, device: Device, most: int = 15
) -> list[Setting]:
    """Settings BM, BN, BK, warps, stages for ``sides`` products side by side of ``count`` accumulators each, best guess first.

    ``size`` is the bytes of an operand's element.
    """
    ranked = []
    # Where the largest tiles go round several times anyway, smaller ones only read more: up to 90 % slower on an H200.
    crowded = -(-rows // 128) * -(-columns // 128) * sides * count >= _ROUNDS * device.multiprocessors
    for m in (16, 32, 64, 128, 256):
        for n in (16, 32, 64, 128, 256):
            if m > max(16, power_of_two(rows)) or n > power_of_two(columns) or m * n * count > 128 * 256 or m * n < 512:
                continue
            if crowded and min(m, n * count) < 128:
                continue
            blocks = -(-rows // m) * -(-columns // n) * sides
            ranked.append((_cost(m, n, blocks, depth, count, size, device), m, n, blocks > device.multiprocessors))
    found: list[Setting] = []
    for _, m, n, many in sorted(ranked):
        found += _variants(m, n, depth, count, size, device, many)
    return found[:most]


def _cost(m: int, n: int, blocks: int, depth: int, count: int, size: int, device: Device) -> float:
    efficiency = _EFFICIENCY.get(min(m, n * count, 256), 0.5) if m >= 64 else 0.25
    work = 2 * m * n * count * depth / (_FLOP_PER_US * efficiency)
    moved = (m + n * count) * depth * size / _BYTES_PER_US
    return -(-blocks // device.multiprocessors) * max(work, moved) + _LATENCY_US


def _variants(m: int, n: int, depth: int, count: int, size: int, device: Device, many: bool) -> list[Setting]:
    """Ways to feed a tile: short pipelines where several blocks share a multiprocessor, deep ones where one is alone.

    A pipeline has one stage fewer on its way, so with one more than there are steps everything is asked for at once.
    """
    warps = 8 if m * n * count > 64 * 128 and m >= 64 else 4
    ways = ((64, 3), (64, 4)) if many or m * n * count >= 128 * 128 else ((64, 5), (128, 4), (128, _DEEP))
    found = []
    for step, stages in ways:
        step = min(step, power_of_two(depth))
        if depth % step:
            step = next((s for s in (64, 32, 16) if depth % s == 0), step)
        bytes_ = (m + n * count) * step * size
        stages = min(stages, device.shared // bytes_, depth // step + 1)
        if stages >= 2:
            found.append(setting(BM=m, BN=n, BK=step, warps=warps, stages=stages))
    if found and m * n * count == 128 * 128:
        found.append(setting(**{**dict(found[0]), "warps": 4}))
    return list(dict.fromkeys(found))


def chains(
    rows: int, depth: int, inner: int, columns: int, count: int, size: int, device: Device, most: int = 8
) -> list[Setting]:
    """Settings of two products in a row whose inner width is cut into parts, best guess first.

    BM rows, ``slices`` of BH inner columns a part, BN columns of the result at a time, BK deep steps. ``count`` products come
    first; ``size`` is the bytes of an operand's element.
    """
    ranked: dict[tuple[int, int], tuple[float, Setting]] = {}
    step = next((s for s in (64, 32, 16) if depth % s == 0), min(64, power_of_two(depth)))
    for m, width, slices in itertools.product((16, 32, 64, 128), (16, 32, 64, 128, 256), (4, 3, 2, 1)):
        span = width * slices
        parts = -(-inner // span)
        if m > max(16, power_of_two(rows)) or not 2 <= parts <= _MOST_PARTS or parts * span > _WASTE * inner:
            continue
        warps = 8 if m == 128 or m * width * count > 64 * 128 else 4
        wide = min(128 if span <= 256 else 64, power_of_two(columns))
        stage = max((m + count * width) * step, span * wide) * size
        # The inner activation stays in registers where each warp has rows of its own, else it goes through shared memory.
        own = 16 * warps <= m
        held = m * span * size
        stages = min(4, (device.shared - 4 * m * wide - (0 if own else held)) // stage)
        if stages < 2 or _registers(m, width, slices, wide, count, warps, stage, held if own else 0) > _REGISTERS:
            continue
        cost = _chain_cost(m, width, slices, parts, rows, depth, columns, count, size, device)
        values = {"parts": parts, "BM": m, "BH": width, "slices": slices, "BN": wide, "BK": step}
        # Of one part's width the widest slices come last: they read the rows least often.
        ranked[m, span] = cost, setting(**values, warps=warps, stages=stages)
    if not ranked and inner > 16:
        least = {"BM": 16, "BH": 16, "slices": 1, "BN": 16, "BK": 16, "warps": 4, "stages": 2}
        return [setting(parts=-(-inner // 16), **least)]
    return [found for _, found in sorted(ranked.values())[:most]]


def _registers(m: int, width: int, slices: int, wide: int, count: int, warps: int, stage: int, held: int) -> float:
    """Registers of a thread for accumulators, the inner activation (``held`` bytes of a block) and addresses of a stage."""
    lanes = 32 * warps
    first = m * width * count + held / 4 * (slices - 1) / slices
    copies = 24 if held and slices > 1 else 0
    return max(first, m * wide + held / 4) / lanes + 2 * stage / (16 * lanes) + copies


def _chain_cost(
    m: int,
    width: int,
    slices: int,
    parts: int,
    rows: int,
    depth: int,
    columns: int,
    count: int,
    size: int,
    device: Device,
) -> float:
    """Microseconds of both passes: what a block multiplies or moves, and the partial results on their way back."""
    blocks, span = -(-rows // m) * parts, width * slices
    efficiency = (0.6 if m >= 64 else 0.3) * min(1.0, (width + 64) / 128)
    work = 2 * m * span * (count * depth + columns) / (_FLOP_PER_US * efficiency)
    moved = (slices * m * depth + span * (count * depth + columns)) * size + m * columns * 4
    partial = parts * rows * columns * 4
    back = partial / (device.multiprocessors * _BYTES_PER_US)
    if partial > _CACHED:
        back += 2 * partial / _MEMORY_BYTES_PER_US
    return -(-blocks // device.multiprocessors) * (max(work, moved / _BYTES_PER_US) + _LATENCY_US) + back + _LATENCY_US
