"""This project's own attention, planned by itself or with one of its kernels forced."""

from __future__ import annotations

from .registry import Prepared, Problem, Tensors, Unsupported, method
from .sdpa import EXPERIMENTS

_DEPENDS = ("formats", "ops", "planner", "kernels/raw.py", "kernels/csrc/bindings", "kernels/csrc/format")
_ON_DEVICE = {"cpu": ("kernels/csrc/attention/cpu",)}
_DEVICES = ("cpu",)


@method("stof", label="STOF", experiments=EXPERIMENTS, depends=_DEPENDS, on_device=_ON_DEVICE, devices=_DEVICES, rank=0)
def stof(problem: Problem, tensors: Tensors) -> Prepared:
    """The public call with a prepared mask; building the mask is timed apart."""
    from stof_kernels import SparseMask, sparse_attention

    _require_dtype(problem)
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


def _forced(problem: Problem, tensors: Tensors, kernel: str) -> Prepared:
    """The registered operator with the cheapest plan of one kernel."""
    from stof_kernels import SparseMask
    from stof_kernels.kernels import raw

    _require_dtype(problem)
    q, k, v = tensors.q, tensors.k, tensors.v
    mask = SparseMask.from_pattern(problem.pattern, problem.q_len, problem.kv_len, device=problem.device)
    ranking = [config for config, _ in mask.plan_for(q, k).ranking if config.kernel == kernel]
    if not ranking:
        raise Unsupported(f"no {kernel} configuration is feasible for this problem")
    words = mask.plan.new_tensor(ranking[0].words)

    def run():
        out, _ = raw.sparse_attention(
            q, k, v, None, mask.strip_ptr, mask.cell_col, mask.cell_slot, mask.cell_bits, mask.counts, words,
            mask.q_len, mask.kv_len, mask.batch, mask.heads, problem.scale, False,
        )  # fmt: skip
        return out

    return Prepared(run, problem.pattern, note=str(ranking[0]))


def _require_dtype(problem: Problem) -> None:
    allowed = ("float32", "bfloat16") if problem.device == "cpu" else ("float16", "bfloat16")
    if problem.dtype not in allowed:
        raise Unsupported(f"runs {' and '.join(allowed)} on {problem.device}")


# The forced kernels are in no experiment's table: `duel` measures them against the planned call or each other.
_VARIANT = {"experiments": (), "depends": _DEPENDS, "on_device": _ON_DEVICE, "devices": _DEVICES}


@method("stof_row_wise", label="STOF (row-wise)", rank=1, **_VARIANT)
def stof_row_wise(problem: Problem, tensors: Tensors) -> Prepared:
    """Row-wise kernel whatever the planner says."""
    return _forced(problem, tensors, "row_wise")


@method("stof_block_wise", label="STOF (block-wise)", rank=2, **_VARIANT)
def stof_block_wise(problem: Problem, tensors: Tensors) -> Prepared:
    """Block-wise kernel whatever the planner says."""
    return _forced(problem, tensors, "block_wise")
