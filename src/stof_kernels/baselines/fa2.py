"""FlashAttention-2 as torch ships it. Its CUDA kernel knows causal and window masks and no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stof_kernels import masks

from .inputs import is_top_left_causal
from .registry import Prepared, Problem, Tensors, Unsupported, method
from .sdpa import EXPERIMENTS, forced

if TYPE_CHECKING:
    from torch import Tensor


@method(
    "fa2",
    label="FlashAttention-2",
    experiments=EXPERIMENTS,
    depends=("baselines/sdpa.py",),
    exact_by_design=False,
    rank=40,
)
def fa2(problem: Problem, tensors: Tensors) -> Prepared:
    """Causal and windows natively; other masks are ignored (dense, exact = false). torch's CPU kernel takes any mask."""
    if problem.device == "cpu":
        prepared = forced(problem, tensors, "FLASH_ATTENTION")
        return Prepared(prepared.run, problem.pattern, note="torch's CPU flash kernel, which takes any mask")
    if problem.dtype == "float32":
        raise Unsupported("FlashAttention2 runs float16 and bfloat16 only")
    window = window_of(problem)
    if is_top_left_causal(problem) and problem.q_len == problem.kv_len:
        return Prepared(_flash(problem, tensors, (-1, -1), causal=True), problem.pattern, note="native causal")
    if window is not None:
        return Prepared(_flash(problem, tensors, window), problem.pattern, note="native window")
    return Prepared(
        _flash(problem, tensors, (-1, -1)),
        masks.full(),
        exact=False,
        note="cannot apply this mask: computed without one",
    )


def window_of(problem: Problem) -> tuple[int, int] | None:
    """(left, right) reach if the mask is a band that flash kernels know, else None; they align windows bottom right."""
    if problem.pattern.family not in ("sliding_window", "artifact_sliding_window") or problem.q_len != problem.kv_len:
        return None
    params = problem.pattern.params
    return params["w"], 0 if params["causal"] else params["w"]


def _flash(problem: Problem, tensors: Tensors, window: tuple[int, int], causal: bool = False):
    """Call of the operator under SDPA, which unlike SDPA takes a window; layout (B, L, H, D), so the transposes are views."""
    import torch

    q, k, v = (t.transpose(1, 2) for t in (tensors.q, tensors.k, tensors.v))
    op = torch.ops.aten._flash_attention_forward.default
    left, right = (None, None) if window == (-1, -1) else window

    def run() -> Tensor:
        out = op(
            q, k, v, None, None, problem.q_len, problem.kv_len, 0.0, causal, False,
            scale=problem.scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out[0].transpose(1, 2)

    return run
