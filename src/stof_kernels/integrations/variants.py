"""Whole models in every way that the experiments compare: the same weights, inputs and masks, another way to run them.

`prepare` returns one variant ready to be timed; `reference` is what its output is compared with before the time counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import SparseMask
from ..fusion import FusionPlan, optimize
from ..masks import Pattern
from . import models
from . import transformers as stof_transformers
from .models import Shape
from .transformers import Masks, role_of, select_mask

NATIVE, SDPA, FLEX, BROKEN = "stof_unfused", "stof_sdpa", "stof_flex", "stof_broken"


class Unavailable(Exception):
    """A variant cannot run a case; the text is the reason."""


@dataclass(frozen=True)
class Case:
    """One cell: a model of `models.MODELS` at a batch and nominal length, its mask family, dtype and device."""

    model: str
    batch: int
    seq_len: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    family: str = "bigbird"
    size: str | Shape = "paper"

    @property
    def tokens(self) -> int:
        """Tokens that the model really sees."""
        return models.spec(self.model).tokens(self.seq_len)


@dataclass
class Ready:
    """A variant ready to be timed. ``run()`` is one forward pass and returns the last hidden state.

    ``tuning_s`` is the wall time from the model on its device to the first tuned call, search or compilation; None where
    nothing is tuned. ``plan`` is the fusion plan, where there is one.
    """

    run: Callable[[], Tensor]
    module: nn.Module
    tuning_s: float | None = None
    plan: FusionPlan | None = None
    note: str = ""


@dataclass(frozen=True)
class Variant:
    """One way to run a model: its attention, and what is done to the model."""

    id: str
    attention: str
    tune: Callable[[Case, nn.Module, dict[str, Any], float], Ready]
    needs_cuda: str = ""


def prepare(case: Case, variant: str, budget_s: float = 30.0) -> Ready:
    """A variant of a case; ``budget_s`` bounds the search of ``stof`` variants.

    Raises `Unavailable` with the reason where it cannot run, ValueError for an unknown variant or model.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown, allowed: {', '.join(VARIANTS)}")
    chosen = VARIANTS[variant]
    if chosen.needs_cuda and not case.device.startswith("cuda"):
        raise Unavailable(chosen.needs_cuda)
    if case.dtype == torch.float16 and case.device == "cpu":
        raise Unavailable("float16 on the CPU, allowed: float32, bfloat16")
    model = build(case, chosen.attention)
    return chosen.tune(case, model, arguments(case, chosen.attention), budget_s)


def build(case: Case, attention: str) -> nn.Module:
    """The case's model with one of the attentions."""
    register()
    return models.build(case.model, case.seq_len, attention, case.dtype, case.device, seed=case.seed, size=case.size)


def arguments(case: Case, attention: str) -> dict[str, Any]:
    """Inputs of a forward pass, the mask in the form that this attention takes."""
    given = models.inputs(case.model, case.batch, case.seq_len, case.dtype, case.device, case.seed, case.size)
    if attention == FLEX:
        return {**given, "stof_mask": _block_masks(case)}
    mask = models.masks(case.model, case.seq_len, case.family, case.device)
    if attention == SDPA:
        mask = _each(mask, SparseMask.to_dense)
    elif attention != stof_transformers.NAME:
        mask = _each(mask, lambda m: _additive(m, case.dtype))
    return {**given, "stof_mask": mask}


def reference(case: Case) -> Tensor:
    """The case's last hidden state in float32 with unfused attention and the same weights (rounded to the case's dtype)."""
    exact = replace(case, dtype=torch.float32)
    model = build(exact, NATIVE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(case.dtype))
        given = arguments(exact, NATIVE)
        for name, value in given.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                given[name] = value.to(case.dtype).to(value.dtype)
        return model(**given).last_hidden_state


def _additive(mask: SparseMask, dtype: torch.dtype) -> Tensor:
    """0 where the mask keeps, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask.to_dense(), -torch.inf)


def _block_masks(case: Case) -> Any:
    """The case's mask as FlexAttention takes it: the same predicates, so what it computes is exact."""
    from torch.nn.attention.flex_attention import create_block_mask

    def built(pattern: Pattern) -> Any:
        rule = pattern.bind(case.tokens, case.tokens, case.device)
        return create_block_mask(rule, None, None, case.tokens, case.tokens, device=case.device)

    found = {role: built(p) for role, p in models.patterns(case.model, case.seq_len, case.family).items()}
    return Masks(**found) if len(found) > 1 else next(iter(found.values()))


def _each(mask: SparseMask | Masks, form: Callable[[SparseMask], Tensor]) -> Tensor | Masks:
    if isinstance(mask, Masks):
        return Masks(*(form(m) for m in (mask.encoder, mask.decoder, mask.cross)))
    return form(mask)


# ---- attention functions ---------------------------------------------------------------------------------------------


def register() -> None:
    """Make the attentions of the variants known to transformers."""
    stof_transformers.register()
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    functions = {NATIVE: unfused_attention, SDPA: sdpa_attention, FLEX: flex_attention, BROKEN: broken_attention}
    for name, function in functions.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, stof_transformers.stof_mask_function)


def unfused_attention(
    module, query, key, value, attention_mask, scaling=None, position_bias=None, stof_mask=None, **kwargs
):
    """Two matrix products and a softmax between them; ``stof_mask`` is additive, one tensor or `Masks` of them."""
    scores = _scores(module, query, key, scaling, position_bias)
    return _weighted(module, scores, value, stof_mask)


def broken_attention(
    module, query, key, value, attention_mask, scaling=None, position_bias=None, stof_mask=None, **kwargs
):
    """The same with the graph broken after the first product, so that no compiler sees an attention as a whole."""
    scores = _scores(module, query, key, scaling, position_bias)
    torch._dynamo.graph_break()
    return _weighted(module, scores, value, stof_mask)


def sdpa_attention(
    module, query, key, value, attention_mask, scaling=None, position_bias=None, stof_mask=None, **kwargs
):
    """PyTorch's fused attention with the mask; ``stof_mask`` is bool."""
    role = role_of(module)
    mask = select_mask(stof_mask, role)
    if position_bias is not None and role != "cross":
        mask = position_bias.masked_fill(~mask, -torch.inf)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2), None


def flex_attention(
    module, query, key, value, attention_mask, scaling=None, position_bias=None, stof_mask=None, **kwargs
):
    """PyTorch's FlexAttention, to be compiled with the model; ``stof_mask`` is a BlockMask of the mask's own predicate."""
    from torch.nn.attention import flex_attention as flex

    role = role_of(module)
    with_bias = None
    if position_bias is not None and role != "cross":
        bias = position_bias[0]

        def with_bias(score, b, h, q, kv):
            return score + bias[h, q, kv]

    out = flex.flex_attention(
        query,
        key,
        value,
        score_mod=with_bias,
        block_mask=select_mask(stof_mask, role),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2), None


def _scores(
    module: nn.Module, query: Tensor, key: Tensor, scaling: float | None, position_bias: Tensor | None
) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1) if key.shape[1] != query.shape[1] else key
    scores = torch.matmul(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return scores if position_bias is None or role_of(module) == "cross" else scores + position_bias


def _weighted(module: nn.Module, scores: Tensor, value: Tensor, stof_mask: Tensor | Masks) -> tuple[Tensor, None]:
    value = (
        value.repeat_interleave(scores.shape[1] // value.shape[1], dim=1)
        if value.shape[1] != scores.shape[1]
        else value
    )
    weights = torch.softmax(scores + select_mask(stof_mask, role_of(module)), dim=-1)
    return torch.matmul(weights, value).transpose(1, 2), None


# ---- variants --------------------------------------------------------------------------------------------------------


def _as_it_is(case: Case, model: nn.Module, given: dict[str, Any], budget_s: float) -> Ready:
    return Ready(_forward(model, given), model)


def _compiled(mode: str | None = None, fullgraph: bool = True) -> Callable[..., Ready]:
    def tune(case: Case, model: nn.Module, given: dict[str, Any], budget_s: float) -> Ready:
        torch._dynamo.reset()
        compiled = torch.compile(model, mode=mode, dynamic=False, fullgraph=fullgraph)
        run = _forward(compiled, given)
        return Ready(run, model, tuning_s=_seconds(run, case.device))

    return tune


def _optimized(case: Case, model: nn.Module, given: dict[str, Any], budget_s: float) -> Ready:
    began = time.perf_counter()
    fast = optimize(model, given, budget_s=budget_s, seed=case.seed, use_cache=False)
    if fast.plan is None:
        raise Unavailable("the model could not be captured")
    run = _forward(fast, given)
    run()
    note = "" if fast.plan.use == "plan" else f"the model as it is: {fast.plan.why}"
    return Ready(run, fast, time.perf_counter() - began, fast.plan, note)


def _forward(model: Callable[..., Any], given: dict[str, Any]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return model(**given).last_hidden_state

    return run


def _seconds(run: Callable[[], Tensor], device: str) -> float:
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


_GRAPHS = "CUDA graphs need a CUDA device"
_FLEX = "inside a whole model FlexAttention is compiled for CUDA only"
_ALL = (
    Variant("torch_native", NATIVE, _as_it_is),
    Variant("sdpa", SDPA, _as_it_is),
    Variant("torch_compile", SDPA, _compiled()),
    Variant("torch_compile_reduce_overhead", SDPA, _compiled("reduce-overhead"), needs_cuda=_GRAPHS),
    Variant("torch_compile_max_autotune", SDPA, _compiled("max-autotune"), needs_cuda=_GRAPHS),
    Variant("torch_compile_flex", FLEX, _compiled("reduce-overhead"), needs_cuda=_FLEX),
    Variant("torch_compile_no_mha_boundary", BROKEN, _compiled(fullgraph=False)),
    Variant("stof", stof_transformers.NAME, _optimized),
    Variant("stof_mha_only", stof_transformers.NAME, _as_it_is),
    Variant("stof_fusion_only", NATIVE, _optimized),
)
VARIANTS: dict[str, Variant] = {variant.id: variant for variant in _ALL}
"""Every variant by its method id: those of Figure 11 and of Figure 12."""
