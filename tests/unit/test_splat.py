"""SPLAT: its format and tiles by themselves, and its kernels in Triton's interpreter against the reference."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stof_kernels import masks
from stof_kernels.baselines import Problem, Unsupported, get
from stof_kernels.baselines.inputs import dense_keep, make_tensors
from stof_kernels.baselines.splat_kernels import acsr as formats
from stof_kernels.baselines.splat_kernels.build import acsr_of, from_dense, pieces_of
from stof_kernels.baselines.splat_kernels.tiling import place_tiles, row_blocks
from stof_kernels.benchmarking.check import TOLERANCE, relative_error
from stof_kernels.provenance import PACKAGE_ROOT

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs in Triton's interpreter; on a GPU tests/kernels/test_cuda_splat.py runs instead",
)
EXPRESSIBLE = (
    "causal",
    "sliding_window",
    "artifact_sliding_window",
    "artifact_dilated",
    "dilated",
    "prefix_lm",
    "document",
    "full",
)
Q, K = np.arange(48)[:, None], np.arange(48)[None]
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
# Strides 2 and 3 side by side, rows of one column and rows of none.
MIXED = np.where(
    Q % 4 == 0, K % 2 == Q // 4 % 2, np.where(Q % 4 == 1, (K % 3 == 1) & (K > Q // 2), (K == Q) & (Q % 4 == 2))
)
PATTERNS = {
    "blocked": lambda b, h, q, kv: (q // 16 == kv // 16) | (q // 16 == kv // 16 + 1),
    "strided": lambda b, h, q, kv: q % 5 == kv % 5,
    "mixed": lambda b, h, q, kv: torch.from_numpy(MIXED)[q.clamp(max=47), kv.clamp(max=47)] & (q < 48) & (kv < 48),
    "empty": lambda b, h, q, kv: (q < 0) & (kv < 0),
}


def problem(pattern, length=96, dtype="float32", **changes) -> Problem:
    pattern = masks.get(pattern, length) if isinstance(pattern, str) else pattern
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 32, "q_len": length, "kv_len": length, "seed": 3}
    return Problem(pattern, dtype=dtype, device="cpu", **sizes | changes)


def rows(acsr) -> list[tuple[int, int, int]]:
    return [tuple(int(x) for x in row) for row in zip(acsr.stride, acsr.offset, acsr.count, strict=True)]


# ---- The format -------------------------------------------------------------------------------------------------------


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


# ---- Tiles ------------------------------------------------------------------------------------------------------------

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


# ---- The kernels ------------------------------------------------------------------------------------------------------


def attention(p: Problem, choice=None, simt=False, poison=None):
    from stof_kernels.baselines.splat_kernels.attention import Attention
    from stof_kernels.baselines.splat_kernels.stages import Stored

    tensors = make_tensors(p)
    found = Attention([Stored([acsr_of(p)], "cpu")], *dataclasses.astuple(tensors), p.scale, simt, choice and [choice])
    if poison is not None:
        for job in found.jobs:
            job.scores.fill_(poison)
            job.probs.fill_(poison)
    return found, tensors


def choice(sddmm=(16, 16, 2), softmax=(1, 1), spmm=(16, 16, 2)):
    from stof_kernels.baselines.splat_kernels.attention import Choice
    from stof_kernels.baselines.splat_kernels.stages import Sddmm, Softmax, Spmm

    return Choice(Sddmm(*sddmm), Softmax(*softmax), Spmm(*spmm))


def assert_right(p: Problem, found, tensors, tolerance=None):
    out = found.run()
    error = relative_error(p, tensors, p.pattern, out)
    assert out.dtype == tensors.q.dtype
    if p.pattern.family == "predicate" and not bool(dense_keep(p).any()):
        assert not out.any()
    else:
        assert error <= (tolerance or TOLERANCE[p.dtype])


@interpreted
@pytest.mark.parametrize("family", EXPRESSIBLE)
def test_the_method_matches_the_reference(family):
    p = problem(family, 80, heads=2, kv_heads=2)
    prepared = get("splat").prepare(p, tensors := make_tensors(p))
    assert prepared.exact
    assert prepared.applied is p.pattern
    assert relative_error(p, tensors, p.pattern, prepared.run()) <= TOLERANCE["float32"]
    assert "R-SDDMM 64x64" in prepared.note
    (plan,) = prepared.mask_build()
    assert plan.mask.width == acsr_of(p).width


@interpreted
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("length", [50, 64])
def test_row_maps_blocks_and_empty_rows(name, length):
    """Poisoned values show that nothing but a row's own slots is ever used."""
    p = problem(masks.predicate(PATTERNS[name]), length)
    assert_right(p, *attention(p, choice(), poison=float("nan")))


@interpreted
@pytest.mark.parametrize("family", ["causal", "sliding_window", "dilated"])
@pytest.mark.parametrize(
    "config",
    [((16, 64, 2), (4, 1), (16, 128, 2)), ((64, 32, 2), (16, 2), (64, 32, 2)), ((32, 64, 4), (1, 4), (32, 16, 4))],
    ids=str,
)
def test_every_kind_of_tile_gives_the_same_result(family, config):
    p = problem(family, 90)
    assert_right(p, *attention(p, choice(*config), poison=float("inf")))


@interpreted
@pytest.mark.parametrize("head_dim", [8, 40, 128, 136])
def test_head_dims(head_dim):
    p = problem("sliding_window", 48, head_dim=head_dim)
    assert_right(p, *attention(p, choice((32, 32, 2), (4, 1), (32, 32, 2))))


@interpreted
@pytest.mark.parametrize(("dtype", "simt"), [("float16", False), ("float16", True), ("bfloat16", True)])
def test_half_precision(dtype, simt):
    """The interpreter has no bfloat16 product (it multiplies the bit patterns); the card's test covers it."""
    p = problem("sliding_window", 64, dtype)
    found, tensors = attention(p, choice((32, 32, 2), (4, 1), (32, 32, 2)), simt)
    assert_right(p, found, tensors, {"float16": 2e-3, "bfloat16": 1e-2}[dtype])
    assert found.jobs[0].scores.dtype == tensors.q.dtype  # scores are stored in the inputs' precision


@interpreted
def test_the_stages_leave_scores_and_probabilities_in_acsr():
    p = problem("sliding_window", 40)
    found, tensors = attention(p, choice(), poison=float("nan"))
    found.run()
    (job,), acsr = found.jobs, acsr_of(p)
    scores = (tensors.q @ tensors.k.transpose(-1, -2))[0, 0] * p.scale
    probs = scores.masked_fill(~dense_keep(p)[0, 0], -torch.inf).softmax(-1)
    for i in range(acsr.rows):
        columns = [int(acsr.offset[i]) + j for j in range(acsr.count[i])]
        torch.testing.assert_close(job.scores[0, i, : len(columns)], scores[i, columns])
        torch.testing.assert_close(job.probs[0, i, : len(columns)], probs[i, columns])
        assert job.scores[0, i, acsr.count[i] :].isnan().all()  # R-SDDMM wrote no other slot


@interpreted
def test_a_call_is_three_kernels_over_one_array_of_values_each_way(monkeypatch):
    from stof_kernels.baselines.splat_kernels import stages

    launches = []

    class Counted:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(stages.kernels, name)

        def __getitem__(self, grid):
            launches.append((self.name, grid))
            return self.kernel[grid]

    proxies = {name: Counted(name) for name in ("sddmm", "softmax", "spmm")}
    p = problem("sliding_window", 64, "float16", batch=2, heads=2, kv_heads=2)
    found, _ = attention(p, choice())
    for name, proxy in proxies.items():
        monkeypatch.setattr(stages.kernels, name, proxy)
    found.run()
    (plan,), (job,) = found.plans, found.jobs
    assert launches == [("sddmm", (plan.sddmm.tiles, 4)), ("softmax", (64, 4)), ("spmm", (1, 4, 4))]
    assert job.scores.nbytes == job.probs.nbytes == 2 * 2 * 64 * 24 * 2  # W = 17, rows on 16-byte boundaries
    assert plan.mask.pitch - plan.mask.width < 8
    stored = plan.mask.stride.nbytes + plan.mask.offset.nbytes + plan.mask.count.nbytes
    assert stored == 12 * 64


@interpreted
def test_a_missing_tile_would_show():
    p = problem("causal", 64)
    found, tensors = attention(p, choice(), poison=0.0)
    found.plans[0].sddmm.tiles -= 1
    assert relative_error(p, tensors, p.pattern, found.run()) > 1e-3


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("capability", "flags"), [("80", ()), ("90", ("FROM_ZERO=1",)), ("90", ("MAPPED=1", "STRIDED=1"))], ids=str
)
def test_kernels_compile_to_tensor_cores_of_their_time(capability, flags, tmp_path):
    """Warp-level products also on Hopper, whose own instructions SPLAT never had; whole vectors where slots are columns."""
    kernels = PACKAGE_ROOT / "baselines/splat_kernels/kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, Path(__file__).with_name("splat_compile.py"), kernels, capability, *flags]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = set(ran.stdout.split())
    assert {"sddmm:mma.sync", "spmm:mma.sync", "softmax:st.global.v4"} <= found
    assert ("sddmm:st.global.v4" in found) == ("FROM_ZERO=1" in flags)
    assert not [mark for mark in found if "wgmma" in mark]


# ---- Unions of ACSRs, ours ----------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("family", ["longformer", "artifact_longformer", "bigbird"])
def test_unions_match_the_reference_and_say_whose_they_are(family):
    length = 200 if family == "artifact_longformer" else 144
    p = problem(family, length)
    prepared = get("splat_pieces").prepare(p, tensors := make_tensors(p))
    assert relative_error(p, tensors, p.pattern, prepared.run()) <= TOLERANCE["float32"]
    assert prepared.note.startswith("our extension: union of ")
    assert len(prepared.mask_build()) in (1, 2)


@pytest.mark.parametrize("family", ["longformer", "artifact_longformer"])
def test_pieces_are_disjoint_and_global_rows_do_not_widen_the_others(family):
    triton = pytest.importorskip("triton")  # noqa: F841
    from stof_kernels.baselines.splat_kernels.attention import store_union

    p = problem(family, 1024)
    pieces, dense = pieces_of(p), dense_keep(p)[0, 0].numpy()
    assert np.array_equal(sum(piece.to_dense().astype(int) for piece in pieces), dense.astype(int))
    short, long = store_union(pieces, "cpu")
    assert sorted([*short.rows, *long.rows]) == list(range(1024))
    assert long.width == 1024
    assert short.width == dense.sum(1)[short.rows].max() <= 129
    assert len(long.pieces) == 1


def test_unions_refuse_what_is_one_acsr_and_what_is_irregular():
    pytest.importorskip("triton")
    for family in ("causal", "dilated"):
        p = problem(family, 64)
        with pytest.raises(Unsupported, match="one ACSR holds this mask: measured as splat"):
            get("splat_pieces").prepare(p, make_tensors(p))
    p = problem("bigbird", 2048, head_dim=8)
    with pytest.raises(Unsupported, match=r"more than 4 runs of columns in a row, .*; first in row 192"):
        get("splat_pieces").prepare(p, make_tensors(p))


# ---- What does not fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"heads": 2}, "one key head per query head"), ({"kv_len": 128}, "masks are square")],
)
def test_problems_that_splat_does_not_have(changes, reason):
    p = problem("causal", 64, **changes)
    for name in ("splat", "splat_simt", "splat_pieces"):
        with pytest.raises(Unsupported, match=reason):
            get(name).prepare(p, make_tensors(p))


def test_values_that_do_not_fit_are_a_row_that_says_so(monkeypatch):
    pytest.importorskip("triton")
    from stof_kernels.baselines.splat_kernels import stages
    from stof_kernels.benchmarking import cell

    mask = stages.Stored([acsr_of(problem("causal", 64))], "cpu")
    genuine = torch.empty

    def empty(*size, **options):
        if len(size) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        return genuine(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(
        MemoryError, match=r"out of memory: scores and probabilities, W = 64, take 0\.0 GB each"
    ) as error:
        mask.empty_values(4, torch.float16)
    assert cell.is_out_of_memory(error.value)
    monkeypatch.setattr(stages, "_INDEX_LIMIT", 64 * 64)
    with pytest.raises(Unsupported, match="64 x 64 values per head, allowed: fewer than 4096"):
        stages.Stored([acsr_of(problem("causal", 64))], "cpu")
    with pytest.raises(Unsupported, match="70000 batch entries times heads, allowed: up to 65535"):
        mask.empty_values(70000, torch.float16)


def test_registered_as_a_labelled_reimplementation():
    for name in ("splat", "splat_simt", "splat_pieces"):
        spec = get(name)
        assert spec.reimplemented
        assert "(reimpl." in spec.label
        assert spec.why_not("mha", "cpu") == "runs on cuda only"
        assert "baselines/splat_kernels" in spec.depends


def test_softmax_programs_hold_whole_rows():
    pytest.importorskip("triton")
    from stof_kernels.baselines.splat_kernels.attention import softmax_candidates

    for width in (1, 17, 129, 1000, 4096, 40000):
        found = softmax_candidates(width)
        assert found
        for config in found:
            assert config.rows == 1 or config.rows * width <= 16384
            assert config.warps & (config.warps - 1) == 0
