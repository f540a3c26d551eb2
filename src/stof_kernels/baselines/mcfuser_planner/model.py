"""The analytical model: device time of a candidate from its memory traffic, its arithmetic and how well it fills the device.

t = (t_mem + t_comp) * alpha; t_mem = bytes of all loads and stores over peak bandwidth, t_comp = FLOP over peak rate, alpha =
(blocks + multiprocessors) / blocks. No cache, no overlap, no occupancy. [paper]
"""

from __future__ import annotations

import itertools
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from .chain import Chain, Peaks, Tiles
from .program import Statement
from .pruning import Candidate, buildable_tiles, fits_shared


@dataclass(frozen=True)
class Estimate:
    """Bytes and FLOP of all chains, blocks of the launch, and the predicted seconds."""

    bytes: int
    flops: int
    blocks: int
    seconds: float


def traffic(candidate: Candidate, statement: Statement) -> int:
    """Bytes that a load or store moves in one chain: tile times the product of the extents around it. [paper]"""
    tile = candidate.tiles.elements(statement.tensor) * candidate.chain.element_bytes
    return tile * candidate.program.repeats(statement)


def arithmetic(candidate: Candidate, statement: Statement) -> int:
    """FLOP of a product in one chain: 2 * tile of its three loops times the extents around it. [paper]"""
    inner = {"C": "mnk", "E": "mnh"}[statement.tensor]
    product = 2
    for loop in inner:
        product *= candidate.tiles.size(loop)
    return product * candidate.program.repeats(statement)


def estimate(candidate: Candidate, peaks: Peaks) -> Estimate:
    """The model's prediction; the elementwise step costs nothing in it, the mask's loads count like any other."""
    batch, program = candidate.chain.batch, candidate.program
    moved = batch * sum(traffic(candidate, s) for s in program.statements if s.kind in "LS")
    flops = batch * sum(arithmetic(candidate, s) for s in program.statements if s.kind == "C")
    blocks = batch * program.blocks
    return Estimate(moved, flops, blocks, _seconds(moved, flops, blocks, peaks))


def unfused_seconds(chain: Chain, peaks: Peaks) -> float:
    """Two separate products by the same model, each with its best tiles; C is written once and read once more. [ours]

    Sums of the chain's own step are left out, as in `estimate`.
    """
    first = _product_seconds(chain.m, chain.n, chain.k, chain, peaks)
    return first + _product_seconds(chain.m, chain.h, chain.n, chain, peaks)


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's coefficient of two series of at least two different values each; equal values share their mean rank."""
    return statistics.correlation(_ranks(predicted), _ranks(measured))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [(bisect_left(ordered, v) + bisect_right(ordered, v) - 1) / 2 for v in values]


def _product_seconds(m: int, n: int, k: int, chain: Chain, peaks: Peaks) -> float:
    """Best prediction of one product (m, n, k): every block loads k-long strips of both operands and stores its tile."""
    best = float("inf")
    for tm, tn in itertools.product(buildable_tiles(m), buildable_tiles(n)):
        if not fits_shared(Tiles(tm, tn, 16, 16), peaks.shared_bytes, chain.element_bytes):
            continue
        blocks = -(-m // tm) * -(-n // tn)
        moved = chain.element_bytes * (blocks * (tm + tn) * k + m * n)
        flops = 2 * blocks * tm * tn * k
        best = min(best, _seconds(chain.batch * moved, chain.batch * flops, chain.batch * blocks, peaks))
    return best


def _seconds(moved: int, flops: int, blocks: int, peaks: Peaks) -> float:
    alpha = (blocks + peaks.units) / blocks
    return (moved / peaks.bytes_per_s + flops / peaks.flops_per_s) * alpha
