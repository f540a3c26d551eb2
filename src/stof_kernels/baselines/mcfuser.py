"""MCFuser (SC 2024), reimplemented: attention as one kernel that an analytic model and a search find. Dense: the mask is added.

The planner, the code generator and the tuner are in ``mcfuser_planner``. Instructions are Triton's choice, as in the original:
on sm_90 that is WGMMA. The original was published on Ampere cards, so there ours can be faster than it could be.
Two variants are in no experiment's table, for `duel`: the mask expanded to every batch entry and head, and a softmax without
the row's maximum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .inputs import additive_mask
from .registry import Prepared, Problem, Tensors, Unsupported, method
from .sdpa import EXPERIMENTS

if TYPE_CHECKING:
    from torch import Tensor

_SHARED = {
    "depends": ("baselines/mcfuser_planner", "baselines/cuda_timing.py"),
    "devices": ("cuda",),
    "reimplemented": True,
}


@method("mcfuser", label="MCFuser (reimpl.)", experiments=EXPERIMENTS, rank=62, **_SHARED)
def mcfuser(problem: Problem, tensors: Tensors) -> Prepared:
    """Tuned for the problem's shapes; one additive mask that all batch entries and heads read."""
    return _prepare(problem, tensors, _mask(problem))


@method("mcfuser_expanded", label="MCFuser (reimpl.), expanded mask", experiments=(), rank=63, **_SHARED)
def mcfuser_expanded(problem: Problem, tensors: Tensors) -> Prepared:
    """The mask as a tensor of its own for every batch entry and head, as the paper's authors ran it."""
    wide = _mask(problem).expand(problem.batch, problem.heads, -1, -1).contiguous()
    return _prepare(problem, tensors, wide)


@method("mcfuser_exp", label="MCFuser (reimpl.), exp without maximum", experiments=(), rank=64, **_SHARED)
def mcfuser_exp(problem: Problem, tensors: Tensors) -> Prepared:
    """Exponentials of the scores as they are: overflows where scaled scores pass 11, which unit normal inputs do not reach."""
    return _prepare(problem, tensors, _mask(problem), "softmax_exp")


def _mask(problem: Problem) -> Tensor:
    from .mcfuser_planner.attention import padded_mask

    if problem.dtype == "float32":
        raise Unsupported("MCFuser runs float16 and bfloat16 only")
    return padded_mask(additive_mask(problem))


def _prepare(problem: Problem, tensors: Tensors, mask: Tensor, step: str = "softmax") -> Prepared:
    from .mcfuser_planner.attention import Form, tuned_attention

    q, k, v = tensors.q, tensors.k, tensors.v
    attention = tuned_attention(q, k, v, mask, Form(problem.scale, step))
    return Prepared(lambda: attention(q, k, v, mask), problem.pattern, note=f"tuned: {attention.tuned}")
