"""ByteTransformer (IPDPS 2023), reimplemented, in whole models: BERT's encoder layer, its only one.

A layer is 7 or 8 kernels for short sequences, 10 or 11 for long ones: QKV product, attention, output product, bias + residual +
LayerNorm, first product of the feed-forward with bias and tanh-GELU, second one, bias + residual + LayerNorm. Plain products
are cuBLAS's, with fp32 sums where the original has fp16 ones; the fused GELU is cuBLASLt's epilogue in the place of its CUTLASS
kernel, which had no Hopper instructions. Embeddings stay the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import native
from ..bytetransformer import Attention, launch_of, load
from ..registry import Unsupported
from .registry import ModelReady, Subject, model_method

if TYPE_CHECKING:
    from torch import Tensor, nn

EPSILON = 1e-6
FUSED_GELU_ROWS = (384, 16384)  # tokens of a batch between which the first feed-forward product has bias and GELU in it
_NOT_BERT = {
    "gpt2": "GPT-2 normalises before attention and feed-forward",
    "llama": "LLaMA has rotary positions, RMSNorm and gated feed-forward",
    "t5": "T5 has a relative position bias, RMSNorm and cross attention",
    "vit": "ViT normalises before attention and feed-forward",
}


@dataclass(frozen=True)
class LayerWeights:
    """One encoder layer's parameters as ByteTransformer stores them: matrices (in, out), Q, K and V side by side."""

    qkv: Tensor
    qkv_bias: Tensor
    output: Tensor
    output_bias: Tensor
    attention_gamma: Tensor
    attention_beta: Tensor
    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_bias: Tensor
    ffn_gamma: Tensor
    ffn_beta: Tensor

    @classmethod
    def of(cls, layer: nn.Module) -> LayerWeights:
        """Copied from one ``BertLayer`` of transformers."""
        import torch

        inside, after, up, down = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
        projections = (inside.query, inside.key, inside.value)

        def matrix(*parts: nn.Module) -> Tensor:
            return torch.cat([part.weight.detach().t() for part in parts], 1).contiguous()

        own = (
            *(matrix(*projections), torch.cat([part.bias.detach() for part in projections])),
            *(matrix(after.dense), after.dense.bias, after.LayerNorm.weight, after.LayerNorm.bias),
            *(matrix(up.dense), up.dense.bias),
            *(matrix(down.dense), down.dense.bias, down.LayerNorm.weight, down.LayerNorm.bias),
        )
        return cls(*(tensor.detach() for tensor in own))


def encoder_layer(x: Tensor, weights: LayerWeights, attention: Attention, batch: int) -> Tensor:
    """One layer on x (batch * tokens, hidden) -> the same shape."""
    import torch

    ops = torch.ops.stof_bytetransformer
    rows, hidden = x.shape
    qkv = torch.mm(x, weights.qkv).view(batch, rows // batch, -1)
    context = attention(qkv, weights.qkv_bias).view(rows, hidden)
    y = ops.bias_residual_norm.default(
        torch.mm(context, weights.output),
        *(weights.output_bias, x, weights.attention_gamma, weights.attention_beta, EPSILON),
    )
    if fuses_gelu(rows, str(x.dtype)):
        inner = torch._addmm_activation(weights.inner_bias, y, weights.inner, use_gelu=True)
    else:
        inner = torch.mm(y, weights.inner)
        ops.bias_gelu_.default(inner, weights.inner_bias)
    return ops.bias_residual_norm.default(
        torch.mm(inner, weights.outer), weights.outer_bias, y, weights.ffn_gamma, weights.ffn_beta, EPSILON
    )


def fuses_gelu(rows: int, dtype: str) -> bool:
    """Whether the first product of the feed-forward applies bias and GELU itself, by the original's rule for an A100."""
    return dtype.endswith("float16") and FUSED_GELU_ROWS[0] <= rows <= FUSED_GELU_ROWS[1]


@model_method(
    "bytetransformer",
    experiments=("end_to_end",),
    depends=("baselines/bytetransformer.py", *native.sources("bytetransformer")),
    devices=("cuda",),
    reimplemented=True,
)
def bytetransformer(subject: Subject) -> ModelReady:
    """BERT with every encoder layer replaced; weights and mask are brought into its layout before the timed call."""
    import torch

    problem = subject.problem
    if not problem.model.startswith("bert"):
        raise Unsupported(f"ByteTransformer has BERT's encoder layer only: {_NOT_BERT[problem.model]}")
    model, given = subject.model("stof_sdpa"), subject.inputs("stof_sdpa")
    config = model.config
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    launch = launch_of(problem.tokens, heads, head_dim, problem.dtype)
    load()
    layers = [LayerWeights.of(layer) for layer in model.encoder.layer]
    keep = given["stof_mask"]
    mask = keep[:, 0].expand(problem.batch, -1, -1).to(layers[0].qkv.dtype).contiguous()
    attention = Attention(mask, heads, head_dim, head_dim**-0.5)

    def run() -> Tensor:
        with torch.no_grad():
            x = model.embeddings(input_ids=given["input_ids"])
            shape = x.shape
            x = x.reshape(-1, shape[-1])
            for weights in layers:
                x = encoder_layer(x, weights, attention, problem.batch)
            return x.view(shape)

    gelu = (
        "in cuBLASLt's epilogue" if fuses_gelu(problem.batch * problem.tokens, problem.dtype) else "a kernel of its own"
    )
    notes = (
        str(launch),
        f"tanh-GELU {gelu}",
        "plain products by cuBLAS with fp32 sums",
        "holds the model's matrices twice",
    )
    return ModelReady(run, note="; ".join(notes))
