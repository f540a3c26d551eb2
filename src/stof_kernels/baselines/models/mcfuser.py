"""MCFuser (SC 2024), reimplemented, in whole models: every attention is its kernel, the rest is compiled by Inductor.

Inductor stands for what Relay or Ansor did around the original. Feed-forward chains stay two products: the model's prediction
for the fused kernel is several times that of separate ones for every model and size of the experiments (a test holds it).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .registry import ModelReady, Subject, model_method

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "stof_mcfuser"


@model_method(
    "mcfuser",
    experiments=("end_to_end", "tuning_cost"),
    depends=("baselines/mcfuser_planner", "baselines/cuda_timing.py"),
    devices=("cuda",),
    tuned=True,
    reimplemented=True,
)
def mcfuser(subject: Subject) -> ModelReady:
    """Attention tuned once per shape at the first call, inside ``torch.compile`` of the model in its default mode."""
    import torch

    from ..mcfuser_planner import attention

    register(subject.problem.tuning_s)
    model, given = subject.model(NAME), arguments(subject)
    torch._dynamo.reset()
    attention.forget()
    began = time.perf_counter()
    run = forward(torch.compile(model, dynamic=False, fullgraph=True), given)
    run()
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    kernels = "; ".join(f"{a.tuned} and {a.tuned.seconds:.1f} s" for a in attention.known())
    return ModelReady(run, took, note=f"attention tuned: {kernels}; the rest by torch.compile")


def forward(model: Callable[..., Any], given: dict[str, Any]) -> Callable[[], Tensor]:
    """One forward pass without gradients; returns the last hidden state."""
    import torch

    def run() -> Tensor:
        with torch.no_grad():
            return model(**given).last_hidden_state

    return run


def arguments(subject: Subject) -> dict[str, Any]:
    """The model's inputs: an additive mask with rows padded to 16 columns, and none where attention is dense (T5's cross)."""
    from stof_kernels.integrations.transformers import Masks

    from ..mcfuser_planner.attention import padded_mask

    given = subject.inputs(NAME)
    mask = given["stof_mask"]
    # T5 adds its position bias to the mask, which makes a tensor of the scores' width.
    given["stof_mask"] = replace(mask, cross=None) if isinstance(mask, Masks) else padded_mask(mask)
    return given


def register(budget_s: float) -> None:
    """Make the attention known to transformers; ``budget_s`` bounds the tuning of one shape."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from stof_kernels.integrations import transformers as stof_transformers

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        position_bias: Tensor | None = None,
        stof_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        from ..mcfuser_planner.operators import mcfuser_attention

        role = stof_transformers.role_of(module)
        mask = stof_transformers.select_mask(stof_mask, role)
        if position_bias is not None and role != "cross":
            mask = position_bias if mask is None else mask + position_bias
            # transformers looks the bias up with its heads innermost; the original's front end lays a transpose out anew.
            mask = mask.contiguous()
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return mcfuser_attention(query, key, value, mask, scale, budget_s), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, stof_transformers.stof_mask_function)
