"""SPLAT's methods: the kernels in Triton's interpreter against the reference, unions of ours, and what does not fit."""

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
from splat_problems import EXPRESSIBLE, MIXED, problem

from stof_kernels import masks
from stof_kernels.baselines import Problem, Unsupported, get
from stof_kernels.baselines.inputs import dense_keep, make_tensors
from stof_kernels.baselines.splat_kernels.build import acsr_of, pieces_of
from stof_kernels.benchmarking.check import TOLERANCE, relative_error
from stof_kernels.provenance import PACKAGE_ROOT

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs in Triton's interpreter; on a GPU tests/kernels/test_cuda_splat.py runs instead",
)
PATTERNS = {
    "blocked": lambda b, h, q, kv: (q // 16 == kv // 16) | (q // 16 == kv // 16 + 1),
    "strided": lambda b, h, q, kv: q % 5 == kv % 5,
    "mixed": lambda b, h, q, kv: torch.from_numpy(MIXED)[q.clamp(max=47), kv.clamp(max=47)] & (q < 48) & (kv < 48),
    "empty": lambda b, h, q, kv: (q < 0) & (kv < 0),
}


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
