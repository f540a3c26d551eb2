"""The model that a job measures: built once, given to the method under test, and the reference that its output must match."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stof_kernels.baselines.models import ModelProblem
from stof_kernels.integrations import variants

from .model_memory import give_back
from .turns import turns

FLOOR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Relative error that is right whatever the eager model's own is."""
SLACK = 1.25
"""How far a right result may lie from float32 in multiples of the eager model's distance."""

_last: dict[tuple[object, ...], nn.Module] = {}


class BenchSubject:
    """One problem's model and inputs (`baselines.models.Subject`)."""

    def __init__(self, problem: ModelProblem, module: nn.Module):
        self.problem = problem
        self._module = module

    def model(self, attention: str) -> nn.Module:
        """The model with an attention that transformers knows."""
        self._module.set_attn_implementation(attention)
        # In transformers 5.17 that stops at the model's own config: T5's two stacks have copies of it.
        for part in self._module.modules():
            config = getattr(part, "config", None)
            if getattr(config, "_attn_implementation", attention) != attention:
                config._attn_implementation = attention
        return self._module

    def inputs(self, attention: str) -> dict[str, Any]:
        """Keyword arguments of a forward pass, the mask in the form that this attention takes."""
        return variants.arguments(self.problem.case, attention)

    def reference(self) -> tuple[Tensor, float]:
        """The last hidden state in float32 with unfused attention and the same weights, and the eager model's relative error.

        The float32 weights are the model's own, widened for one pass; inputs are rounded to the model's dtype as well. Among
        jobs that share the device only one does this at a time: it takes more memory than anything after it.
        """
        with turns().alone():
            want, error = self._reference()
            # Else the result, or what the method keeps, could lie in a block of these scores, which then could never go back.
            want = want.cpu()
            give_back(self.problem.device)
        return want.to(self.problem.device), error

    def _reference(self) -> tuple[Tensor, float]:
        model, dtype = self.model(variants.NATIVE), getattr(torch, self.problem.dtype)
        eager = _forward(model, self.inputs(variants.NATIVE))
        if dtype == torch.float32:
            return eager, 0.0
        given = {name: _widened(value) for name, value in self.inputs(variants.NATIVE).items()}
        kept = [(parameter, parameter.data) for parameter in model.parameters()]
        try:
            for parameter, data in kept:
                parameter.data = data.float()
            want = _forward(model, given)
        finally:
            for parameter, data in kept:
                parameter.data = data
        return want, relative_error(eager, want)


def subject(problem: ModelProblem) -> BenchSubject:
    """The subject of a problem; the model is kept for the next one, since sizes of one model share its weights."""
    case = problem.case
    # A longer table of positions or another image is another model.
    positions = problem.seq_len if problem.model == "vit" else max(2048, problem.seq_len)
    key = (problem.model, problem.dtype, problem.device, problem.seed, problem.size, positions)
    if key not in _last:
        _last.clear()
        _last[key] = variants.build(case, variants.NATIVE)
    return BenchSubject(problem, _last[key])


def tolerance(problem: ModelProblem, eager_error: float) -> float:
    """Largest relative error of a right result: that of the eager model and a quarter, or a floor by dtype."""
    return max(FLOOR[getattr(torch, problem.dtype)], SLACK * eager_error)


def relative_error(out: Tensor, want: Tensor) -> float:
    """||out - want|| / ||want|| over all batches and positions; nan if the output holds nan. ValueError for another shape."""
    if out.shape != want.shape:
        raise ValueError(f"output has shape {tuple(out.shape)}, allowed: {tuple(want.shape)}")
    return float((out.double() - want.double()).norm() / want.double().norm())


def _forward(model: nn.Module, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**given).last_hidden_state


def _widened(value: Any) -> Any:
    """Floating-point tensors in float32, in dataclasses of masks too."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, variants.Masks):
        return variants.Masks(*(_widened(m) for m in (value.encoder, value.decoder, value.cross)))
    return value
