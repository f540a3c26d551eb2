"""Tile sizes worth trying for a matrix product: a rough roofline of one block orders them, measuring decides.

A block is bound by its share of the matrix rate or by what it pulls through its own port to the L2 cache; blocks beyond the
number of multiprocessors come in waves. The rates are an H200's (780 TFLOP/s dense fp16 over 132 multiprocessors, 64 bytes a
clock from L2 for each); only their ratio matters for the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .base import Setting, setting

FLOP_PER_US, BYTES_PER_US = 5.9e6, 110e3  # of one multiprocessor
LATENCY_US = 0.6  # of one trip to memory, hidden by as many stages as there are
_ROUNDS = 4
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
    work = 2 * m * n * count * depth / (FLOP_PER_US * efficiency)
    moved = (m + n * count) * depth * size / BYTES_PER_US
    return -(-blocks // device.multiprocessors) * max(work, moved) + LATENCY_US


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
