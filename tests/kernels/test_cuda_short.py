"""Hopper's kernels for short calls: how key tiles are dealt to warpgroups, and which items two blocks of a cluster share."""

from __future__ import annotations

import pytest
import torch
from test_cuda_attention import KERNELS, TOLERANCE, assert_right, attend, draw, exists, layout, reference

pytestmark = pytest.mark.gpu

SHORT = ("hopper_split", "hopper_quad")


@pytest.fixture(params=SHORT)
def kernel(request):
    if not exists(request.param, 64):
        pytest.skip("not on this card")
    return request.param


def causal(q_len, kv_len):
    rows, columns = torch.arange(q_len, device="cuda")[:, None], torch.arange(kv_len, device="cuda")
    return (columns <= rows + max(0, kv_len - q_len)).expand(1, 1, q_len, kv_len).contiguous()


# 4 items a head. On 132 multiprocessors two blocks share all of them, the longest 64, 28 and 4 of them, none.
@pytest.mark.parametrize("heads", [1, 16, 17, 26, 32, 33, 40])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_any_number_of_items(kernel, heads, dtype):
    q, k, v = draw(1, heads, heads, 250, 500, 64, dtype)
    keep = causal(250, 500)  # lists of 5 to 8 tiles
    prepared = layout(keep, kernel, heads)
    result = attend(q, k, v, keep, kernel, prepared=prepared)
    assert_right(result, reference(q, k, v, keep), dtype)
    for _ in range(5):
        assert torch.equal(result[0], attend(q, k, v, keep, kernel, prepared=prepared)[0])


def test_any_number_of_tiles(kernel):
    """From none to more than the warpgroups of two blocks hold at a time; full, partial, and both."""
    for tiles in range(21):
        kv_len = max(1, 64 * tiles)
        q, k, v = draw(1, 2, 1, 70, kv_len, 64, torch.float16)
        full = torch.full((1, 1, 70, kv_len), tiles > 0, device="cuda")
        holes = torch.rand(1, 1, 70, kv_len, device="cuda") < 0.5
        some = holes.clone()
        some[..., : kv_len // 2] = tiles > 0
        for keep in (full, holes & full, some & full):
            assert_right(attend(q, k, v, keep, kernel), reference(q, k, v, keep), torch.float16)


def test_lists_of_different_lengths_share_a_launch(kernel):
    """A band and rows that see everything: some items of a launch are shared and others too short for it."""
    for length in (200, 333, 700):
        q, k, v = draw(1, 3, 3, length, length, 64, torch.float16)
        rows, columns = torch.arange(length, device="cuda")[:, None], torch.arange(length, device="cuda")
        keep = (((rows - columns).abs() < 9) | (rows % 97 == 5)).expand(1, 1, length, length).contiguous()
        assert_right(attend(q, k, v, keep, kernel), reference(q, k, v, keep), torch.float16)


def test_a_mask_a_head_and_grouped_heads(kernel):
    q, k, v = draw(2, 6, 2, 190, 400, 64, torch.bfloat16)
    keep = torch.rand(2, 6, 190, 400, device="cuda") < torch.linspace(0.01, 0.9, 12, device="cuda").view(2, 6, 1, 1)
    keep[:, ::2, 40:90] = False
    assert_right(attend(q, k, v, keep, kernel), reference(q, k, v, keep), torch.bfloat16)


@pytest.mark.parametrize("chunk", [-1, 3, 4, 5, 8])
def test_parts_of_cut_lists_are_shared_too(kernel, chunk, monkeypatch):
    shape, q_tile, _ = KERNELS[kernel]
    monkeypatch.setitem(KERNELS, kernel, (shape, q_tile, chunk))
    q, k, v = draw(1, 2, 2, 100, 1500, 64, torch.float16)
    keep = torch.rand(1, 1, 100, 1500, device="cuda") < 0.7
    prepared = layout(keep, kernel, 2)
    result = attend(q, k, v, keep, kernel, prepared=prepared)
    assert_right(result, reference(q, k, v, keep), torch.float16)
    assert torch.equal(result[0], attend(q, k, v, keep, kernel, prepared=prepared)[0])


def test_sizes_that_only_the_device_knows(kernel):
    """As with masks of fixed capacity: blocks for more items than there are."""
    for heads in (2, 20, 40):
        q, k, v = draw(1, heads, heads, 250, 500, 64, torch.float16)
        keep = causal(250, 500)
        *lists, counts, plan = layout(keep, kernel, heads)
        unknown = (*lists, counts, plan[:4].clone())
        assert_right(attend(q, k, v, keep, kernel, prepared=unknown), reference(q, k, v, keep), torch.float16)


@pytest.mark.parametrize("scale", [0.125, -0.5])
def test_rows_that_meet_their_first_key_late(kernel, scale):
    """In any tile, alone in their warp or not, beside rows whose scores grow there."""
    for tiles in (2, 3, 5, 9):
        kv_len = 64 * tiles
        q, k, v = draw(1, 2, 2, 64, kv_len, 64, torch.float16)
        k[:, :, 64:] *= torch.linspace(1, 30, kv_len - 64, device="cuda").half()[:, None]
        keep = torch.rand(1, 1, 64, kv_len, device="cuda") < 0.5
        for row in range(64):
            keep[..., row, : row * kv_len // 70 * (row % 4 > 0)] = False
        assert_right(attend(q, k, v, keep, kernel, scale=scale), reference(q, k, v, keep, scale=scale), torch.float16)


def test_calls_in_a_graph_that_feed_each_other(kernel):
    """Blocks of a call wait for all of the one before it, also those that leave at once because nothing is to be shared."""
    for heads, length in ((12, 128), (12, 256), (24, 256), (12, 600)):
        q, k, v = draw(1, heads, heads, length, length, 64, torch.float16)
        keep = causal(length, length)
        prepared = layout(keep, kernel, heads)

        def chain(prepared=prepared, keep=keep, q=q, k=k, v=v):
            out = q
            for _ in range(8):
                out = attend(out, k, out, keep, kernel, prepared=prepared)[0]
            return out

        one_by_one = q
        for _ in range(8):
            one_by_one = attend(one_by_one, k, one_by_one, keep, kernel, prepared=prepared)[0]
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain()
        for _ in range(3):
            graph.replay()
            assert torch.equal(captured, one_by_one)
        assert torch.equal(chain(), one_by_one)
