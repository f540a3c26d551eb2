"""The public calls on a CUDA device: masks built there, every kernel against the reference, graphs, updates, capacity."""

from __future__ import annotations

import pytest
import torch

import stof_kernels as stof
from stof_kernels import planner
from stof_kernels.ops import reference

pytestmark = pytest.mark.gpu

# Relative error ||out - ref|| / ||ref|| that exact methods reach with 16-bit inputs and outputs.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(batch, heads, length, dim, dtype, seed):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(batch, heads, length, dim, generator=generator, device="cuda").to(dtype)


def qkv(batch=1, heads=4, kv_heads=None, q_len=300, kv_len=None, dim=64, dtype=torch.float16):
    kv_heads, kv_len = kv_heads or heads, kv_len or q_len
    sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [draw(batch, h, n, dim, dtype, seed) for seed, (h, n) in enumerate(sizes)]


def assert_right(out, lse, q, k, v, keep, bias=None, scale=None):
    want, want_lse = reference.attention(q, k, v, keep, bias, scale, dtype=torch.float64)
    assert not out.isnan().any()
    error = (out.double() - want).norm() / want.norm().clamp(min=1e-12)
    assert error < TOLERANCE[q.dtype], f"relative error {error:.1e}"
    if lse is not None:
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("family", stof.masks.FAMILIES)
@pytest.mark.parametrize("seq_len", [1, 63, 128, 333, 1024])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_mask_family(family, seq_len, dtype):
    q, k, v = qkv(batch=2, q_len=seq_len, dtype=dtype)
    mask = stof.SparseMask.from_pattern(stof.masks.get(family, seq_len), seq_len, seq_len, device="cuda").check()
    out, lse = stof.sparse_attention(q, k, v, mask, return_lse=True)
    assert_right(out, lse, q, k, v, mask.to_dense())


@pytest.mark.parametrize("dim", [8, 32, 40, 64, 72, 96, 128, 136, 192, 256])
@pytest.mark.parametrize("family", ["bigbird", "dilated"])
def test_every_candidate_of_the_planner(dim, family):
    q, k, v = qkv(heads=6, kv_heads=2, q_len=513, kv_len=513, dim=dim)
    mask = stof.SparseMask.from_pattern(stof.masks.get(family, 513), 513, 513, device="cuda")
    plan = stof.plan(q, k, mask)
    for config, _ in plan.ranking:
        mask.calls.clear()
        mask._cache["layout", None, q.shape, k.shape, q.dtype, torch.get_num_threads()] = mask.layout_for(q, k, config)
        out, lse = stof.sparse_attention(q, k, v, mask, return_lse=True)
        assert_right(out, lse, q, k, v, mask.to_dense())


def test_lists_built_on_the_device_equal_those_of_the_cpu():
    keep = torch.rand(2, 3, 200, 333) < 0.05
    keep[:, :, 64:96] = True
    on_cpu, on_gpu = stof.SparseMask.from_dense(keep).check(), stof.SparseMask.from_dense(keep.cuda()).check()
    for a, b in zip(on_cpu.lists.tensors, on_gpu.lists.tensors, strict=True):
        assert a.shape == b.shape
    assert torch.equal(on_cpu.counts, on_gpu.counts.cpu())
    assert torch.equal(on_cpu.strip_ptr, on_gpu.strip_ptr.cpu())
    assert torch.equal(on_gpu.to_dense().cpu(), keep)


def test_per_head_masks_bias_and_grouped_queries():
    q, k, v = qkv(batch=2, heads=8, kv_heads=2, q_len=257, kv_len=190)
    keep = torch.rand(2, 8, 257, 190, device="cuda") < 0.3
    keep[:, :, 40:90] = False
    for bias in (torch.randn(8, 257, 190, device="cuda"), torch.randn(1, 190, device="cuda").half()):
        out, lse = stof.sparse_attention(q, k, v, keep, bias, 0.2, return_lse=True)
        assert_right(out, lse, q, k, v, keep, bias, 0.2)
        assert (out[:, :, 40:90] == 0).all()
        assert (lse[:, :, 40:90] == -torch.inf).all()


def test_strided_inputs():
    packed = torch.randn(2, 200, 3, 4, 64, device="cuda").half()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    mask = stof.SparseMask.from_pattern(stof.masks.causal(), 200, 200, device="cuda")
    assert_right(stof.sparse_attention(q, k, v, mask), None, q, k, v, mask.to_dense())
    q, k, v = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v))
    assert_right(stof.sparse_attention(q, k, v, mask), None, q, k, v, mask.to_dense())
    assert "packed copy" in stof.plan(q, k, mask).explain()


def test_same_bits_every_time():
    q, k, v = qkv(heads=12, q_len=2048)
    mask = stof.SparseMask.from_pattern(stof.masks.get("longformer", 2048), 2048, 2048, device="cuda")
    first = stof.sparse_attention(q, k, v, mask)
    assert all(torch.equal(stof.sparse_attention(q, k, v, mask), first) for _ in range(20))


def captured(call):
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def test_captured_graph_replays_with_a_new_mask():
    q, k, v = qkv(q_len=320)
    masks = [torch.rand(320, 320, device="cuda") < share for share in (0.1, 0.5, 0.02)]
    keep = masks[0].clone()
    mask = stof.SparseMask.from_dense(keep, capacity="max").prepare(q, k)

    def call():
        return stof.sparse_attention(q, k, v, mask.update_(keep))

    graph, out = captured(call)
    for new in masks:
        keep.copy_(new)
        graph.replay()
        assert_right(out, None, q, k, v, new)


def test_update_outside_the_graph_reaches_it():
    q, k, v = qkv(q_len=320)
    mask = stof.SparseMask.from_dense(torch.rand(320, 320, device="cuda") < 0.1, capacity="max").prepare(q, k)
    graph, out = captured(lambda: stof.sparse_attention(q, k, v, mask))
    new = torch.rand(320, 320, device="cuda") < 0.4
    mask.update_(new)
    graph.replay()
    assert_right(out, None, q, k, v, new)


def test_capture_of_an_unprepared_mask_is_one_clear_error():
    q, k, v = qkv(q_len=128)
    mask = stof.SparseMask.from_pattern(stof.masks.causal(), 128, 128, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"call mask.prepare\(q, k\) before capturing"), torch.cuda.graph(graph):
        stof.sparse_attention(q, k, v, mask)
    torch.cuda.synchronize()


def test_compact_mask_in_a_graph_refuses_updates():
    q, k, v = qkv(q_len=128)
    mask = stof.SparseMask.from_dense(torch.rand(128, 128, device="cuda") < 0.5).prepare(q, k)
    captured(lambda: stof.sparse_attention(q, k, v, mask))
    with pytest.raises(ValueError, match="a captured graph holds this mask's sizes; build with capacity="):
        mask.update_(torch.rand(128, 128, device="cuda") < 0.5)


def test_overflow_poisons_and_recovers():
    q, k, v = qkv(q_len=256)
    eye = torch.eye(256, device="cuda").bool()
    mask = stof.SparseMask.from_dense(eye, capacity=40)
    assert_right(stof.sparse_attention(q, k, v, mask), None, q, k, v, eye)
    mask.update_(torch.ones(256, 256, device="cuda").bool())
    out, lse = stof.sparse_attention(q, k, v, mask, return_lse=True)
    assert out.isnan().all()
    assert lse.isnan().all()
    with pytest.raises(ValueError, match="do not fit the fixed capacity of 40 cells"):
        mask.check()
    mask.update_(eye)
    assert_right(stof.sparse_attention(q, k, v, mask), None, q, k, v, eye)


def test_fixed_capacity_never_synchronises():
    q, k, v = qkv(q_len=256)
    keep = torch.rand(256, 256, device="cuda") < 0.3
    stof.sparse_attention(q, k, v, stof.SparseMask.from_dense(keep, capacity="max"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = stof.SparseMask.from_dense(keep, capacity="max")
        out = stof.sparse_attention(q, k, v, mask)
        mask.update_(~keep)
        other = stof.sparse_attention(q, k, v, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_right(out, None, q, k, v, keep)
    assert_right(other, None, q, k, v, ~keep)


def test_fixed_capacity_of_blocks_never_synchronises():
    q, k, v = qkv(q_len=500)
    table = torch.rand(4, 8, 8, device="cuda") < 0.4
    numbers = torch.rand(4, 8, 8, device="cuda").topk(3).indices
    stof.SparseMask.from_blocks(table, 64, 500, 500, capacity="max")
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = stof.SparseMask.from_blocks(table, 64, 500, 500, capacity="max")
        out = stof.sparse_attention(q, k, v, mask)
        other = stof.sparse_attention(q, k, v, mask.update_blocks_(numbers, 64))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    chosen = torch.zeros_like(table).scatter_(-1, numbers, True)
    for result, blocks in ((out, table), (other, chosen)):
        keep = blocks.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :500, :500]
        assert_right(result, None, q, k, v, keep)


@pytest.mark.parametrize("length", [512, 500])
@pytest.mark.parametrize("block", [64, 128, 48])
def test_buffers_for_blocks_hold_every_table(length, block):
    q, k, v = qkv(q_len=length)
    n = -(-length // block)
    mask = stof.SparseMask.from_blocks(
        torch.ones(1, 4, n, n, device="cuda").bool(), block, length, length, capacity="max"
    )
    configs = [config for config, _ in mask.plan_for(q, k).ranking]
    for share in (1.0, 0.3, 0.0):
        table = torch.rand(1, 4, n, n, device="cuda") < share
        keep = table.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :length, :length]
        mask.update_blocks_(table, block)
        for config in configs:
            mask.calls.clear()
            mask._cache["layout", None, q.shape, k.shape, q.dtype, torch.get_num_threads()] = mask.layout_for(
                q, k, config
            )
            assert_right(stof.sparse_attention(q, k, v, mask), None, q, k, v, keep)
        mask.check()


def test_a_dense_mask_in_buffers_for_blocks_fits_or_says_so():
    q, k, v = qkv(q_len=512)
    table = torch.ones(1, 4, 8, 8, device="cuda").bool()
    mask = stof.SparseMask.from_blocks(table, 64, 512, 512, capacity="max").prepare(q, k)
    scattered = torch.rand(4, 512, 512, device="cuda") < 0.01
    assert stof.sparse_attention(q, k, v, mask.update_(scattered)).isnan().all()
    with pytest.raises(ValueError, match="cells in whole blocks of 64; results computed with it are NaN"):
        mask.check()
    whole = torch.zeros(4, 512, 512, device="cuda").bool()
    whole[:, :, 64:192] = True
    assert_right(stof.sparse_attention(q, k, v, mask.update_(whole)), None, q, k, v, whole)


def test_repeated_calls_notice_what_changed():
    q, k, v = qkv(batch=2, q_len=200)
    mask = stof.SparseMask.from_pattern(stof.masks.get("bigbird", 200), 200, 200, device="cuda")
    keep = mask.to_dense()
    first = stof.sparse_attention(q, k, v, mask)
    assert torch.equal(stof.sparse_attention(q, k, v, mask), first)
    strided = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert_right(stof.sparse_attention(*strided, mask), None, q, k, v, keep)
    halves = [t.bfloat16() for t in (q, k, v)]
    assert_right(stof.sparse_attention(*halves, mask), None, *halves, keep)
    bias = torch.randn(4, 1, 200, device="cuda")
    out, lse = stof.sparse_attention(q, k, v, mask, bias, -0.3, return_lse=True)
    assert_right(out, lse, q, k, v, keep, bias, -0.3)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        again = stof.sparse_attention(q, k, v, mask)
    torch.cuda.current_stream().wait_stream(other)
    assert torch.equal(again, first)
    with pytest.raises(ValueError, match="k is on cpu, allowed: q's device cuda:0"):
        stof.sparse_attention(q, k.cpu(), v, mask)
    assert torch.equal(stof.sparse_attention(q, k, v, mask), first)


def test_repeated_calls_in_a_graph_are_noticed_by_updates():
    q, k, v = qkv(q_len=128)
    mask = stof.SparseMask.from_dense(torch.rand(128, 128, device="cuda") < 0.5)
    for _ in range(3):
        stof.sparse_attention(q, k, v, mask)
    mask.update_(torch.rand(128, 128, device="cuda") < 0.4)
    stof.sparse_attention(q, k, v, mask)
    captured(lambda: stof.sparse_attention(q, k, v, mask))
    with pytest.raises(ValueError, match="a captured graph holds this mask's sizes"):
        mask.update_(torch.rand(128, 128, device="cuda") < 0.5)


def test_more_keys_than_a_layout_holds():
    q, k, v = qkv(heads=2, q_len=20, kv_len=(1 << 20) + 40)
    table = torch.zeros(1, -(-k.shape[2] // 64), device="cuda").bool()
    table[:, ::4001] = True
    mask = stof.SparseMask.from_blocks(table, 64, 20, k.shape[2])
    assert stof.plan(q, k, mask).config.kernel == planner.ROW_WISE
    assert_right(stof.sparse_attention(q, k, v, mask), None, q, k, v, mask.to_dense())


@pytest.mark.parametrize("family", stof.masks.FAMILIES)
def test_rules_on_the_device_equal_rules_on_the_host(family):
    pattern = stof.masks.get(family, 1100)
    host, device = (stof.SparseMask.from_pattern(pattern, 1100, 1100, device=d) for d in ("cpu", "cuda"))
    n, n_bits = host.counts[:2].tolist()
    for mine, theirs, used in zip(device.lists.tensors, host.lists.tensors, (None, n, n, n_bits, None), strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(mine.cpu()[:used], theirs[:used])


def test_compiled_model_takes_new_masks():
    q, k, v = qkv(q_len=512)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    attend = torch.compile(lambda q, k, v, m: stof.sparse_attention(q, k, v, m) * 2, fullgraph=True, backend=counter)
    for width in (20, 22, 26):
        mask = stof.SparseMask.from_pattern(stof.masks.sliding_window(width), 512, 512, device="cuda").prepare(q, k)
        assert_right(attend(q, k, v, mask) / 2, None, q, k, v, mask.to_dense())
    assert counter.frame_count <= 2


def test_wrong_devices_and_dtypes():
    q, k, v = qkv(q_len=64)
    keep = torch.ones(64, 64).bool()
    with pytest.raises(ValueError, match="mask is on cpu, allowed: q's device cuda:0"):
        stof.sparse_attention(q, k, v, keep)
    with pytest.raises(TypeError, match=r"q has dtype torch.float32 on cuda, allowed: torch.float16 or torch.bfloat16"):
        stof.sparse_attention(q.float(), k.float(), v.float(), keep.cuda())


def test_planner_knows_this_card():
    q, k, _ = qkv(q_len=1024)
    mask = stof.SparseMask.from_pattern(stof.masks.get("longformer", 1024), 1024, 1024, device="cuda")
    text = stof.plan(q, k, mask).explain()
    assert torch.cuda.get_device_name() in text
    assert {c.kernel for c, _ in stof.plan(q, k, mask).ranking} == {planner.ROW_WISE, planner.BLOCK_WISE}
