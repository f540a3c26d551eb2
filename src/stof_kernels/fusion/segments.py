"""Segments: runs of operators cut out of a graph as modules of their own, the unit that is compiled, measured and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .graph import Kind, Op, OpGraph, external
from .repeats import describe, role

Run = Callable[..., Sequence[Tensor]]
"""``run(*inputs)``: takes the tensors of `Segment.sources` in order and returns those of `Segment.results`."""


@dataclass(eq=False)
class Segment:
    """One run of operators. ``module(*inputs)`` is its reference: the captured operators, one by one.

    ``sources`` and ``results`` are nodes of the whole graph; the placeholders of ``module`` stand for the sources. Two segments
    with one ``key`` are the same computation on different tensors: what was compiled for one runs the other. ``programs`` is
    what templates have read out of it, by their names.
    """

    module: fx.GraphModule
    ops: tuple[Op, ...]
    sources: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    weights: tuple[bool, ...]
    key: str
    programs: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kind of each operator."""
        return tuple(op.kind for op in self.ops)

    @property
    def placeholders(self) -> list[fx.Node]:
        """Inputs of ``module``."""
        return [n for n in self.module.graph.nodes if n.op == "placeholder"]

    @property
    def computing(self) -> list[fx.Node]:
        """Operator nodes of ``module`` in order."""
        return [n for n in self.module.graph.nodes if n.op == "call_function"]

    @property
    def outputs(self) -> list[fx.Node]:
        """Nodes of ``module`` that it returns."""
        return list(self.module.graph.output_node().args[0])

    @property
    def device(self) -> torch.device:
        """Where it runs: the device of its first result."""
        return self.outputs[0].meta["val"].device

    def __str__(self) -> str:
        return " + ".join(str(op) for op in self.ops)


def cut(graph: OpGraph, indices: Sequence[int]) -> Segment:
    """The segment of these operators (indices in order of execution)."""
    ops = tuple(graph.ops[i] for i in indices)
    nodes = [node for op in ops for node in op.nodes]
    inside = set(nodes)
    sources = tuple(external(nodes))
    results = tuple(node for node in nodes if any(user not in inside for user in node.users))
    constants = set(graph.constants)
    weights = tuple(role(node, constants, graph.captured.weights) == "weight" for node in sources)
    module = _module(nodes, sources, results)
    return Segment(module, ops, sources, results, weights, _key(module, weights))


def example_inputs(segment: Segment, seed: int = 0) -> list[Tensor]:
    """Random tensors of the shapes, dtypes and strides that the segment reads; integers are zeros, valid as any index."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for node in segment.placeholders:
        value = node.meta["val"]
        tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        if value.is_floating_point():
            tensor.copy_(torch.randn(value.shape, generator=generator))
        else:
            tensor.zero_()
        made.append(tensor)
    return made


def _module(nodes: list[fx.Node], sources: tuple[fx.Node, ...], results: tuple[fx.Node, ...]) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for i, source in enumerate(sources):
        copies[source] = graph.placeholder(f"in_{i}")
        copies[source].meta["val"] = source.meta["val"]
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].name = f"n_{len(copies)}"
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(torch.nn.Module(), graph)


def _key(module: fx.GraphModule, weights: tuple[bool, ...]) -> str:
    """Hash of everything that compiled code of the segment depends on."""
    names = {node: f"%{i}" for i, node in enumerate(module.graph.nodes)}
    lines = [str(weights)]
    for node in module.graph.nodes:
        args = fx.map_arg((node.args, tuple(sorted(node.kwargs.items()))), names.__getitem__)
        lines.append(f"{node.op} {node.target if node.op == 'call_function' else ''}{args} {describe(node)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:20]
