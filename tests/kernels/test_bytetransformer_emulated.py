"""ByteTransformer's kernels, the very sources, run lane by lane on the CPU by simt/simt.h: indices, barriers, merges, limits.

What a GPU adds is speed and the exact rounding of its tensor cores; those are in test_cuda_bytetransformer.py.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from emulation import SIMT, emulated_library

from stof_kernels.baselines import Unsupported
from stof_kernels.baselines.bytetransformer import launch_of
from stof_kernels.provenance import PACKAGE_ROOT

CSRC = PACKAGE_ROOT / "baselines/csrc/bytetransformer"
D = 64
GUARD = 256  # elements before and behind every output that nothing may touch


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return emulated_library(tmp_path_factory.mktemp("simt"), [SIMT / "bytetransformer.cpp"], [CSRC])


@pytest.fixture(params=["ascending", "descending"])
def emulated(library, request):
    library.set_descending(request.param == "descending")
    return library


class Guarded:
    """An array of NaN (or the given type's largest value) between guards."""

    def __init__(self, *shape, dtype=np.float16):
        count = int(np.prod(shape))
        self._all = np.full(count + 2 * GUARD, np.nan, dtype)
        self.array = self._all[GUARD : GUARD + count].reshape(shape)

    def check(self):
        edges = np.concatenate((self._all[:GUARD], self._all[-GUARD:]))
        assert np.isnan(edges).all(), "written outside of the array"
        return self.array


def pointer(array):
    assert array.flags["C_CONTIGUOUS"]
    return array.ctypes.data_as(ctypes.c_void_p)


def draw(rng, batch, tokens, heads, dim=D, kept=0.3):
    qkv = rng.standard_normal((batch, tokens, 3 * heads * dim)).astype(np.float16)
    bias = (0.5 * rng.standard_normal(3 * heads * dim)).astype(np.float16)
    keep = rng.random((batch, tokens, tokens)) < kept
    keep[:, np.arange(tokens), np.arange(tokens)] = True
    return qkv, bias, keep


def parts_of(qkv, bias, heads, dim):
    """q, k, v (B, H, S, D) in float64, after the bias was added in fp16."""
    batch, tokens, _ = qkv.shape
    biased = (qkv.astype(np.float32) + bias.astype(np.float32)).astype(np.float16).astype(np.float64)
    return biased.reshape(batch, tokens, 3, heads, dim).transpose(2, 0, 3, 1, 4)


def scores_of(q, k, keep):
    return q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) - 10000.0 * ~keep[:, None]


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def expected(qkv, bias, keep, heads, dim=D):
    q, k, v = parts_of(qkv, bias, heads, dim)
    out = softmax(scores_of(q, k, keep)) @ v
    return out.transpose(0, 2, 1, 3).reshape(*qkv.shape[:2], heads * dim)


def error(out, want):
    return np.linalg.norm(out.astype(np.float64) - want) / np.linalg.norm(want)


def run_short(emulated, qkv, bias, keep, heads, dim=D):
    batch, tokens, _ = qkv.shape
    out, mask = Guarded(batch, tokens, heads * dim), keep.astype(np.float16)
    scale = ctypes.c_float(1 / np.sqrt(dim))
    code = emulated.short_attention(
        pointer(qkv), pointer(bias), pointer(mask), pointer(out.array), batch, tokens, heads, dim, scale
    )
    assert code == 0, "this length has no case in simt/bytetransformer.cpp"
    return out.check()


SHORT = [
    *((2, 1, 1, 64), (2, 13, 2, 64), (1, 16, 1, 64), (1, 47, 2, 64), (1, 80, 1, 64), (2, 19, 3, 16), (1, 48, 1, 16)),
    *((1, 81, 1, 64), (1, 97, 1, 64), (2, 128, 1, 64), (1, 171, 2, 64), (1, 257, 1, 64)),
]


@pytest.mark.parametrize(("batch", "tokens", "heads", "dim"), SHORT)
def test_short_kernels_are_right(emulated, batch, tokens, heads, dim):
    qkv, bias, keep = draw(np.random.default_rng(tokens), batch, tokens, heads, dim)
    out = run_short(emulated, qkv, bias, keep, heads, dim)
    assert error(out, expected(qkv, bias, keep, heads, dim)) < 1.5e-3


def test_short_row_without_keys_equals_the_unmasked_row(library):
    qkv, bias, keep = draw(np.random.default_rng(0), 2, 97, 1)
    keep[1, 60] = False
    out = run_short(library, qkv, bias, keep, 1)
    keep[1, 60] = True
    # -10000 takes three digits of the shifted scores in float32.
    assert error(out[1, 60], run_short(library, qkv, bias, keep, 1)[1, 60].astype(np.float64)) < 5e-3


class LongRun:
    """The long path's four kernels, with all buffers; unwritten elements stay NaN."""

    def __init__(self, emulated, qkv, bias, keep, heads, blocks, lengths=None):
        batch, tokens, _ = qkv.shape
        tiles = -(-tokens // 128)
        single = {"dtype": np.float32}
        split, scores = Guarded(3, heads, batch, tokens, D), Guarded(batch, heads, tokens, tokens)
        partials, stats = Guarded(batch, heads, tiles, tokens, 2, **single), Guarded(batch, heads, tokens, 2, **single)
        out, mask = Guarded(batch, tokens, heads * D), keep.astype(np.float16)
        lengths = np.full(batch, tokens, np.int32) if lengths is None else np.asarray(lengths, np.int32)
        emulated.split(pointer(qkv), pointer(bias), pointer(split.array), batch, tokens, heads, D)
        self.split = split.check().copy()
        emulated.long_attention(
            *map(pointer, (split.array, mask, lengths, scores.array, partials.array, stats.array, out.array)),
            batch, tokens, heads, ctypes.c_float(0.125), blocks,
        )  # fmt: skip
        self.scores, self.partials, self.stats, self.out = scores.check(), partials.check(), stats.check(), out.check()


@pytest.mark.parametrize(("batch", "heads", "blocks"), [(1, 2, 1), (2, 1, 7), (1, 1, 40)])
def test_long_path_is_right_step_by_step(emulated, batch, heads, blocks):
    tokens = 392  # four tiles of 128 with the last of 8, seven of 64, and a tail of 8 in steps of 32
    qkv, bias, keep = draw(np.random.default_rng(blocks), batch, tokens, heads)
    run = LongRun(emulated, qkv, bias, keep, heads, blocks)
    q, k, v = parts_of(qkv, bias, heads, D)
    np.testing.assert_array_equal(run.split, np.stack((q, k, v)).swapaxes(1, 2).astype(np.float16))
    exact = scores_of(q, k, keep)
    kept = np.broadcast_to(keep[:, None], exact.shape)
    np.testing.assert_allclose(run.scores[kept], exact[kept], atol=0.02)
    assert (run.scores[~kept] < -9900).all()
    for tile in range(4):
        part = exact[..., 128 * tile : 128 * (tile + 1)]
        top = part.max(-1)
        np.testing.assert_allclose(run.partials[:, :, tile, :, 0], top, atol=0.02)
        weight = np.exp(part - top[..., None]).sum(-1)
        np.testing.assert_allclose(run.partials[:, :, tile, :, 1], weight, rtol=0.04)
    np.testing.assert_allclose(run.stats[..., 0], exact.max(-1), atol=0.02)
    np.testing.assert_allclose(run.stats[..., 1], np.exp(exact - exact.max(-1, keepdims=True)).sum(-1), rtol=0.02)
    assert error(run.out, expected(qkv, bias, keep, heads)) < 1.5e-3


def test_long_row_without_keys_has_scores_rounded_to_eights(library):
    """Stored as fp16, 10000 lower, most scores become alike, and one above 4 stands far above them, as in the original."""
    qkv, bias, keep = draw(np.random.default_rng(3), 1, 392, 2)
    rows = [3, 77, 201, 300]
    keep[0, rows] = False
    out = LongRun(library, qkv, bias, keep, 2, 5).out[0, rows].reshape(4, 2, D).swapaxes(0, 1)
    q, k, v = parts_of(qkv, bias, 2, D)[:, 0]
    shifted = scores_of(q[:, rows], k, np.ones((1, 1), bool)) - 10000
    assert (shifted.max(-1) > -9996).any(), "the draw must hold such a score"
    # Maximum and sum are of the scores before they were rounded.
    top = shifted.max(-1, keepdims=True)
    weights = np.exp(shifted.astype(np.float16) - top) / np.exp(shifted - top).sum(-1, keepdims=True)
    assert error(out, weights @ v) < 3e-3


def test_long_path_ends_where_a_sequence_ends(library):
    qkv, bias, keep = draw(np.random.default_rng(4), 3, 392, 1)
    lengths = [392, 136, 8]
    run = LongRun(library, qkv, bias, keep, 1, 6, lengths)
    for b, length in enumerate(lengths):
        want = expected(qkv[b : b + 1, :length], bias, keep[b : b + 1, :length, :length], 1)
        assert error(run.out[b : b + 1, :length], want) < 1.5e-3
        assert np.isnan(run.out[b, length:]).all()
        assert np.isnan(run.scores[b, :, length:]).all()
        assert np.isnan(run.scores[b, :, :, length:]).all()


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize(
    ("problems", "heads", "blocks"), [(1, 12, 5), (16, 3, 132), (32, 2, 40), (33, 1, 7), (70, 2, 11)]
)
def test_persistent_blocks_meet_every_tile_once(library, problems, heads, blocks, square):
    rng = np.random.default_rng(problems)
    lengths = (8 * rng.integers(0, 60, problems)).astype(np.int32)
    lengths[problems // 2] = 0
    tile = 128 if square else 64
    down = -(-lengths // tile)
    counts = heads * down * (down if square else 1)
    met = np.zeros((int(counts.sum()), 3), np.int32)
    assert library.visit(pointer(lengths), problems, heads, blocks, int(square), pointer(met)) == len(met)
    want = [(p, i, lengths[p]) for p in range(problems) for i in range(counts[p])]
    order = [tuple(want[n]) for first in range(blocks) for n in range(first, len(want), blocks)]
    assert [tuple(row) for row in met] == order


@pytest.mark.parametrize("tokens", [40, 131])  # rows in registers; in shared memory
def test_unfused_softmax_and_merge(emulated, tokens):
    rng = np.random.default_rng(tokens)
    batch, heads = 2, 3
    keep = rng.random((batch, tokens, tokens)) < 0.4
    keep[..., 0] = True
    scores, mask = Guarded(heads, batch, tokens, tokens), keep.astype(np.float16)
    scores.array[:] = rng.standard_normal(scores.array.shape)
    want = softmax(scores.array.astype(np.float64) - 10000.0 * ~keep)
    emulated.softmax(pointer(scores.array), pointer(mask), batch, tokens, heads)
    np.testing.assert_allclose(scores.check(), want, atol=1e-3)
    context, merged = rng.standard_normal((heads, batch, 7, 16)).astype(np.float16), Guarded(batch, 7, heads * 16)
    emulated.merge(pointer(context), pointer(merged.array), batch, 7, heads, 16)
    np.testing.assert_array_equal(merged.check(), context.transpose(1, 2, 0, 3).reshape(batch, 7, heads * 16))


@pytest.mark.parametrize("columns", [128, 768, 1536])  # 1 pair a thread; the same; 2 pairs
def test_layer_norm_of_the_layer(emulated, columns):
    rng = np.random.default_rng(columns)
    x, residual = (rng.standard_normal((5, columns)).astype(np.float16) for _ in range(2))
    bias, gamma, beta = (rng.standard_normal(columns).astype(np.float16) for _ in range(3))
    out = Guarded(5, columns)
    emulated.norm(*map(pointer, (x, bias, residual, gamma, beta, out.array)), 5, columns, ctypes.c_float(1e-6))
    total = x.astype(np.float64) + bias + residual
    normal = (total - total.mean(-1, keepdims=True)) / np.sqrt(total.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out.check(), normal * gamma + beta, atol=2e-2, rtol=2e-3)


def test_gelu_of_the_layer(emulated):
    rng = np.random.default_rng(9)
    x, bias = Guarded(3, 170), rng.standard_normal(170).astype(np.float16)
    x.array[:] = 2 * rng.standard_normal((3, 170))
    y = x.array.astype(np.float64) + bias
    emulated.gelu(pointer(x.array), pointer(bias), 3, 170)
    want = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    np.testing.assert_allclose(x.check(), want, atol=2e-3, rtol=2e-3)


def test_python_and_kernels_agree_on_paths_and_launch_shapes(library):
    names = {"short kernel A": 1, "short kernel B": 2, "long": 3, "unfused": 0}
    found = (ctypes.c_int * 4)()
    for dim in (16, 32, 64):
        for tokens in range(1, 1400):
            library.shape_of(tokens, dim, found)
            try:
                launch = launch_of(tokens, 12, dim)
            except Unsupported:
                assert not library.unfused_fits(tokens, 12)
                continue
            assert list(found) == [names[launch.path], launch.slab, launch.threads, launch.shared_bytes], (tokens, dim)
            assert found[0] or library.unfused_fits(tokens, 12)
