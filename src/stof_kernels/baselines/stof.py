"""This project's own attention, planned by itself or with one of its kernels forced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stof_kernels.kernels import TARGETS

from .registry import Prepared, Problem, Tensors, Unsupported, method
from .sdpa import EXPERIMENTS

if TYPE_CHECKING:
    from torch import Tensor

    from stof_kernels import SparseMask
    from stof_kernels.planner import KernelConfig

_OURS = {
    "depends": ("formats", "ops", "planner", "kernels/raw.py"),
    # An edit of one device's kernels does not make the other's numbers old.
    "on_device": {
        "cpu": tuple(f"kernels/csrc/{name}" for name in TARGETS["cpu"].sources),
        "cuda": ("kernels/instances.py", *(f"kernels/csrc/{name}" for name in TARGETS["sm_80"].sources)),
    },
}


@method("stof", label="STOF", experiments=(*EXPERIMENTS, "planner"), rank=0, **_OURS)
def stof(problem: Problem, tensors: Tensors) -> Prepared:
    """The public call with a prepared mask; building the mask is timed apart."""
    from stof_kernels import SparseMask, sparse_attention

    _require_kernels(problem)
    q, k, v = tensors.q, tensors.k, tensors.v

    def build():
        return SparseMask.from_pattern(problem.pattern, problem.q_len, problem.kv_len, device=problem.device).prepare(
            q, k
        )

    mask = build()
    return Prepared(
        lambda: sparse_attention(q, k, v, mask, scale=problem.scale),
        problem.pattern,
        note=str(mask.plan_for(q, k).config),
        mask_build=build,
    )


def call_with(tensors: Tensors, mask: SparseMask, config: KernelConfig, scale: float) -> Callable[[], Tensor]:
    """Our operator on these tensors under one configuration, whatever the planner would choose."""
    from stof_kernels.kernels import raw

    q, k, v = tensors.q, tensors.k, tensors.v
    ptr, col, slot, bits, plan = mask.layout_for(q, k, config).tensors
    rest = mask.q_len, mask.kv_len, mask.batch, mask.heads, scale, False
    return lambda: raw.sparse_attention(q, k, v, None, ptr, col, slot, bits, mask.counts, plan, *rest)[0]


def _forced(problem: Problem, tensors: Tensors, kernel: str) -> Prepared:
    """The operator with the cheapest plan of one kernel."""
    from stof_kernels import SparseMask

    _require_kernels(problem)
    mask = SparseMask.from_pattern(problem.pattern, problem.q_len, problem.kv_len, device=problem.device)
    ranking = [config for config, _ in mask.plan_for(tensors.q, tensors.k).ranking if config.kernel == kernel]
    if not ranking:
        raise Unsupported(f"no {kernel} configuration is feasible for this problem")
    run = call_with(tensors, mask, ranking[0], problem.scale)
    return Prepared(run, problem.pattern, note=str(ranking[0]))


def _require_kernels(problem: Problem) -> None:
    allowed = ("float32", "bfloat16") if problem.device == "cpu" else ("float16", "bfloat16")
    if problem.dtype not in allowed:
        raise Unsupported(f"runs {' and '.join(allowed)} on {problem.device}")


# The forced kernels are in no experiment's table: `duel` measures them against the planned call or each other.
@method("stof_row_wise", label="STOF (row-wise)", experiments=(), rank=1, **_OURS)
def stof_row_wise(problem: Problem, tensors: Tensors) -> Prepared:
    """Row-wise kernel whatever the planner says."""
    return _forced(problem, tensors, "row_wise")


@method("stof_block_wise", label="STOF (block-wise)", experiments=(), rank=2, **_OURS)
def stof_block_wise(problem: Problem, tensors: Tensors) -> Prepared:
    """Block-wise kernel whatever the planner says."""
    return _forced(problem, tensors, "block_wise")
