"""The experiments' six models, built from their configs with seeded random weights: nothing is downloaded.

``size="paper"`` is the model of the paper's experiment, ``"tiny"`` the same architecture in two layers of width 128 for tests.
transformers is imported inside the functions, so that ids and labels can be listed without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import settings
from ..formats import SparseMask
from ..masks import Pattern, causal, full, get
from . import transformers as stof_transformers
from .transformers import Masks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PATCH = 16  # ViT's patch side in pixels


@dataclass(frozen=True)
class Shape:
    """Width of a model: ``layers`` per stack, heads of 64 channels, ``ffn`` inner width, ``vocab`` tokens."""

    layers: int
    heads: int
    hidden: int
    ffn: int
    kv_heads: int
    vocab: int


TINY = Shape(layers=2, heads=2, hidden=128, ffn=256, kv_heads=2, vocab=1000)


@dataclass(frozen=True)
class ModelSpec:
    """One of the six: ``kind`` is ``encoder``, ``decoder``, ``encoder_decoder`` or ``vision``."""

    id: str
    label: str
    kind: str
    paper: Shape
    config: Callable[[Shape, int], PreTrainedConfig]
    model_class: str
    options: tuple[tuple[str, Any], ...] = ()

    def shape(self, size: str | Shape) -> Shape:
        """The widths of ``size``: ``paper``, ``tiny`` or any `Shape`; ValueError for another name."""
        if isinstance(size, Shape):
            return size
        if size not in ("paper", "tiny"):
            raise ValueError(f"model {self.id}: size {size!r}, allowed: paper, tiny")
        return self.paper if size == "paper" else TINY

    def tokens(self, seq_len: int) -> int:
        """Tokens that the model sees for a nominal length: itself, or for images the nearest count of patches below it."""
        return vit_side(seq_len) ** 2 // PATCH**2 + 1 if self.kind == "vision" else seq_len

    @property
    def attention_modules(self) -> int:
        """How many attentions one forward pass of the paper's size runs."""
        return self.paper.layers * (3 if self.kind == "encoder_decoder" else 1)


def vit_side(seq_len: int) -> int:
    """Side in pixels of the largest square image whose patches and class token are at most ``seq_len`` tokens."""
    if seq_len < 2:
        raise ValueError(f"vit: seq_len is {seq_len}, allowed: an integer >= 2 (a patch and the class token)")
    return math.isqrt(seq_len - 1) * PATCH


def _bert(s: Shape, seq_len: int) -> PreTrainedConfig:
    from transformers import BertConfig

    return BertConfig(
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        intermediate_size=s.ffn,
        vocab_size=s.vocab,
        max_position_embeddings=max(2048, seq_len),
    )


def _gpt2(s: Shape, seq_len: int) -> PreTrainedConfig:
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=s.hidden,
        n_layer=s.layers,
        n_head=s.heads,
        n_inner=s.ffn,
        vocab_size=s.vocab,
        n_positions=max(2048, seq_len),
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )


def _llama(s: Shape, seq_len: int) -> PreTrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        intermediate_size=s.ffn,
        vocab_size=s.vocab,
        max_position_embeddings=max(2048, seq_len),
        use_cache=False,
    )


def _t5(s: Shape, seq_len: int) -> PreTrainedConfig:
    from transformers import T5Config

    return T5Config(
        d_model=s.hidden,
        d_kv=64,
        d_ff=s.ffn,
        num_layers=s.layers,
        num_decoder_layers=s.layers,
        num_heads=s.heads,
        vocab_size=s.vocab,
        use_cache=False,
    )


def _vit(s: Shape, seq_len: int) -> PreTrainedConfig:
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        intermediate_size=s.ffn,
        image_size=vit_side(seq_len),
        patch_size=PATCH,
    )


_POOLERLESS = (("add_pooling_layer", False),)
_BASE = Shape(layers=12, heads=12, hidden=768, ffn=3072, kv_heads=12, vocab=30522)
_LARGE = Shape(layers=24, heads=16, hidden=1024, ffn=4096, kv_heads=16, vocab=30522)
_ALL = (
    ModelSpec("bert_base", "BERT-Base", "encoder", _BASE, _bert, "BertModel", _POOLERLESS),
    ModelSpec("bert_large", "BERT-Large", "encoder", _LARGE, _bert, "BertModel", _POOLERLESS),
    ModelSpec("gpt2", "GPT-2", "decoder", Shape(12, 12, 768, 3072, 12, 50257), _gpt2, "GPT2Model"),
    ModelSpec("llama", "LLaMA", "decoder", Shape(24, 16, 1024, 2816, 16, 32000), _llama, "LlamaModel"),
    ModelSpec("t5", "T5", "encoder_decoder", Shape(12, 12, 768, 3072, 12, 32128), _t5, "T5Model"),
    ModelSpec("vit", "ViT", "vision", Shape(12, 12, 768, 3072, 12, 0), _vit, "ViTModel", _POOLERLESS),
)
MODELS: dict[str, ModelSpec] = {spec.id: spec for spec in _ALL}


def spec(id: str) -> ModelSpec:
    """The model of that id; ValueError for an unknown one."""
    if id not in MODELS:
        raise ValueError(f"model {id!r} is unknown, allowed: {', '.join(MODELS)}")
    return MODELS[id]


def build(
    id: str,
    seq_len: int,
    attention: str = stof_transformers.NAME,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    size: str | Shape = "paper",
) -> nn.Module:
    """The model in inference mode with weights drawn from ``seed`` (`randomise_`), long enough for ``seq_len`` tokens.

    ``attention`` is an ``attn_implementation``. The weights are the same for every attention, dtype and device. Raises
    ImportError in one line without transformers, ValueError for an unknown id or size.
    """
    chosen = spec(id)
    shape = chosen.shape(size)
    stof_transformers.register()
    import transformers

    config = chosen.config(shape, seq_len)
    config._attn_implementation = attention
    with _without_init():
        model = getattr(transformers, chosen.model_class)(config, **dict(chosen.options))
    model.tie_weights()  # a part of the initialisation that was left out
    randomise_(model, seed)
    # Parameters one by one, not model.to(dtype): rotary frequencies are a buffer that has to stay in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def _without_init() -> AbstractContextManager[object]:
    """transformers' own way to leave parameters unset, where it has one: all of them are drawn by `randomise_` anyway."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return nullcontext()
    return no_init_weights()


def randomise_(model: nn.Module, seed: int) -> nn.Module:
    """Draw every weight anew: matrices with a gain above one, so that attention is peaked, no zero bias, no unit norm weight.

    A model straight from its config has zero biases, unit norm weights and nearly uniform attention: an output that lost a bias
    or used a wrong mask would pass for right.
    """

    def draw(item: tuple[int, tuple[str, nn.Parameter]]) -> None:
        # A generator for each parameter, so that they can be drawn side by side: one has only a core's worth of numbers.
        i, (name, parameter) = item
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
        with torch.no_grad():
            if parameter.dim() >= 2:
                parameter.copy_(noise * _gain(name, parameter))
            else:
                parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))

    with ThreadPoolExecutor(settings.max_build_jobs()) as pool:
        list(pool.map(draw, enumerate(model.named_parameters())))
    return model


def _gain(name: str, parameter: Tensor) -> float:
    """Standard deviation of a matrix: 1.5/sqrt(inputs); tables of embeddings and position biases have entries of order one."""
    if any(part in name for part in ("embed", "wte", "wpe", "shared", "relative_attention", "token")):
        return 0.5
    # Linear and convolution weights are (out, in, ...), GPT-2's Conv1D (in, out); both are within 2x of this.
    gain = 1.5 * (parameter.numel() / parameter.shape[0]) ** -0.5
    # T5 does not divide scores by sqrt(64): its query projection (".q") carries that factor, as in its own initialisation.
    return gain / 8 if name.endswith(".q.weight") else gain


def inputs(
    id: str,
    batch: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    size: str | Shape = "paper",
) -> dict[str, Tensor]:
    """Keyword arguments of one forward pass without masks, drawn from ``seed``."""
    chosen = spec(id)
    generator = torch.Generator().manual_seed(seed)
    if chosen.kind == "vision":
        side = vit_side(seq_len)
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator).to(device, dtype)}
    names = ["input_ids"] + (["decoder_input_ids"] if chosen.kind == "encoder_decoder" else [])
    vocab = chosen.shape(size).vocab
    return {n: torch.randint(0, vocab, (batch, seq_len), generator=generator).to(device) for n in names}


def patterns(id: str, seq_len: int, family: str = "bigbird") -> dict[str, Pattern]:
    """The experiment's mask by role (`transformers.Masks`): ``family``, and-ed with causal for decoders, dense across."""
    chosen = spec(id)
    tokens = chosen.tokens(seq_len)
    pattern = get(family, tokens)
    if chosen.kind == "encoder_decoder":
        return {"encoder": pattern, "decoder": pattern & causal(), "cross": full()}
    if chosen.kind == "decoder":
        return {"decoder": pattern & causal()}
    return {"encoder": pattern}


def masks(id: str, seq_len: int, family: str = "bigbird", device: torch.device | str = "cpu") -> SparseMask | Masks:
    """The experiment's mask as ``stof_mask=`` takes it, one plane for all batch entries and heads."""
    tokens = spec(id).tokens(seq_len)
    built = {
        r: SparseMask.from_pattern(p, tokens, tokens, device=device) for r, p in patterns(id, seq_len, family).items()
    }
    return Masks(**built) if len(built) > 1 else next(iter(built.values()))
