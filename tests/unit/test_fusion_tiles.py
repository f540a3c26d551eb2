"""Settings that templates try: every one fits a card, and the first suits the rows."""

from __future__ import annotations

import pytest

from stof_kernels.fusion.templates import tiles
from stof_kernels.fusion.templates.chain_tiles import Chain

H200 = tiles.Device(multiprocessors=132, shared=232448)


@pytest.mark.parametrize(
    ("rows", "depth", "inner", "count"),
    [
        *((rows, h, 4 * h, 1) for rows in (128, 1024, 4096, 32768) for h in (512, 1024)),
        (128, 768, 3072, 1),
        (128, 1024, 2816, 2),
        (18, 40, 72, 1),
    ],
)
def test_every_chain_fits_the_card(rows, depth, inner, count):
    found = [dict(s) for s in Chain(rows, depth, inner, depth, count, 2).settings(H200)]
    assert min(2, rows) <= len(found) <= 8
    assert len({(s["BM"], s["parts"]) for s in found}) == len(found)
    for s in found:
        span = s["BH"] * s["slices"]
        assert inner <= s["parts"] * span <= 1.15 * inner
        tile = max((s["BM"] + count * s["BH"]) * s["BK"], span * s["BN"]) * 2
        assert tile * s["stages"] + s["BM"] * s["BN"] * 4 <= H200.shared
        assert s["BM"] * max(s["BH"] * count, s["BN"]) / (32 * s["warps"]) <= 128
    if rows == 128:  # enough blocks to ask for all weights at once, and partial results that the L2 cache holds
        assert -(-rows // found[0]["BM"]) * found[0]["parts"] >= 88
        assert found[0]["parts"] * rows * depth * 4 <= 40e6


@pytest.mark.parametrize("rows", [1, 122, 128, 4096, 32416])
@pytest.mark.parametrize(
    ("columns", "depth", "count", "sides"), [(768, 768, 1, 3), (2816, 1024, 2, 1), (200, 72, 1, 1)]
)
def test_every_tile_fits_the_card(rows, columns, depth, count, sides):
    found = [dict(s) for s in tiles.candidates(rows, columns, depth, count, sides, 2, H200)]
    assert 0 < len(found) <= 15
    for s in found:
        assert (s["BM"] + s["BN"] * count) * s["BK"] * 2 * s["stages"] <= H200.shared
        assert s["BM"] * s["BN"] * count <= 158 * 256  # float32 accumulators of eight warps
        assert s["BM"] * s["BN"] * count / (32 * s["warps"]) <= 128
        assert s["BM"] <= max(16, tiles.power_of_two(rows))
    best = found[0]
    if rows >= 4096 and sides == 3:
        assert (best["BM"], best["BN"]) == (128, 128)
    if rows == 128 and sides == 3:  # more blocks than one column of tall tiles would give
        assert -(-rows // best["BM"]) * -(-columns // best["BN"]) * sides >= 66
