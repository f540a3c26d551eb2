"""SPLAT's format by itself: generators, what the builder makes of masks, and what it refuses by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splat_problems import EXPRESSIBLE, K, Q, problem, rows

from stof_kernels import masks
from stof_kernels.baselines import Unsupported
from stof_kernels.baselines.inputs import dense_keep
from stof_kernels.baselines.splat_kernels import acsr as formats
from stof_kernels.baselines.splat_kernels.build import acsr_of, from_dense, pieces_of
from stof_kernels.baselines.splat_kernels.tiling import row_blocks

GENERATED = {
    "windowed": (formats.windowed(48, 5), abs(Q - K) <= 5),
    "causal_windowed": (formats.causal_windowed(48, 7), (K <= Q) & (Q - K <= 7)),
    "blocked": (formats.blocked(48, 8), (K // 8 == Q // 8) | (K // 8 == Q // 8 - 1)),
    "strided": (formats.strided(48, 5), Q % 5 == K % 5),
    "strided, one column a row": (formats.strided(48, 30), Q % 30 == K % 30),
    "causal": (formats.prefix(48, np.arange(48) + 1), K <= Q),
    "dilated": (formats.dilated(48, 4, 3), (abs(Q - K) <= 12) & ((Q - K) % 3 == 0)),
    "causal dilated": (formats.dilated(48, 4, 2, causal=True), (K <= Q) & (Q - K <= 8) & ((Q - K) % 2 == 0)),
}  # fmt: skip


def test_a_window_of_six_rows_by_hand():
    window = formats.windowed(6, 1)
    assert rows(window) == [(1, 0, 2), (1, 0, 3), (1, 1, 3), (1, 2, 3), (1, 3, 3), (1, 4, 2)]
    assert (window.width, window.kept) == (3, 16)
    assert window.slot(2, 3) == 2
    assert window.slot(2, 4) is None  # maps to slot 3, behind the row's last
    blocks = row_blocks(window, 2)
    assert blocks.order is None
    assert blocks.start.tolist() == [0, 1, 3]
    assert (blocks.end - 1).tolist() == [2, 4, 5]


def test_blocks_and_strides_of_six_rows_by_hand():
    blocked = formats.blocked(6, 2)
    assert rows(blocked) == [(1, 0, 2)] * 2 + [(1, 0, 4)] * 2 + [(1, 2, 4)] * 2
    assert blocked.width == 4
    strided = formats.strided(6, 3)
    assert rows(strided) == [(3, i % 3, 2) for i in range(6)]
    blocks = row_blocks(strided, 4)
    assert blocks.order.tolist() == [0, 3, -1, -1, 1, 4, -1, -1, 2, 5, -1, -1]
    assert (blocks.step.tolist(), blocks.start.tolist(), blocks.end.tolist()) == ([3] * 3, [0, 1, 2], [6, 7, 8])


@pytest.mark.parametrize("name", GENERATED)
def test_generators_round_trip_and_agree_with_the_builder(name):
    made, dense = GENERATED[name]
    assert np.array_equal(made.to_dense(), dense)
    assert rows(from_dense(torch.from_numpy(dense))) == rows(made)
    assert made.metadata_bytes == 12 * 48  # at most 16 a row; CSR would take 4 for each kept position
    assert all((made.slot(i, j) is not None) == dense[i, j] for i in range(0, 48, 7) for j in range(48))


@pytest.mark.parametrize("length", [1, 7, 64, 131])
@pytest.mark.parametrize("family", EXPRESSIBLE)
def test_acsr_of_a_pattern_is_the_pattern(family, length):
    p = problem(family, length)
    found = acsr_of(p)
    assert np.array_equal(found.to_dense(), dense_keep(p)[0, 0].numpy())
    assert rows(found) == rows(from_dense(dense_keep(p)[0, 0]))


@pytest.mark.parametrize(
    "pattern", [masks.sliding_window(500), masks.causal(-9), masks.causal(9), masks.dilated(0, 3), masks.dilated(90, 7)]
)
def test_extreme_parameters_stay_inside_the_matrix(pattern):
    p = problem(pattern, 50)
    assert np.array_equal(acsr_of(p).to_dense(), dense_keep(p)[0, 0].numpy())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 30), st.integers(0, 12)), min_size=1, max_size=40))
def test_any_progressions_round_trip(entries):
    keep = torch.zeros(len(entries), 40, dtype=torch.bool)
    for row, (a, b, n) in enumerate(entries):
        keep[row, b : b + a * n : a] = True
    assert np.array_equal(from_dense(keep).to_dense(), keep.numpy())


@pytest.mark.parametrize(
    ("columns", "runs"),
    [((3, 4, 6), "2 runs"), ((0, 2, 4, 7), "4 runs"), ((1, 2, 40, 41), "2 runs"), ((5, 8, 11, 12), "3 runs")],
)
def test_a_row_that_is_no_progression_is_named(columns, runs):
    keep = torch.eye(50, dtype=torch.bool)
    keep[23] = False
    keep[23, list(columns)] = True
    with pytest.raises(Unsupported, match=rf"one arithmetic progression .* row 23 keeps \d of 50 columns in {runs}"):
        from_dense(keep)


@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize("family", ["longformer", "bigbird", "artifact_longformer", "artifact_bigbird", "strided"])
def test_masks_that_acsr_cannot_hold_are_unsupported(family, length):
    with pytest.raises(Unsupported, match="one arithmetic progression of columns per row; row"):
        acsr_of(problem(family, length))


def test_one_mask_serves_all_heads():
    same = masks.predicate(lambda b, h, q, kv: (kv <= q) & (h >= 0))
    assert rows(acsr_of(problem(same, 20))) == rows(acsr_of(problem("causal", 20)))
    differing = masks.predicate(lambda b, h, q, kv: kv <= q + h)
    with pytest.raises(Unsupported, match="one mask for all batch entries and heads"):
        acsr_of(problem(differing, 20, heads=3, kv_heads=3))


def test_the_mask_is_read_in_strips(monkeypatch):
    from stof_kernels.baselines.splat_kernels import build

    p = problem("document", 64)
    whole = rows(acsr_of(p))
    monkeypatch.setattr(build, "_STRIP_POSITIONS", 7 * 64)
    assert rows(acsr_of(p)) == whole
    pieces = pieces_of(problem("longformer", 64))
    assert np.array_equal(
        sum(piece.to_dense().astype(int) for piece in pieces), dense_keep(problem("longformer", 64))[0, 0]
    )
    with pytest.raises(Unsupported, match="row 51 keeps"):
        acsr_of(problem(masks.predicate(lambda b, h, q, kv: (kv <= q) & ((q < 51) | (kv != 3))), 64))
