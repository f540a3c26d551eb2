"""ByteTransformer's paths and encoder layer as Python wires them, with its operators stood in for by torch on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stof_kernels import masks
from stof_kernels.baselines import Problem, Unsupported, bytetransformer, get
from stof_kernels.baselines.bytetransformer import Attention, launch_of, pack
from stof_kernels.baselines.inputs import make_tensors
from stof_kernels.baselines.models.bytetransformer import LayerWeights, encoder_layer, fuses_gelu
from stof_kernels.benchmarking.check import relative_error

SCHEMAS = (
    "short_attention(Tensor qkv, Tensor bias, Tensor mask, int heads, float scale) -> Tensor",
    "long_attention(Tensor qkv, Tensor bias, Tensor mask, Tensor lengths, int heads, float scale, Tensor(a!) split, "
    "Tensor(b!) scores, Tensor(c!) partials, Tensor(d!) stats) -> Tensor",
    "split_heads(Tensor qkv, Tensor bias, int heads, Tensor(a!) split) -> ()",
    "masked_softmax_(Tensor(a!) scores, Tensor mask) -> ()",
    "merge_heads(Tensor context) -> Tensor",
    "bias_residual_norm(Tensor x, Tensor bias, Tensor residual, Tensor gamma, Tensor beta, float epsilon) -> Tensor",
    "bias_gelu_(Tensor(a!) x, Tensor bias) -> ()",
)


def split_heads(qkv, bias, heads, split):
    batch, tokens, width = qkv.shape
    split.copy_((qkv + bias).view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 3, 0, 1, 4))


def attend(qkv, bias, mask, heads, scale):
    batch, tokens, width = qkv.shape
    split = qkv.new_empty((3, heads, batch, tokens, width // 3 // heads))
    split_heads(qkv, bias, heads, split)
    q, k, v = split.float()
    scores = scale * q @ k.transpose(-1, -2) - 10000 * (1 - mask.float())
    return merge_heads((scores.softmax(-1) @ v).to(qkv.dtype))


def long_attention(qkv, bias, mask, lengths, heads, scale, split, scores, partials, stats):
    batch, tokens, width = qkv.shape
    assert split.shape == (3, heads, batch, tokens, width // 3 // heads)
    assert scores.shape == (batch, heads, tokens, tokens)
    assert partials.shape == (batch, heads, -(-tokens // 128), tokens, 2)
    assert stats.shape == (batch, heads, tokens, 2)
    assert partials.dtype == stats.dtype == torch.float32
    assert lengths.dtype == torch.int32
    assert lengths.tolist() == [tokens] * batch
    return attend(qkv, bias, mask, heads, scale)


def masked_softmax_(scores, mask):
    scores.copy_((scores.float() - 10000 * (1 - mask.float())).softmax(-1))


def merge_heads(context):
    heads, batch, tokens, dim = context.shape
    return context.permute(1, 2, 0, 3).reshape(batch, tokens, heads * dim)


def bias_residual_norm(x, bias, residual, gamma, beta, epsilon):
    total = x.float() + bias.float() + residual.float()
    return F.layer_norm(total, total.shape[-1:], gamma.float(), beta.float(), epsilon).to(x.dtype)


def bias_gelu_(x, bias):
    x.copy_(F.gelu(x + bias, approximate="tanh"))


@pytest.fixture
def operators(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the real operators are tested here: test_cuda_bytetransformer.py")
    library = torch.library.Library("stof_bytetransformer", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    functions = (attend, long_attention, split_heads, masked_softmax_, merge_heads, bias_residual_norm, bias_gelu_)
    for schema, function in zip(SCHEMAS, functions, strict=True):
        library.impl(schema.partition("(")[0], function, "CPU")
    monkeypatch.setattr(bytetransformer, "load", lambda: None)
    monkeypatch.setattr("stof_kernels.baselines.models.bytetransformer.load", lambda: None)
    yield
    library._destroy()


def problem_of(tokens, batch=2, heads=2, dtype="float16", family="bigbird", dim=64):
    return Problem(masks.get(family, tokens), batch, tokens, tokens, heads, heads, dim, dtype, "cpu", seed=2)


@pytest.mark.parametrize(
    ("tokens", "dtype", "path"),
    [
        *((40, "float16", "short kernel A"), (200, "float16", "short kernel B"), (360, "float16", "unfused path")),
        *((392, "float16", "long path"), (70, "float32", "unfused path")),
    ],
)
def test_every_path_hands_its_buffers_to_the_kernels(operators, tokens, dtype, path):
    problem = problem_of(tokens, dtype=dtype)
    tensors = make_tensors(problem)
    with torch.no_grad():
        prepared = get("bytetransformer").prepare(problem, tensors)
        out = prepared.run()
        assert relative_error(problem, tensors, prepared.applied, out) < (3e-3 if dtype == "float16" else 1e-5)
        again = prepared.run()
    assert torch.equal(out, again)
    assert out.data_ptr() != again.data_ptr(), "a result must not be overwritten by the next call"
    assert prepared.exact
    assert path in prepared.note
    assert torch.equal(prepared.mask_build()[0].bool().float().mean(), prepared.mask_build().float().mean())


def test_the_mask_really_reaches_the_kernels(operators):
    problem, other = problem_of(40), problem_of(40, family="causal")
    tensors = make_tensors(problem)
    with torch.no_grad():
        out = get("bytetransformer").prepare(problem, tensors).run()
    assert relative_error(other, tensors, other.pattern, out) > 0.1


def test_the_global_flag_for_fp16_sums_is_put_back(operators):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    seen = []
    problem = problem_of(70, dtype="float32")
    prepared = get("bytetransformer").prepare(problem, make_tensors(problem))
    real = torch.bmm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", lambda *a, **k: (seen.append(matmul.allow_fp16_accumulation), real(*a, **k))[1])
        prepared.run()
    assert seen == [True]
    assert matmul.allow_fp16_accumulation == before


def bert(layers=2, hidden=128, heads=2, tokens=40, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    from stof_kernels.integrations import models

    config = transformers.BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * hidden,
        vocab_size=100, max_position_embeddings=tokens, attn_implementation="eager",
    )  # fmt: skip
    model = models.randomise_(transformers.BertModel(config, add_pooling_layer=False), 3)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("tokens", [40, 200])  # 80 rows: GELU apart; 400 rows: fused
def test_the_layer_is_berts_up_to_its_gelu(operators, tokens):
    model, batch = bert(tokens=tokens, dtype=torch.float16), 2
    x = torch.randn(batch, tokens, 128, generator=torch.Generator().manual_seed(1)).half()
    attention = Attention(torch.ones(batch, tokens, tokens).tril().half(), 2, 64, 0.125)
    layer = model.encoder.layer[0]
    out = encoder_layer(x.view(-1, 128), LayerWeights.of(layer), attention, batch).view_as(x)
    exact = layer.float()
    hidden = torch.zeros(1, 1, tokens, tokens).masked_fill(~torch.ones(tokens, tokens).tril().bool(), -torch.inf)
    want = exact(x.float(), attention_mask=hidden)
    want = want[0] if isinstance(want, tuple) else want
    assert float((out.float() - want).norm() / want.norm()) < 3e-3
    assert fuses_gelu(batch * tokens, "torch.float16") == (tokens == 200)


def test_gelu_is_fused_where_the_original_fuses_it():
    assert [fuses_gelu(rows, "float16") for rows in (383, 384, 16384, 16385)] == [False, True, True, False]
    assert not fuses_gelu(512, "float32")


class TinySubject:
    """BERT in two layers of width 128 with the experiment's mask."""

    def __init__(self, model="bert_base", seq_len=64, dtype="float32"):
        from stof_kernels.baselines.models import ModelProblem
        from stof_kernels.integrations import variants

        self.problem = ModelProblem(model, 3, seq_len, "bigbird", dtype, "cpu", seed=1, size="tiny")
        self._variants = variants

    def model(self, attention):
        return self._variants.build(self.problem.case, attention)

    def inputs(self, attention):
        return self._variants.arguments(self.problem.case, attention)


def test_whole_bert_is_right_up_to_its_gelu(operators):
    pytest.importorskip("transformers")
    from stof_kernels.baselines.models.bytetransformer import bytetransformer as prepare
    from stof_kernels.integrations import variants

    subject = TinySubject()
    ready = prepare(subject)
    out, want = ready.run(), variants.reference(subject.problem.case)
    assert out.shape == want.shape
    assert float((out - want).norm() / want.norm()) < 1e-3
    assert "unfused path" in ready.note, "float32 is not fused"


@pytest.mark.parametrize(
    ("model", "seq_len", "reason"),
    [
        ("gpt2", 64, "BERT's encoder layer only: GPT-2 normalises before"),
        ("llama", 64, "BERT's encoder layer only: LLaMA has rotary"),
        ("t5", 64, "BERT's encoder layer only: T5 has a relative position bias"),
        ("vit", 64, "BERT's encoder layer only: ViT normalises before"),
    ],
)
def test_other_models_are_refused_with_the_reason(model, seq_len, reason):
    pytest.importorskip("transformers")
    from stof_kernels.baselines.models.bytetransformer import bytetransformer as prepare

    with pytest.raises(Unsupported, match=reason):
        prepare(TinySubject(model, seq_len))


def test_every_model_of_the_experiment_is_run_or_refused_by_name():
    from stof_kernels.baselines.models.bytetransformer import _NOT_BERT
    from stof_kernels.baselines.models.registry import MODELS

    assert set(MODELS) == {"bert_base", "bert_large", *_NOT_BERT}
    with pytest.raises(Unsupported, match="2048 tokens: the fused paths end at 1024"):
        launch_of(2048, 12, 64)


def test_packed_form_is_that_of_the_layers_product():
    q, k, v = (torch.randn(2, 3, 5, 64) for _ in range(3))
    assert torch.equal(pack(q, k, v)[1, 4, 3 * 64 : 4 * 64], k[1, 0, 4])
