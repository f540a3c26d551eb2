"""The CUDA kernels behind stof::sparse_attention, every shape of the block-wise one and the row-wise one, on random data."""

from __future__ import annotations

import math

import pytest
import torch

from stof_kernels.kernels import raw

pytestmark = pytest.mark.gpu

ROW_WISE, WIDE, LARGE, SPLIT, HOPPER, HOPPER_PAIR, HOPPER_SPLIT, HOPPER_QUAD = range(8)
KERNELS = {"row_wise": (ROW_WISE, 64, 0), "wide": (WIDE, 64, 0), "cut": (WIDE, 64, 2),
           "large": (LARGE, 128, -1), "split": (SPLIT, 64, 0), "split_cut": (SPLIT, 64, 3),
           "hopper": (HOPPER, 64, 0), "hopper_cut": (HOPPER, 64, 2), "hopper_pair": (HOPPER_PAIR, 128, 0),
           "hopper_pair_cut": (HOPPER_PAIR, 128, 2), "hopper_split": (HOPPER_SPLIT, 64, 0),
           "hopper_split_cut": (HOPPER_SPLIT, 64, 5), "hopper_quad": (HOPPER_QUAD, 64, 0),
           "hopper_quad_cut": (HOPPER_QUAD, 64, 9)}  # fmt: skip
TOLERANCE = {torch.float16: 7e-4, torch.bfloat16: 6e-3}


def layout(keep, kernel, copies):
    shape, q_tile, chunk = KERNELS[kernel]
    cells = raw.build_cells(keep)
    if shape == ROW_WISE:
        return *cells[:4], cells[4], torch.tensor([0, -1, -1, 0])
    batch, heads, q_len, kv_len = keep.shape
    *lists, plan = raw.build_layout(*cells, q_len, kv_len, batch * heads, q_tile, chunk, copies)
    plan[3] = shape
    return *lists, cells[4], plan


def attend(q, k, v, keep, kernel, bias=None, scale=None, prepared=None, return_lse=True):
    mask_batch, mask_heads, q_len, kv_len = keep.shape
    copies = q.shape[0] * q.shape[1] // (mask_batch * mask_heads)
    *lists, counts, plan = prepared or layout(keep, kernel, max(1, copies))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return raw.sparse_attention(
        q, k, v, bias, *lists, counts, plan, q_len, kv_len, mask_batch, mask_heads, scale, return_lse
    )


def reference(q, k, v, keep, bias=None, scale=None):
    """Dense attention in float64, written out."""
    group = q.shape[1] // max(1, k.shape[1])
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(~keep, -math.inf)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    return (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0) @ v, lse


def assert_right(result, expected, dtype):
    (out, lse), (want, want_lse) = result, expected
    assert not out.isnan().any()
    assert (out.double() - want).norm() <= TOLERANCE[dtype] * want.norm() + 1e-9
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    kept = want_lse.isfinite()
    torch.testing.assert_close(lse.double()[kept], want_lse[kept], rtol=1e-5, atol=5e-3)


def draw(batch, heads, kv_heads, q_len, kv_len, dim, dtype):
    torch.manual_seed(dim * 1000 + q_len)
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(batch, h, n, dim, device="cuda").to(dtype) for h, n in shapes]


def masks(batch, heads, q_len, kv_len):
    q, k = torch.arange(q_len, device="cuda")[:, None], torch.arange(kv_len, device="cuda")
    shape = (batch, heads, q_len, kv_len)
    yield torch.rand(shape, device="cuda") < 0.5
    yield torch.rand(shape, device="cuda") < 0.02
    yield (k <= q).expand(shape)
    yield (((q - k).abs() <= 20) | (q < 17) | (k < 17)).expand(shape)
    empty_rows = torch.rand(shape, device="cuda") < 0.3
    empty_rows[:, :, ::3] = False
    yield empty_rows
    yield torch.zeros(shape, dtype=torch.bool, device="cuda")


@pytest.fixture(autouse=True)
def poisoned():
    """What the allocator hands out next holds NaN, so that a row nobody writes shows."""
    block = torch.full((1 << 24,), math.nan, device="cuda")
    del block


def exists(kernel, dim):
    if kernel.startswith("hopper"):
        short = kernel.startswith(("hopper_split", "hopper_quad"))
        return dim <= (64 if short else 128) and torch.cuda.get_device_capability() == (9, 0)
    return kernel != "large" or dim <= 128


@pytest.fixture(params=list(KERNELS))
def kernel(request):
    if not exists(request.param, 64):
        pytest.skip("not on this card")
    return request.param


@pytest.mark.parametrize("dim", [8, 24, 32, 40, 64, 72, 96, 128, 136, 192, 200, 256])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("planes", [(1, 1), (2, 4), (1, 4), (2, 1)])
def test_every_kernel_and_head_dim(dim, dtype, planes):
    q, k, v = draw(2, 4, 2, 200, 300, dim, dtype)
    for keep in masks(*planes, 200, 300):
        expected = reference(q, k, v, keep)
        for kernel in KERNELS:
            if exists(kernel, dim):
                assert_right(attend(q, k, v, keep, kernel), expected, dtype)


def test_all_length_residues(kernel):
    for step in range(64):
        q_len, kv_len = 1 + step * 3 % 130, 1 + step
        q, k, v = draw(1, 2, 1, q_len, kv_len, 64, torch.float16)
        keep = torch.rand(1, 1, q_len, kv_len, device="cuda") < 0.6
        assert_right(attend(q, k, v, keep, kernel), reference(q, k, v, keep), torch.float16)


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_bias(kernel, dim):
    q, k, v = draw(2, 4, 2, 130, 150, dim, torch.float16)
    keep = torch.rand(1, 1, 130, 150, device="cuda") < 0.5
    for shape, dtype in [
        ((2, 4, 130, 150), torch.float16),
        ((1, 4, 1, 150), torch.float32),
        ((2, 1, 130, 1), torch.float16),
    ]:
        bias = torch.randn(shape, device="cuda").to(dtype)
        if shape[-1] > 1:
            bias[torch.rand(shape, device="cuda") < 0.1] = -math.inf
        assert_right(attend(q, k, v, keep, kernel, bias), reference(q, k, v, keep, bias), torch.float16)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.5])
def test_scale(kernel, scale):
    q, k, v = draw(1, 2, 2, 100, 90, 64, torch.float16)
    keep = torch.rand(1, 1, 100, 90, device="cuda") < 0.5
    assert_right(attend(q, k, v, keep, kernel, scale=scale), reference(q, k, v, keep, scale=scale), torch.float16)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0), (1, 1), (1, 777), (333, 1)])
def test_degenerate_lengths(kernel, q_len, kv_len):
    q, k, v = draw(2, 2, 1, q_len, kv_len, 64, torch.float16)
    keep = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device="cuda")
    assert_right(attend(q, k, v, keep, kernel), reference(q, k, v, keep), torch.float16)


def test_strides_and_result_memory(kernel):
    keep = torch.rand(1, 1, 70, 70, device="cuda") < 0.5
    packed = torch.randn(2, 70, 3, 4, 64, device="cuda").half()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    expected = reference(q, k, v, keep)
    out, lse = attend(q, k, v, keep, kernel)
    assert_right((out, lse), expected, torch.float16)
    assert out.stride() == (70 * 4 * 64, 64, 4 * 64, 1)
    odd = [torch.empty(2 * 4 * 70 * 64 + 1, device="cuda").half()[1:].view(2, 4, 70, 64).copy_(t) for t in (q, k, v)]
    assert_right(attend(*odd, keep, kernel), expected, torch.float16)
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert_right(attend(*turned, keep, kernel), expected, torch.float16)
    shared = k[:1, :1].expand(2, 4, 70, 64)
    assert_right(attend(q, shared, v, keep, kernel), reference(q, shared, v, keep), torch.float16)


def test_same_bits_every_time(kernel):
    q, k, v = draw(1, 8, 8, 700, 700, 64, torch.float16)
    keep = torch.rand(1, 1, 700, 700, device="cuda") < 0.4
    prepared = layout(keep, kernel, 8)
    first, lse = attend(q, k, v, keep, kernel, prepared=prepared)
    for _ in range(30):
        again, lse_again = attend(q, k, v, keep, kernel, prepared=prepared)
        assert torch.equal(first, again)
        assert torch.equal(lse, lse_again)


def test_scores_that_grow_from_tile_to_tile(kernel):
    for dim in (64, 128):
        q, k, v = draw(1, 2, 2, 200, 900, dim, torch.float16)
        k = k * torch.linspace(0.05, 25, 900, device="cuda").half()[:, None]
        keep = torch.rand(1, 1, 200, 900, device="cuda") < 0.5
        keep[..., :300] = False  # rows meet their first key late
        assert_right(attend(q, k, v, keep, kernel), reference(q, k, v, keep), torch.float16)


def test_one_loud_key_a_tile(kernel):
    """Wherever in its tile it stands: whether a tile's probabilities fit is asked for many keys at a time."""
    for dim in (64, 128):
        q, k, v = draw(1, 2, 2, 130, 832, dim, torch.float16)
        loud = 69 * torch.arange(12, device="cuda") + 3  # columns 3, 8 ... 58 of 12 tiles
        k[:, :, loud] *= torch.linspace(3, 40, 12, device="cuda").half()[:, None]
        keep = torch.ones(1, 1, 130, 832, dtype=torch.bool, device="cuda")
        assert_right(attend(q, k, v, keep, kernel), reference(q, k, v, keep), torch.float16)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_loud_tile_wherever_it_stands(kernel, dtype):
    """Its probabilities do not fit beside the first tile's: first, last, in between, and louder ones right behind it."""
    for dim, tiles in ((64, 1), (64, 2), (64, 3), (64, 6), (128, 2), (128, 5)):
        if not exists(kernel, dim):
            continue
        q, k, v = draw(1, 4, 2, 130, 64 * tiles - 7, dim, dtype)
        keep = torch.rand(1, 1, 130, 64 * tiles - 7, device="cuda") < 0.8
        keep[..., :64, :], keep[..., 70, :] = True, False
        prepared = layout(keep, kernel, 4)
        for loud in range(tiles):
            louder = k.clone()
            louder[:, :, 64 * loud :] *= 12
            louder[:, :, 64 * (loud + 1) : 64 * (loud + 2)] *= 3
            result = attend(q, louder, v, keep, kernel, prepared=prepared)
            assert_right(result, reference(q, louder, v, keep), dtype)
            assert torch.equal(result[0], attend(q, louder, v, keep, kernel, prepared=prepared)[0])


def test_many_more_items_than_the_device_holds(kernel):
    """Again and again: what a block brings for its next item must not come before it is done with the one before."""
    q, k, v = draw(40, 8, 8, 700, 700, 64, torch.float16)
    keep = (torch.rand(1, 1, 700, 700, device="cuda") < 0.02) | torch.eye(700, dtype=torch.bool, device="cuda")
    keep[..., :40, :] = True
    prepared = layout(keep, kernel, 320)
    result = attend(q, k, v, keep, kernel, prepared=prepared)
    assert_right(result, reference(q, k, v, keep), torch.float16)
    for _ in range(60):
        again = attend(q, k, v, keep, kernel, prepared=prepared)
        assert torch.equal(result[0], again[0])
        assert torch.equal(result[1], again[1])


def test_lists_of_hundreds_of_tiles(kernel):
    for dim in (64, 128):
        q, k, v = draw(1, 2, 1, 70, 20_000, dim, torch.float16)
        keep = torch.rand(1, 1, 70, 20_000, device="cuda") < 0.7
        assert_right(attend(q, k, v, keep, kernel), reference(q, k, v, keep), torch.float16)


def test_a_layout_is_complete_when_it_is_returned(kernel):
    """Kernels may read it while those before them in the stream still run."""
    busy = torch.randn(4096, 4096, device="cuda")
    q, k, v = draw(1, 2, 2, 200, 200, 64, torch.float16)
    for share in torch.linspace(0.05, 0.95, 20).tolist():
        keep = torch.rand(1, 1, 200, 200, device="cuda") < share
        expected = reference(q, k, v, keep)
        torch.mm(busy, busy, out=busy)
        assert_right(attend(q, k, v, keep, kernel), expected, torch.float16)


def test_calls_that_feed_each_other(kernel):
    """A call overlaps with the one before it, but reads and writes nothing of it too early."""
    q, k, v = draw(1, 4, 4, 300, 300, 64, torch.float16)
    keep = torch.rand(1, 1, 300, 300, device="cuda") < 0.5
    prepared = layout(keep, kernel, 4)
    one_by_one, chained = q, q
    for _ in range(12):
        one_by_one = attend(one_by_one, k, one_by_one * 0.5 + v, keep, kernel, prepared=prepared)[0].contiguous()
        torch.cuda.synchronize()
    for _ in range(12):
        chained = attend(chained, k, chained * 0.5 + v, keep, kernel, prepared=prepared)[0].contiguous()
    assert torch.equal(one_by_one, chained)
    out = attend(q, q, q, keep, kernel, prepared=prepared)[0]
    for _ in range(20):  # no other kernel between them
        out = attend(out, out, out, keep, kernel, prepared=prepared)[0]
    again = attend(q, q, q, keep, kernel, prepared=prepared)[0]
    for _ in range(20):
        torch.cuda.synchronize()
        again = attend(again, again, again, keep, kernel, prepared=prepared)[0]
    assert torch.equal(out, again)


def test_scores_that_overflow_half_and_large_values():
    q, k, v = draw(1, 2, 2, 130, 130, 64, torch.float16)
    keep = torch.rand(1, 1, 130, 130, device="cuda") < 0.5
    for kernel in filter(lambda name: exists(name, 64), KERNELS):
        assert_right(
            attend(q * 60, k * 60, v * 60, keep, kernel), reference(q * 60, k * 60, v * 60, keep), torch.float16
        )


def test_wrong_arguments_are_one_clear_line():
    q, k, v = draw(1, 2, 2, 64, 64, 64, torch.float16)
    keep = torch.ones(1, 1, 64, 64, dtype=torch.bool, device="cuda")
    with pytest.raises(RuntimeError, match="q has dtype Float, on CUDA it must be Half or BFloat16"):
        attend(q.float(), k.float(), v.float(), keep, "wide")
    with pytest.raises(RuntimeError, match="k must be on q's device"):
        attend(q, k.cpu(), v, keep, "wide")
    *lists, plan = layout(keep, "wide", 2)
    with pytest.raises(RuntimeError, match="q has 64 queries, but the mask is for 65"):
        raw.sparse_attention(q, k, v, None, *lists, plan, 65, 64, 1, 1, 0.1, False)
    plan[0] = 0
    with pytest.raises(RuntimeError, match="the lists are the layout of block_wise"):
        raw.sparse_attention(q, k, v, None, *lists, plan, 64, 64, 1, 1, 0.1, False)
