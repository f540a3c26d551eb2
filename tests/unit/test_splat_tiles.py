"""SPLAT's tiles by themselves: they cover what a mask keeps, with as few as the spans allow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splat_problems import MIXED

from stof_kernels.baselines.splat_kernels import acsr as formats
from stof_kernels.baselines.splat_kernels.build import from_dense
from stof_kernels.baselines.splat_kernels.tiling import place_tiles, row_blocks

SHAPES = [(16, 16), (32, 64), (64, 32), (64, 64)]
TILED = {
    "window 22": formats.windowed(512, 22),
    "window 45": formats.windowed(512, 45),
    "causal window": formats.causal_windowed(300, 64),
    "causal": formats.prefix(300, np.arange(300) + 1),
    "blocked": formats.blocked(320, 32),
    "strided": formats.strided(300, 7),
    "dilated": formats.dilated(301, 22, 2),
    "mixed": from_dense(torch.from_numpy(MIXED)),
}


def covered(acsr, blocks, width, anchors) -> np.ndarray:
    hit = np.zeros((acsr.rows, acsr.columns), bool)
    at = np.arange(blocks.positions) if blocks.order is None else blocks.order
    for position, column, step in anchors.tolist():
        inside = at[position : position + blocks.height]
        columns = column + step * np.arange(width)
        hit[np.ix_(inside[inside >= 0], columns[columns < acsr.columns])] = True
    return hit


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("name", TILED)
def test_tiles_cover_every_kept_position_and_are_no_more_than_the_spans_need(name, height, width):
    acsr = TILED[name]
    blocks = row_blocks(acsr, height)
    tiles = place_tiles(acsr, blocks, width)
    assert not (acsr.to_dense() & ~covered(acsr, blocks, width, tiles.anchors)).any()
    spans = -(-(blocks.end - blocks.start) // blocks.step)
    assert tiles.naive == int((-(-spans // width)).sum())
    assert tiles.bound <= len(tiles.anchors) <= tiles.naive
    assert tiles.poset is None or len(tiles.anchors) == min(tiles.naive, tiles.poset)
    assert not (acsr.to_dense() & ~covered(acsr, blocks, width, tiles.anchors[1:])).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1, 1, 2, 3]), st.integers(0, 60), st.integers(0, 25)), min_size=1, max_size=70),
    st.sampled_from([(4, 4), (8, 4), (4, 16)]),
)
def test_any_progressions_are_covered(entries, shape):
    keep = np.zeros((len(entries), 70), bool)
    for row, (a, b, n) in enumerate(entries):
        keep[row, b : b + a * n : a] = True
    acsr = from_dense(torch.from_numpy(keep))
    blocks = row_blocks(acsr, shape[0])
    tiles = place_tiles(acsr, blocks, shape[1])
    assert not (keep & ~covered(acsr, blocks, shape[1], tiles.anchors)).any()
    assert tiles.bound <= len(tiles.anchors) <= tiles.naive
    order = np.arange(blocks.positions) if blocks.order is None else blocks.order
    assert sorted(order[order >= 0].tolist()) == list(range(len(entries)))


def test_poset_anchors_save_tiles_where_a_band_does_not_fit_the_rows_blocks():
    acsr = formats.windowed(2048, 45)
    tiles = place_tiles(acsr, row_blocks(acsr, 64), 64)
    assert (tiles.naive, tiles.poset, tiles.bound, len(tiles.anchors)) == (94, 73, 64, 73)
    fits = place_tiles(formats.windowed(2048, 64), row_blocks(formats.windowed(2048, 64), 64), 64)
    assert fits.poset is None  # no placement can have fewer than the naive one
    assert fits.naive == fits.bound == 94


def test_work_grows_linearly_with_the_length_at_a_fixed_window():
    counts = []
    for size in (2048, 4096):
        acsr = formats.windowed(size, 45)
        counts.append(len(place_tiles(acsr, row_blocks(acsr, 32), 32).anchors))
    assert counts[1] / counts[0] == pytest.approx(2, rel=0.02)


def test_aligned_rows_of_a_dilated_window_make_a_narrow_band():
    """Columns of one remainder, counted in steps, are a window: half the tiles of the same window walked column by column."""
    dilated, dense = formats.dilated(1024, 32, 2), formats.windowed(1024, 64)
    aligned, plain = (place_tiles(a, row_blocks(a, 16), 16) for a in (dilated, dense))
    assert len(aligned.anchors) <= 0.6 * len(plain.anchors)
