"""torch.compile of the whole model with FlexAttention as its attention: the mask as a function, cut into blocks beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .registry import ModelReady, Subject, model_method

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "stof_flex"


# On a CPU, torch 2.13's C++ template of FlexAttention does not compile inside these models.
@model_method("flex_attention", experiments=("end_to_end",), devices=("cuda",), tuned=True)
def flex_attention(subject: Subject) -> ModelReady:
    """Default mode; T5's position bias is added to the scores by FlexAttention's own hook."""
    import torch

    run = forward(subject, compiled=True)
    torch._dynamo.reset()
    began = time.perf_counter()
    run()
    if subject.problem.device == "cuda":
        torch.cuda.synchronize()
    return ModelReady(run, tuning_s=time.perf_counter() - began)


def forward(subject: Subject, compiled: bool) -> Callable[[], Tensor]:
    """One forward pass; returns the last hidden state. Uncompiled, FlexAttention is its own dense reference."""
    import torch

    register()
    model, given = subject.model(NAME), subject.inputs(NAME)
    given = {name: value for name, value in given.items() if name != "stof_mask"} | {"flex_masks": block_masks(subject)}
    call = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model

    def run() -> Tensor:
        with torch.no_grad():
            return call(**given).last_hidden_state

    return run


def block_masks(subject: Subject) -> dict[str, Any]:
    """The experiment's mask of each role as FlexAttention's block mask, one for all batch entries and heads."""
    from torch.nn.attention.flex_attention import create_block_mask

    from stof_kernels.integrations import models

    problem, tokens = subject.problem, subject.problem.tokens
    rules = models.patterns(problem.model, problem.seq_len, problem.family)
    return {
        role: create_block_mask(
            pattern.bind(tokens, tokens, problem.device), None, None, tokens, tokens, device=problem.device
        )
        for role, pattern in rules.items()
    }


def register() -> None:
    """Make the attention known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from stof_kernels.integrations import transformers as stof_transformers

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, stof_transformers.stof_mask_function)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    flex_masks: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: ``flex_masks`` holds a block mask by role (encoder, decoder, cross)."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    from stof_kernels.integrations.transformers import role_of

    role = role_of(module)
    mask = flex_masks[role] if role in flex_masks else next(iter(flex_masks.values()))
    score = None
    if position_bias is not None and role != "cross":

        def score(found: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return found + position_bias[0, h, q, kv]

    out = flex(
        query, key, value, score_mod=score, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2), None
