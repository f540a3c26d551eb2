"""Bolt on a GPU: every template and persistent kernel against float64, and the five checks of a faithful reimplementation."""

from __future__ import annotations

from math import isfinite

import pytest
import torch
import torch.nn.functional as F
from on_device import poison_memory, time_us

from stof_kernels.baselines import Unsupported, registry
from stof_kernels.baselines.bolt_compiler import operators
from stof_kernels.baselines.bolt_compiler.problem import Gemm, Pair
from stof_kernels.baselines.bolt_compiler.profiler import AS_BOLT, Profiler, shared_limit_of
from stof_kernels.baselines.bolt_compiler.templates import EPILOGUES, PERSISTENT, TEMPLATES, feasible, residence

pytestmark = pytest.mark.gpu
TOLERANCE = 6e-4  # fp32 sums, one rounding to fp16


@pytest.fixture(scope="module", autouse=True)
def kernels():
    try:
        operators.load()
    except Unsupported as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def poisoned_memory():
    poison_memory()


def draw(*shape, seed=0, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=generator, device="cuda")).half()


def finish(out, bias, epilogue):
    out = out if epilogue == 0 else out + bias.double()
    return F.relu(out) if epilogue == 2 else F.gelu(out) if epilogue == 3 else out


def error(out, want):
    return float((out.double() - want).norm() / want.norm())


def gemm(a, b, bias, epilogue, candidate):
    return torch.ops.stof_bolt.gemm.default(a, b, bias if epilogue else None, epilogue, candidate)


def candidates():
    return feasible(shared_limit_of("cuda"))


@pytest.mark.parametrize("candidate", range(len(TEMPLATES)), ids=lambda n: str(TEMPLATES[n]))
def test_templates(candidate):
    if candidate not in candidates():
        pytest.skip("needs more shared memory than a block has here")
    for m, n, k, batch in ((1, 8, 8, 0), (300, 520, 1000, 0), (65, 72, 64, 5), (513, 64, 520, 3), (1024, 2304, 768, 0)):
        outer = (batch,) if batch else ()
        a, b, bias = draw(*outer, m, k), draw(*outer, n, k, seed=1), draw(n, seed=2)
        plain = a.double() @ b.double().transpose(-1, -2)
        for epilogue in range(len(EPILOGUES)):
            out = gemm(a, b, bias, epilogue, candidate)
            assert error(out, finish(plain, bias, epilogue)) < TOLERANCE, (m, n, k, batch, EPILOGUES[epilogue])
            assert torch.equal(out, gemm(a, b, bias, epilogue, candidate)), "not the same twice"


def chain_of(m, k, n0, n1):
    scale = k**-0.5
    weights = draw(n0, k, seed=1, scale=scale), draw(n1, n0, seed=2, scale=n0**-0.5)
    return draw(m, k), weights, (draw(n0, seed=3), draw(n1, seed=4))


def fused(a, weights, biases, first, second, kernel):
    (b0, b1), (bias0, bias1) = weights, biases
    call = torch.ops.stof_bolt.persistent.default
    return call(a, b0, bias0 if first else None, first, b1, bias1 if second else None, second, PERSISTENT.index(kernel))


@pytest.mark.parametrize("kernel", PERSISTENT, ids=str)
def test_persistent_kernels(kernel):
    for m, k, first, second in ((1, 8, 0, 0), (77, 72, 1, 3), (4096, 576, 2, 2), (1000, 256, 3, 1)):
        a, weights, biases = chain_of(m, k, kernel.n0, kernel.n1)
        inner = finish(a.double() @ weights[0].double().t(), biases[0], first).half().double()
        want = finish(inner @ weights[1].double().t(), biases[1], second)
        assert error(fused(a, weights, biases, first, second, kernel), want) < TOLERANCE


def test_graph_replay_sees_new_inputs():
    a, b, bias = draw(256, 768), draw(768, 768, seed=1), draw(768, seed=2)
    gemm(a, b, bias, 3, 11)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gemm(a, b, bias, 3, 11)
    a.copy_(draw(256, 768, seed=9))
    graph.replay()
    assert error(out, finish(a.double() @ b.double().t(), bias, 3)) < TOLERANCE


def test_wrong_arguments_are_refused_in_one_line():
    a, b, bias = draw(16, 64), draw(24, 64, seed=1), draw(24, seed=2)
    for arguments, said in (
        ((a, b, bias, 1, 25), "the candidate is 25, it must be from 0 to 24"),
        ((a, b, None, 1, 0), "bias must be given for every epilogue but 0"),
        ((a, b[:, :60].contiguous(), None, 0, 0), "b has shape"),
        ((a[:, :60].contiguous(), b[:, :60].contiguous(), None, 0, 0), "both must be multiples of 8"),
        ((a, b.float(), None, 0, 0), "b has dtype Float, it must be Half"),
        ((a.t().contiguous().t(), b, None, 0, 0), "a must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=said):
            torch.ops.stof_bolt.gemm.default(*arguments)


# ---- the five checks -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Gemm(4096, 3072, 768, epilogue="bias_gelu"), Gemm(512, 512, 64, batch=96)], ids=str)
def test_1_the_pick_is_the_fastest_of_an_independent_timing(shape):
    profiler = Profiler(AS_BOLT)
    pick = profiler.pick(shape)
    assert profiler.timed == len(TEMPLATES) == 25
    assert [n for n, t in pick.seconds.items() if isfinite(t)] == candidates()
    outer = (shape.batch,) if shape.batch else ()
    a, b, bias = draw(*outer, shape.m, shape.k), draw(*outer, shape.n, shape.k, seed=1), draw(shape.n, seed=2)
    again = {n: time_us(lambda n=n: gemm(a, b, bias, shape.number, n)) for n in candidates()}
    assert again[pick.candidate] < 1.03 * min(again.values()), again


EXAMPLE = [(81920, 576, 64, 128), (204800, 576, 64, 128), (81920, 576, 64, 256)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", EXAMPLE)
def test_2_the_examples_chains_are_faster_fused_on_ampere_and_never_kept_where_slower(sizes):
    m, k, n0, n1 = sizes
    a, weights, biases = chain_of(*sizes)
    (kernel,) = residence(m, n0, k, n1, n0).kernels
    profiler = Profiler(AS_BOLT)
    pair = Pair(Gemm(m, n0, k, epilogue="bias_relu"), Gemm(m, n1, n0, epilogue="bias_relu"))
    first, second = profiler.pick(pair.first).candidate, profiler.pick(pair.second).candidate

    def apart():
        return gemm(gemm(a, weights[0], biases[0], 2, first), weights[1], biases[1], 2, second)

    gain = time_us(apart) / time_us(lambda: fused(a, weights, biases, 2, 2, kernel))
    # The example's tiles and three stages are for earlier cards: on an H200 the gain is not reached.
    if torch.cuda.get_device_capability() < (9, 0):
        assert gain > 1.05, gain
    kept = profiler.pick_pair(pair, (kernel,))
    assert abs(gain - 1) < 0.05 or (kept is kernel) == (gain > 1), (gain, kept)


def test_2_the_first_product_has_no_memory():
    m, k, n0, n1 = 16384, 576, 64, 128
    a, weights, biases = chain_of(m, k, n0, n1)
    kernel = residence(m, n0, k, n1, n0).kernels[0]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = fused(a, weights, biases, 2, 2, kernel)
    assert torch.cuda.max_memory_allocated() - before == out.numel() * 2


def kernels_of(run):
    """Names of the kernels that one call launches."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.name for e in events if "memcpy" not in e.name.lower() and "memset" not in e.name.lower()]


def layer(batch=8, tokens=512):
    """One layer of BERT-Base, as the method compiles it."""
    pytest.importorskip("transformers")
    from stof_kernels.baselines.models import ModelProblem
    from stof_kernels.benchmarking.model_subject import subject
    from stof_kernels.integrations.models import Shape

    shape = Shape(layers=1, heads=12, hidden=768, ffn=3072, kv_heads=12, vocab=1000)
    return subject(ModelProblem("bert_base", batch, tokens, "bigbird", "float16", "cuda", size=shape))


def test_3_and_4_a_layer_is_six_products_and_the_others_kernels():
    bench = layer()
    want, eager_error = bench.reference()
    ready = registry.get("bolt", "model").prepare(bench)
    assert error(ready.run(), want.double()) < max(2e-3, 1.25 * eager_error)
    assert "0 persistent fusions" in ready.note
    assert "150 candidates timed" in ready.note
    names = kernels_of(ready.run)
    assert sum("gemm_kernel" in name for name in names) == 6, names
    others = [name for name in names if "gemm_kernel" not in name]
    assert not [name for name in others if "gelu" in name or "erf" in name or "flash" in name], names
    # Inductor's own kernels are named by what they read, a product's result too.
    assert not [name for name in others if "gemm" in name and not name.startswith("triton_")], names
    assert any("layer_norm" in name for name in others)
    assert any("softmax" in name for name in others)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4096, 2304, 768), (4096, 768, 3072), (32768, 3072, 768)])
def test_5_products_are_near_cublas_on_ampere_and_behind_on_hopper(sizes):
    m, n, k = sizes
    a, b = draw(m, k), draw(n, k, seed=1)
    pick = Profiler(AS_BOLT).pick(Gemm(m, n, k))
    share = time_us(lambda: a @ b.t()) / time_us(lambda: gemm(a, b, None, 0, pick.candidate))
    # Without Hopper's own instructions an H100-class card gives about 60 % of its rate.
    assert share > (0.85 if torch.cuda.get_device_capability() < (9, 0) else 0.45), share
    assert share < 1.25


@pytest.mark.slow
def test_5_a_long_model_is_slower_than_one_with_fused_attention():
    bench = layer(16, 2048)
    times = [time_us(registry.get(id, "model").prepare(bench).run, 2) for id in ("bolt", "torch_compile")]
    assert times[0] > times[1], times
