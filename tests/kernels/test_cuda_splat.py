"""SPLAT on the card: real sizes against the reference, what it launches, what it stores, and how its time behaves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stof_kernels import masks
from stof_kernels.baselines import Problem, Unsupported, get
from stof_kernels.baselines.inputs import make_tensors
from stof_kernels.benchmarking.check import relative_error

pytestmark = pytest.mark.gpu

TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-5}
EXPRESSIBLE = ("causal", "sliding_window", "artifact_sliding_window", "dilated", "prefix_lm", "document", "full")


def problem(pattern, batch=1, length=1024, dtype="float16", heads=12, head_dim=64) -> Problem:
    pattern = masks.get(pattern, length) if isinstance(pattern, str) else pattern
    return Problem(pattern, batch, length, length, heads, heads, head_dim, dtype, "cuda", seed=1)


def prepared(name: str, p: Problem):
    tensors = make_tensors(p)
    return get(name).prepare(p, tensors), tensors


def attention(p: Problem, choice=None, simt=False):
    from stof_kernels.baselines.splat_kernels.attention import Attention
    from stof_kernels.baselines.splat_kernels.build import acsr_of
    from stof_kernels.baselines.splat_kernels.stages import Stored

    tensors = make_tensors(p)
    mask = Stored([acsr_of(p)], "cuda")
    return Attention([mask], *dataclasses.astuple(tensors), p.scale, simt, choice and [choice]), tensors


def device_us(run) -> float:
    from stof_kernels.benchmarking.timing import Budget, device_arm

    arm = device_arm(run, "cuda", Budget(warmup=3))
    return min(arm.sample() for _ in range(7))


@pytest.mark.parametrize(("batch", "length"), [(1, 128), (2, 1024), (1, 3000)])
@pytest.mark.parametrize("family", EXPRESSIBLE)
def test_masks_match_the_reference(family, batch, length):
    p = problem(family, batch, length)
    call, tensors = prepared("splat", p)
    assert call.exact
    assert relative_error(p, tensors, p.pattern, call.run()) <= TOLERANCE["float16"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["splat", "splat_simt"])
def test_other_precisions_and_products_without_tensor_cores(name, dtype):
    p = problem("sliding_window", 1, 700, dtype, heads=3)
    call, tensors = prepared(name, p)
    assert relative_error(p, tensors, p.pattern, call.run()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [32, 40, 128, 256])
def test_head_dims(head_dim):
    p = problem("causal", 1, 500, heads=2, head_dim=head_dim)
    call, tensors = prepared("splat", p)
    assert relative_error(p, tensors, p.pattern, call.run()) <= TOLERANCE["float16"]


@pytest.mark.parametrize(
    "rule", [lambda b, h, q, kv: q % 7 == kv % 7, lambda b, h, q, kv: (q // 48 == kv // 48) | (q // 48 == kv // 48 + 1)]
)
def test_row_maps_and_blocks(rule):
    p = problem(masks.predicate(rule), 1, 960, heads=2)
    call, tensors = prepared("splat", p)
    assert relative_error(p, tensors, p.pattern, call.run()) <= TOLERANCE["float16"]


@pytest.mark.parametrize("family", ["causal", "sliding_window", "dilated"])
def test_every_candidate_gives_the_right_result(family):
    """Poisoned values show that no slot is used that was not written."""
    from stof_kernels.baselines.splat_kernels import attention as module

    p = problem(family, 1, 333, heads=2)
    softmaxes = module.softmax_candidates(333 if family == "causal" else 37)
    for i in range(max(len(module.SDDMM), len(module.SPMM), len(softmaxes))):
        choice = module.Choice(*(some[i % len(some)] for some in (module.SDDMM, softmaxes, module.SPMM)))
        found, tensors = attention(p, choice)
        for job in found.jobs:
            job.scores.fill_(float("nan"))
            job.probs.fill_(float("nan"))
        assert relative_error(p, tensors, p.pattern, found.run()) <= TOLERANCE["float16"], choice


@pytest.mark.parametrize("family", ["longformer", "artifact_longformer"])
def test_unions_of_ours(family):
    p = problem(family, 2, 1024)
    call, tensors = prepared("splat_pieces", p)
    assert relative_error(p, tensors, p.pattern, call.run()) <= TOLERANCE["float16"]
    with pytest.raises(Unsupported, match="one arithmetic progression"):
        get("splat").prepare(p, tensors)


@pytest.mark.parametrize("family", ["causal", "sliding_window"])
def test_a_call_is_exactly_three_kernels(family):
    from torch.profiler import ProfilerActivity, profile

    call, _ = prepared("splat", problem(family, 2, 1024))
    call.run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call.run()
        torch.cuda.synchronize()
    names = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(names) == ["sddmm", "softmax", "spmm"]


def test_products_run_on_ampere_class_tensor_cores():
    for simt in (False, True):
        for family in ("causal", "sliding_window"):
            found, _ = attention(problem(family, 1, 1024, heads=2), simt=simt)
            (plan,), (job,) = found.plans, found.jobs
            for kernel in (plan.sddmm.launch(job), plan.spmm.launch(job, torch.empty_like(job.q))):
                assert ("mma.sync" in kernel.asm["ptx"]) == (not simt)
                assert "wgmma" not in kernel.asm["ptx"]  # Hopper's own instructions, which SPLAT never had


def test_memory_is_two_arrays_of_w_slots_a_row():
    p = problem("sliding_window", 4, 4096)
    torch.cuda.synchronize()
    found, _ = attention(p)
    (job,), (plan,) = found.jobs, found.plans
    slots = 4 * 12 * 4096 * 136  # W = 129, rows on 16-byte boundaries
    assert plan.mask.width == 129
    assert job.scores.nbytes == job.probs.nbytes == slots * 2
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = found.run()
    assert torch.cuda.max_memory_allocated() - before == out.nbytes  # a call allocates its output and nothing else


def test_values_beyond_the_card_are_one_clear_line():
    from stof_kernels.baselines.splat_kernels.build import acsr_of
    from stof_kernels.baselines.splat_kernels.stages import Stored

    mask = Stored([acsr_of(problem("causal", 1, 4096))], "cuda")
    with pytest.raises(MemoryError, match=r"out of memory: .*, W = 4096, take 2013\.3 GB each"):
        mask.empty_values(60000, torch.float16)


def test_replays_in_a_graph_and_repeats_bit_for_bit():
    call, tensors = prepared("splat", problem("sliding_window", 2, 2048))
    first = call.run()
    assert torch.equal(first, call.run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run()
    tensors.v.neg_()
    graph.replay()
    assert torch.equal(out, -first)


def test_time_grows_linearly_with_the_length_at_a_fixed_window():
    window = masks.sliding_window(64)
    times = [device_us(prepared("splat", problem(window, 16, length))[0].run) for length in (2048, 4096)]
    assert 1.8 <= times[1] / times[0] <= 2.2


def test_time_does_not_depend_on_the_values():
    p = problem("sliding_window", 8, 2048)
    found, tensors = attention(p)
    before = device_us(found.run)
    tensors.q.mul_(3)
    tensors.k.add_(1)
    assert device_us(found.run) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("family", ["sliding_window", "blocked"])
def test_faster_than_dense_math_attention_where_half_or_less_is_kept(family):
    rule = lambda b, h, q, kv: (q // 256 == kv // 256) | (q // 256 == kv // 256 + 1)  # noqa: E731
    p = problem(masks.predicate(rule) if family == "blocked" else family, 8, 1024)
    assert device_us(prepared("splat", p)[0].run) < device_us(prepared("torch_native", p)[0].run)


def test_faster_than_blocks_of_64_on_a_window_off_their_grid():
    import bsr_pair

    reach = 45  # SPLAT stores 91 slots a row, three blocks 192
    p = problem(masks.sliding_window(reach), 16, 2048)
    call, tensors = prepared("splat", p)
    blocks = bsr_pair.windowed(*dataclasses.astuple(tensors), reach, p.scale)
    assert relative_error(p, tensors, p.pattern, blocks()) <= TOLERANCE["float16"]
    assert device_us(call.run) < device_us(blocks)


def test_slower_than_flash_attention_on_causal():
    p = problem("causal", 8, 2048)
    assert device_us(prepared("splat", p)[0].run) > device_us(prepared("fa2", p)[0].run)
