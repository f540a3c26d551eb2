"""ByteTransformer on a GPU: every path against the reference, and the five checks of a faithful reimplementation."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from on_device import poison_memory, time_us

from stof_kernels import masks
from stof_kernels.baselines import Problem, Unsupported, get
from stof_kernels.baselines import bytetransformer as subject
from stof_kernels.baselines.bytetransformer import Attention, launch_of
from stof_kernels.baselines.inputs import make_tensors
from stof_kernels.baselines.models.bytetransformer import LayerWeights, encoder_layer
from stof_kernels.benchmarking.check import relative_error

pytestmark = pytest.mark.gpu
D = 64
TOLERANCE = 3e-3  # fp16 sums; the lane-by-lane emulation gives 0.5e-3 to 1e-3


@pytest.fixture(scope="module", autouse=True)
def kernels():
    try:
        subject.load()
    except Unsupported as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def poisoned_memory():
    poison_memory()


def draw(batch, tokens, heads, dim=D, dtype=torch.float16, kept=0.3, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed + tokens)
    qkv = torch.randn(batch, tokens, 3 * heads * dim, generator=generator, device="cuda").to(dtype)
    bias = torch.randn(3 * heads * dim, generator=generator, device="cuda").to(dtype) / 2
    keep = torch.rand(batch, tokens, tokens, generator=generator, device="cuda") < kept
    keep |= torch.eye(tokens, dtype=torch.bool, device="cuda")
    return qkv, bias, keep


def expected(qkv, bias, keep, heads, scale):
    batch, tokens, width = qkv.shape
    q, k, v = (qkv + bias).double().view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(~keep[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, -1)


def error(out, want):
    return float((out.double() - want.double()).norm() / want.double().norm())


def attend(qkv, bias, keep, heads):
    dim = qkv.shape[-1] // 3 // heads
    attention = Attention(keep.to(qkv.dtype), heads, dim, dim**-0.5)
    return attention(qkv, bias)


def check(batch, tokens, heads, dim=D, dtype=torch.float16, tolerance=TOLERANCE):
    qkv, bias, keep = draw(batch, tokens, heads, dim, dtype)
    out = attend(qkv, bias, keep, heads)
    assert error(out, expected(qkv, bias, keep, heads, dim**-0.5)) < tolerance
    assert torch.equal(out, attend(qkv, bias, keep, heads)), "not the same twice"


@pytest.mark.parametrize("rows", range(16, 353, 16))
def test_short_kernels_at_every_number_of_tiles(rows):
    for tokens in (rows, rows - 1, rows - 7, rows - 15):
        check(2, tokens, 3)


@pytest.mark.parametrize("tokens", [1, 16, 17, 31, 47, 48])
def test_short_kernel_with_16_channels(tokens):
    check(3, tokens, 4, dim=16)


@pytest.mark.parametrize(("batch", "tokens", "heads"), [
    *((1, 392, 1), (2, 400, 3), (3, 448, 2), (2, 512, 12), (1, 520, 5), (2, 640, 3), (5, 776, 2), (1, 1016, 12)),
    *((40, 392, 2), (16, 1024, 12), (1, 1024, 32)),
])  # fmt: skip
def test_long_path(batch, tokens, heads):
    assert launch_of(tokens, heads, D).path == "long"
    check(batch, tokens, heads)


@pytest.mark.parametrize(("tokens", "heads", "dim"), [
    *((353, 3, 64), (384, 12, 64), (391, 2, 64), (90, 5, 32), (500, 8, 128), (1023, 4, 64), (1030, 2, 64), (1365, 12, 64)),
    (601, 32, 64),
])  # fmt: skip
def test_unfused_path(tokens, heads, dim):
    assert launch_of(tokens, heads, dim).path == "unfused"
    check(2, tokens, heads, dim)


def test_float32_is_not_fused():
    check(2, 70, 3, dtype=torch.float32, tolerance=1e-5)
    check(1, 700, 2, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("family", ["causal", "sliding_window", "longformer", "bigbird"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 128), (8, 256), (2, 512), (1, 1024)])
def test_the_method_on_the_experiments_masks(family, batch, tokens):
    problem = Problem(masks.get(family, tokens), batch, tokens, tokens, 12, 12, D, "float16", "cuda", seed=1)
    tensors = make_tensors(problem)
    with torch.no_grad():
        prepared = get("bytetransformer").prepare(problem, tensors)
        assert relative_error(problem, tensors, prepared.applied, prepared.run()) < TOLERANCE
    assert prepared.exact


def test_graph_replay_sees_new_inputs():
    qkv, bias, keep = draw(2, 512, 3)
    attention = Attention(keep.half(), 3, D, D**-0.5)
    attention(qkv, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(qkv, bias)
    other, _, _ = draw(2, 512, 3, seed=9)
    qkv.copy_(other)
    graph.replay()
    assert error(out, expected(other, bias, keep, 3, D**-0.5)) < TOLERANCE


def test_wrong_arguments_are_refused_in_one_line():
    qkv, bias, keep = draw(2, 64, 3)
    op = torch.ops.stof_bytetransformer.short_attention.default
    for arguments, said in (
        ((qkv, bias, keep, 3, 0.125), "mask has dtype Bool, it must be Half"),
        ((qkv, bias[:-1], keep.half(), 3, 0.125), "bias has shape"),
        ((qkv, bias, keep[:1].half(), 3, 0.125), "mask has shape"),
        ((qkv, bias, keep.half(), 5, 0.125), "3 \\* 5 heads"),
        ((qkv.transpose(0, 1), bias, keep.half(), 3, 0.125), "must be|contiguous"),
    ):
        with pytest.raises(RuntimeError, match=said):
            op(*arguments)


# ---- the five checks -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("tokens", "count"), [(64, 1), (128, 1), (352, 1), (512, 4), (1024, 4), (384, 5)])
def test_1_kernels_per_attention(tokens, count):
    qkv, bias, keep = draw(2, tokens, 12)
    attention = Attention(keep.half(), 12, D, D**-0.5)
    names = kernels_of(lambda: attention(qkv, bias))
    assert len(names) == count, names


@pytest.mark.parametrize(
    ("batch", "tokens", "counts"), [(1, 128, (8,)), (8, 128, (7,)), (8, 512, (10,)), (1, 1024, (10,))]
)
def test_1_kernels_per_layer(batch, tokens, counts):
    model = bert(tokens)
    x = torch.randn(batch * tokens, 768, device="cuda", dtype=torch.float16)
    weights = LayerWeights.of(model.encoder.layer[0])
    attention = Attention(torch.ones(batch, tokens, tokens, device="cuda", dtype=torch.float16), 12, D, D**-0.5)
    with torch.no_grad():
        names = kernels_of(lambda: encoder_layer(x, weights, attention, batch))
    # cuBLAS may cut the columns of a product, and then adds the parts in a kernel of its own.
    own = [name for name in names if "splitkreduce" not in name.lower()]
    assert len(own) in counts, names


def launches_of(run, path):
    """(threads, bytes of shared memory, static and dynamic) of each kernel of one call, from the profiler's trace."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    profiled.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "kernel"]
    return [(math.prod(e["args"]["block"]), e["args"]["shared memory"]) for e in events]


@pytest.mark.parametrize(("tokens", "threads", "size"), [
    *((16, 128, 5376), (80, 800, 37120), (96, 576, 30720), (112, 896, 40704), (128, 1024, 45056), (160, 960, 46080)),
    *((176, 704, 41728), (256, 1024, 58368), (272, 544, 50432), (352, 704, 64512)),
])  # fmt: skip
def test_2_blocks_have_the_published_threads_and_shared_memory(tokens, threads, size, tmp_path):
    qkv, bias, keep = draw(1, tokens, 2)
    attention = Attention(keep.half(), 2, D, D**-0.5)
    assert (attention.launch.threads, attention.launch.shared_bytes) == (threads, size)
    assert launches_of(lambda: attention(qkv, bias), tmp_path / "trace.json") == [(threads, size)]


def test_2_what_the_fused_paths_leave_is_routed_or_refused_by_name():
    with pytest.raises(Unsupported, match="the fused paths end at 1024"):
        launch_of(2048, 12, D)
    assert {str(launch_of(tokens, 12, D)) for tokens in range(353, 385)} == {"unfused path, cuBLAS"}


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "tokens"), [(8, 256), (8, 1024)])
def test_3_time_does_not_depend_on_what_the_mask_keeps(batch, tokens):
    qkv, bias, _ = draw(batch, tokens, 12)
    times = []
    for keep in (torch.ones(tokens, tokens), torch.ones(tokens, tokens).tril(), torch.eye(tokens)):
        mask = keep.cuda().half().expand(batch, -1, -1).contiguous()
        attention = Attention(mask, 12, D, D**-0.5)
        times.append(time_us(lambda attention=attention: attention(qkv, bias)))
    assert max(times) < 1.05 * min(times), times


def test_3_a_row_without_keys_is_unmasked_when_short_and_rounded_to_eights_when_long():
    for tokens in (64, 256):
        qkv, bias, keep = draw(1, tokens, 2)
        open_row = keep.clone()
        keep[0, 5], open_row[0, 5] = False, True
        assert error(attend(qkv, bias, keep, 2)[0, 5], attend(qkv, bias, open_row, 2)[0, 5]) < 5e-3
    qkv, bias, keep = draw(1, 512, 2)
    keep[0, 5] = False
    out = attend(qkv, bias, keep, 2)[0, 5].view(2, D)
    # Shifted by 10000 and stored as fp16, whose numbers lie 8 apart there: most scores become alike, and one above 4 stands
    # far above them. Maximum and sum are of the scores before they were rounded.
    q, k, v = (qkv + bias).double().view(512, 3, 2, D).permute(1, 2, 0, 3)
    shifted = (q[:, 5:6] @ k.transpose(1, 2))[:, 0].float() / 8 - 10000
    top = shifted.max(-1, keepdim=True).values
    weights = (shifted.half().float() - top).exp() / (shifted - top).exp().sum(-1, keepdim=True)
    assert error(out, (weights.double()[:, None] @ v)[:, 0]) < 2e-2


def test_4_the_long_path_writes_every_score_once_as_fp16():
    qkv, bias, keep = draw(4, 640, 3)
    attention = Attention(keep.half(), 3, D, D**-0.5)
    for buffer in (attention._scores, attention._partials, attention._stats):
        buffer.fill_(float("nan"))
    attention(qkv, bias)
    scores = attention._scores
    assert scores.numel() * scores.element_size() == 2 * 4 * 3 * 640 * 640
    assert not scores.isnan().any()
    assert not attention._partials.isnan().any()
    kept = keep[:, None].expand_as(scores)
    assert (scores[~kept] < -9900).all()
    q, k, _ = (qkv + bias).double().view(4, 640, 3, 3, D).permute(2, 0, 3, 1, 4)
    want = (q @ k.transpose(-1, -2) / 8)[kept]
    assert float((scores[kept].double() - want).abs().max()) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8, 16])
def test_5_faster_than_eager_when_short_and_slower_than_flash_when_long(batch):
    for tokens in (128, 256, 512, 1024):
        problem = Problem(masks.causal(), batch, tokens, tokens, 12, 12, D, "float16", "cuda", seed=1)
        tensors = make_tensors(problem)
        with torch.no_grad():
            ours, eager, flash = (
                time_us(get(name).prepare(problem, tensors).run) for name in ("bytetransformer", "torch_native", "fa2")
            )
        if tokens <= 256:
            assert eager > 1.5 * ours, (tokens, ours, eager)
        elif batch > 1:
            assert ours > flash, (tokens, ours, flash)


# ---- the encoder layer -----------------------------------------------------------------------------------------------


def bert(tokens):
    transformers = pytest.importorskip("transformers")
    from stof_kernels.integrations import models

    config = transformers.BertConfig(num_hidden_layers=1, max_position_embeddings=tokens, attn_implementation="eager")
    model = models.randomise_(transformers.BertModel(config, add_pooling_layer=False), 3)
    return model.to("cuda", torch.float16).eval().requires_grad_(False)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 128), (8, 128), (3, 500), (2, 512)])
def test_the_layer_is_berts_up_to_its_gelu(batch, tokens):
    model = bert(tokens)
    x = torch.randn(batch, tokens, 768, generator=torch.Generator().manual_seed(1)).to("cuda", torch.float16)
    keep = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()
    attention = Attention(keep.half().expand(batch, -1, -1).contiguous(), 12, D, D**-0.5)
    with torch.no_grad():
        out = encoder_layer(x.view(-1, 768), LayerWeights.of(model.encoder.layer[0]), attention, batch).view_as(x)
        hidden = torch.zeros(1, 1, tokens, tokens, device="cuda").masked_fill(~keep, -torch.inf)
        want = model.encoder.layer[0].float()(x.float(), attention_mask=hidden)
    want = want[0] if isinstance(want, tuple) else want
    assert error(out, want) < 3e-3


@pytest.mark.parametrize("columns", [128, 768, 1024, 4096])
def test_norm_and_gelu(columns):
    generator = torch.Generator("cuda").manual_seed(columns)
    x, residual = torch.randn(2, 37, columns, generator=generator, device="cuda").half()
    bias, gamma, beta = torch.randn(3, columns, generator=generator, device="cuda").half()
    ops = torch.ops.stof_bytetransformer
    want = F.layer_norm(x.float() + bias.float() + residual.float(), (columns,), gamma.float(), beta.float(), 1e-6)
    assert error(ops.bias_residual_norm(x, bias, residual, gamma, beta, 1e-6), want) < 1e-3
    want = F.gelu(x.float() + bias.float(), approximate="tanh")
    ops.bias_gelu_(x, bias)
    assert error(x, want) < 1e-3
