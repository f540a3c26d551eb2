"""``attn_implementation="stof"`` for any Hugging Face transformers model that uses the attention interface.

    from stof_kernels.integrations import transformers as stof_transformers
    stof_transformers.register()
    model = AutoModel.from_config(config, attn_implementation="stof")
    model(**inputs)                                   # the model's own mask: causal or not, sliding, padding honoured
    model(**inputs, stof_mask=masks.bigbird(32, 32))  # a pattern: and-ed with the model's own mask
    model(**inputs, stof_mask=sparse_mask)            # a SparseMask: the whole mask, used as it is (see below)

A `SparseMask` is taken as the complete mask of every self-attention, so one for a causal decoder has to hold the causal
constraint itself (``pattern & masks.causal()``); it is the form that torch.compile and torch.export accept. Models with cross
attention take `Masks`. What cannot be honoured is refused in one line: nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..formats import SparseMask
from ..masks import Pattern, causal, full
from ..ops import sparse_attention

NAME = "stof"
_NEEDS = (
    "stof_kernels.integrations.transformers: needs transformers >= 5, install it with: pip install 'transformers>=5'"
)
# Keywords that change what attention computes and that the operator has no counterpart for.
_REFUSED = ("softcap", "s_aux", "sinks", "output_attentions")


@dataclass(frozen=True)
class Masks:
    """Masks of an encoder-decoder model by the role of the attention; None leaves a role its own mask."""

    encoder: SparseMask | Pattern | None = None
    decoder: SparseMask | Pattern | None = None
    cross: SparseMask | Pattern | None = None


torch.export.register_dataclass(Masks, serialized_type_name="stof_kernels.Masks")


def register() -> None:
    """Make ``attn_implementation="stof"`` known to transformers; calling it again does no harm.

    Raises ImportError in one line where transformers is missing or too old.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError:
        raise ImportError(_NEEDS) from None
    AttentionInterface.register(NAME, stof_attention)
    AttentionMaskInterface.register(NAME, stof_mask_function)


@dataclass
class ModelMask:
    """The mask that a model asks for, as a rule: turned into a SparseMask by the first layer that needs it.

    ``arguments`` are those of a transformers mask function. A model compiled with a ``stof_mask`` of its own never builds this.
    """

    arguments: dict[str, Any]
    _built: dict[Pattern | None, SparseMask] = field(default_factory=dict)

    @property
    def padding(self) -> Tensor | None:
        """The 2-D padding mask (batch, keys), True = a real token, or None."""
        return self.arguments.get("attention_mask")

    def sparse(self, pattern: Pattern | None) -> SparseMask:
        """The model's own mask, padding included, and-ed with ``pattern``; built once per forward."""
        if pattern not in self._built:
            self._built[pattern] = self._build(pattern)
        return self._built[pattern]

    def _build(self, pattern: Pattern | None) -> SparseMask:
        _refuse_while_tracing()
        args = self.arguments
        q_len, kv_len, device = args["q_length"], args["kv_length"], torch.device(args["device"])
        padded = self.padding is not None and not bool(self.padding.all())
        rule = None if padded else _known_rule(args)
        if rule is not None:
            return _bound(rule if pattern is None else pattern & rule, q_len, kv_len, device)
        from transformers.masking_utils import sdpa_mask

        keep = sdpa_mask(**{**args, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        if pattern is not None:
            keep = keep & _bound(pattern, q_len, kv_len, device).to_dense()
        return SparseMask.from_dense(keep, q_len, kv_len)


def stof_mask_function(**arguments: Any) -> ModelMask:
    """What transformers calls once per forward (arguments of ``AttentionMaskInterface``); hands every layer a `ModelMask`."""
    return ModelMask(arguments)


def stof_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    stof_mask: SparseMask | Pattern | Masks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query (B, Hq, Lq, D), key and value (B, Hkv, Lk, D) -> ((B, Lq, Hq, D), no weights).

    Raises ValueError or TypeError in one line for what it cannot honour: dropout, attention weights, soft caps, sinks, a mask
    given twice, a mask built while a compiler traces.
    """
    _refuse(dropout, kwargs)
    causal_here = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    role = role_of(module)
    given = select_mask(stof_mask, role)
    if given is None and attention_mask is None and kwargs.get("sliding_window") is not None:
        raise ValueError(
            "attn_implementation='stof': sliding_window without a mask, allowed: a model that makes its mask"
        )
    mask, bias = _mask_and_bias(given, attention_mask, causal_here, query.shape[2], key.shape[2], query.device)
    # Cross attention has no positions to relate: what arrives is a tensor of zeros as large as the scores.
    if position_bias is not None and role != "cross":
        bias = position_bias if bias is None else bias + position_bias
    out = sparse_attention(query, key, value, mask, bias=bias, scale=scaling)
    return out.transpose(1, 2), None


def role_of(module: nn.Module) -> str:
    """``encoder``, ``decoder`` or ``cross``: which mask of `Masks` an attention module takes."""
    decoder, is_causal = getattr(module, "is_decoder", False), getattr(module, "is_causal", False)
    named_cross = getattr(module, "is_cross_attention", False) or "cross" in type(module).__name__.lower()
    if named_cross or (decoder and not is_causal):
        return "cross"
    return "decoder" if decoder or is_causal else "encoder"


def select_mask(given: Any, role: str) -> Any:
    """The mask that ``stof_mask=`` means for a role; one mask alone serves every self-attention and no cross attention."""
    if isinstance(given, Masks):
        return getattr(given, role)
    if given is not None and role == "cross":
        raise ValueError(
            f"stof_mask is one {type(given).__name__} in a model with cross attention, "
            "allowed: integrations.transformers.Masks(encoder=..., decoder=..., cross=...)"
        )
    return given


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(f"attn_implementation='stof': dropout is {dropout}, allowed: 0 (inference only, model.eval())")
    for name in _REFUSED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"attn_implementation='stof': {name} is set and has no counterpart, allowed: not given")


def _mask_and_bias(
    given: SparseMask | Pattern | None,
    model_mask: ModelMask | Tensor | None,
    is_causal: bool,
    q_len: int,
    kv_len: int,
    device: torch.device,
) -> tuple[SparseMask, Tensor | None]:
    """One mask and an additive bias out of what the caller gave and what the model asks for."""
    if model_mask is not None and not isinstance(model_mask, (ModelMask, Tensor)):
        got = type(model_mask).__name__
        raise TypeError(f"attn_implementation='stof': attention_mask is {got}, allowed: a 2-D or 4-D tensor or none")
    if isinstance(given, SparseMask):
        _refuse_second_mask(model_mask)
        return given, None
    if given is not None and not isinstance(given, Pattern):
        got = type(given).__name__
        raise TypeError(f"stof_mask is {got}, allowed: a SparseMask, a pattern of stof_kernels.masks or Masks of them")
    if isinstance(model_mask, ModelMask):
        return model_mask.sparse(given), None
    _refuse_while_tracing()
    if isinstance(model_mask, Tensor):
        if given is not None:
            raise ValueError("stof_mask beside a 4-D attention_mask, allowed: one of them (and the two into one mask)")
        if model_mask.dtype == torch.bool:
            return _from_dense(model_mask, q_len, kv_len), None
        return _bound(full(), q_len, kv_len, device), model_mask
    rule = causal(kv_len - q_len) if is_causal else full()
    return _bound(rule if given is None else given & rule, q_len, kv_len, device), None


def _refuse_second_mask(model_mask: ModelMask | Tensor | None) -> None:
    """A SparseMask is the whole mask, so a padding mask that removes something cannot be given beside it."""
    extra = model_mask.padding if isinstance(model_mask, ModelMask) else model_mask
    # Tokenizers return a mask of ones where nothing is padded; a tracing compiler cannot look.
    if extra is None or (not torch.compiler.is_compiling() and extra.dtype == torch.bool and bool(extra.all())):
        return
    raise ValueError(
        "stof_mask is a SparseMask beside an attention_mask, allowed: one of them; fold the padding into the mask with "
        "SparseMask.from_dense(mask.to_dense() & attention_mask[:, None, None, :].bool())"
    )


def _refuse_while_tracing() -> None:
    if torch.compiler.is_compiling():
        raise ValueError(
            "attn_implementation='stof': a mask cannot be built while a compiler traces, allowed: "
            "model(..., stof_mask=SparseMask) (or Masks of them)"
        )


def _known_rule(args: dict[str, Any]) -> Pattern | None:
    """The pattern that equals the model's mask function, if it is one of the two plain ones at integer offsets."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    rule: Callable = args["mask_function"]
    offset = (args.get("q_offset") or 0, args.get("kv_offset") or 0)
    if rule is bidirectional_mask_function:
        return full()
    if rule is causal_mask_function and all(isinstance(o, int) for o in offset):
        return causal(offset[0] - offset[1])
    return None


@lru_cache(maxsize=32)
def _bound(pattern: Pattern, q_len: int, kv_len: int, device: torch.device) -> SparseMask:
    return SparseMask.from_pattern(pattern, q_len, kv_len, device=device)


_dense = WeakTensorKeyDictionary()


def _from_dense(keep: Tensor, q_len: int, kv_len: int) -> SparseMask:
    """SparseMask of a 4-D bool tensor, built by the first layer that sees this tensor at this version."""
    if keep.is_inference():  # no version is kept, so a change could not be seen
        return SparseMask.from_dense(keep, q_len, kv_len)
    version, mask = _dense.get(keep, (-1, None))
    if version != keep._version:
        mask = SparseMask.from_dense(keep, q_len, kv_len)
        _dense[keep] = (keep._version, mask)
    return mask
