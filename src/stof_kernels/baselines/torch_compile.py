"""torch.compile of the unfused attention, in Inductor's three modes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from .inputs import dense_keep
from .registry import Prepared, Problem, Tensors, method
from .torch_native import unfused_attention

if TYPE_CHECKING:
    from collections.abc import Callable

_DEPENDS = ("baselines/torch_native.py",)
_SEEN_SHAPE: list[tuple] = []


@cache
def _compiled(mode: str) -> Callable:
    import torch

    # Static shapes: the graph is specialised to its cell, as the other methods are. The mask is an input, so the masks of one
    # size share a graph.
    return torch.compile(unfused_attention, mode=mode, dynamic=False, fullgraph=True)


def _prepare(problem: Problem, tensors: Tensors, mode: str) -> Prepared:
    import torch

    shape = (mode, problem.dtype, problem.heads, problem.kv_heads, tensors.q.shape, tensors.k.shape)
    if shape not in _SEEN_SHAPE:
        # Dynamo keeps a limited number of graphs per function and then refuses: drop the last size's.
        torch._dynamo.reset()
        _SEEN_SHAPE[:] = [shape]
    keep, run = dense_keep(problem), _compiled(mode)
    q, k, v = tensors.q, tensors.k, tensors.v
    return Prepared(lambda: run(q, k, v, keep, problem.scale), problem.pattern)


@method("torch_compile", label="PyTorch Compile", experiments=("mha", "mha_artifact"), depends=_DEPENDS, rank=20)
def torch_compile(problem: Problem, tensors: Tensors) -> Prepared:
    """Inductor's default mode."""
    return _prepare(problem, tensors, "default")


@method(
    "torch_compile_reduce_overhead",
    label="Compile (reduce-overhead)",
    experiments=("mha", "mha_artifact"),
    depends=_DEPENDS,
    devices=("cuda",),
    rank=21,
    not_in=dict.fromkeys(
        ("mha", "mha_artifact"),
        "this mode replays a CUDA graph, as device_time does for every method: its kernels are torch_compile's",
    ),
)
def torch_compile_reduce_overhead(problem: Problem, tensors: Tensors) -> Prepared:
    """Default mode behind CUDA graphs."""
    return _prepare(problem, tensors, "reduce-overhead")


@method(
    "torch_compile_max_autotune",
    label="Compile (max-autotune)",
    experiments=("mha", "mha_artifact"),
    depends=_DEPENDS,
    devices=("cuda",),
    rank=22,
)
def torch_compile_max_autotune(problem: Problem, tensors: Tensors) -> Prepared:
    """Autotuned matrix products; without its own CUDA graphs, since the timer captures one."""
    return _prepare(problem, tensors, "max-autotune-no-cudagraphs")
