"""Pairs of operators around attention, fused or apart, tuned alone or together: the series of Figures 3 and 4.

Each method is one of the four ways of ``fusion.motivation``, found by a search of the kernels that it needs. Figure 3 compares
the first two, Figure 4 the other two, where a matrix product before a LayerNorm is four times as deep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import registry
from .registry import DEVICES, MethodSpec, Unsupported

if TYPE_CHECKING:
    from torch import Tensor

KIND = "pair"
OPERATORS = ("bias_layernorm", "gemm_layernorm", "gemm_gemm")
"""Ids of the pairs, those of ``fusion.motivation`` (a test holds them equal)."""


@dataclass(frozen=True)
class PairProblem:
    """A pair on (batch, seq_len, hidden); ``search_s`` and ``candidates`` (per segment) bound the search for kernels."""

    operator: str
    batch: int
    seq_len: int
    hidden: int
    dtype: str
    device: str
    seed: int = 0
    search_s: float = 10.0
    candidates: int = 24

    def columns(self) -> dict[str, object]:
        """What a row of measurement says about this problem."""
        names = ("operator", "batch", "seq_len", "hidden", "dtype")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PairReady:
    """A pair ready to be timed: ``run()`` gives its output, ``apart()`` the eager operators', ``reference`` is in fp32.

    ``note`` names the kernels, ``control`` says what ``apart`` runs.
    """

    run: Callable[[], Tensor]
    apart: Callable[[], Tensor]
    reference: Tensor
    note: str
    control: str


def _prepare(problem: PairProblem, way: str, wide: bool) -> PairReady:
    import torch

    from stof_kernels.fusion import motivation

    place = (problem.operator, problem.batch, problem.seq_len, problem.hidden)
    exact, given = motivation.pair(*place, torch.float32, problem.device, problem.seed, wide)
    reference = exact.graph_module(*given)[0]
    graph, inputs = motivation.pair(*place, getattr(torch, problem.dtype), problem.device, problem.seed, wide)
    found = motivation.measure(graph, inputs, problem.search_s, problem.candidates, problem.seed, methods=(way,))[way]
    if found.run is None:
        raise Unsupported(found.how)
    run = found.run
    control = f"eager operators one by one on {tuple(inputs[0].shape)}"
    return PairReady(lambda: run()[0], lambda: graph.graph_module(*inputs)[0], reference, found.how, control)


def _add(way: str, label: str, rank: int, wide: bool) -> None:
    registry.add(
        MethodSpec(
            id=way,
            label=label,
            experiments=("motivation",),
            prepare=lambda problem: _prepare(problem, way, wide),
            depends=("baselines/pairs.py", "benchmarking/timing.py", "fusion"),
            devices=DEVICES,
            kind=KIND,
            rank=rank,
        )
    )


_add("detached", "Detached", 80, wide=False)
_add("fused", "Fused", 81, wide=False)
_add("tuned_individually", "Tuned individually", 82, wide=True)
_add("tuned_after_fusion", "Tuned after fusion", 83, wide=True)
