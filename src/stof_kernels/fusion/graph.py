"""OpGraph: a captured graph as a sequence of operators, each compute-intensive, memory-intensive or attention.

The sequence is a valid order of execution, so any run of neighbours can become one kernel. Views cost nothing and belong to
the operator that makes what they look at. What depends on weights and constants only is set apart: it is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import fx

from . import patterns
from .capture import VIEWS, Captured

aten = torch.ops.aten


class Kind(Enum):
    """What limits an operator. `COMPUTE` is STOF's CI, `MEMORY` its MI; attention is a segment of its own."""

    COMPUTE = "compute"
    MEMORY = "memory"
    ATTENTION = "attention"


_COMPUTE = {
    aten.linear.default: "linear",
    aten.addmm.default: "linear",
    aten.mm.default: "linear",
    aten.matmul.default: "matmul",
    aten.bmm.default: "matmul",
    aten.baddbmm.default: "matmul",
    aten.conv2d.default: "conv",
    aten.convolution.default: "conv",
}
_ATTENTION = {"stof.sparse_attention.default", "aten.scaled_dot_product_attention.default"}
_LINEAR = {aten.linear.default: 0, aten.addmm.default: 1, aten.mm.default: 0}


@dataclass(eq=False)
class Op:
    """One operator: its nodes in order, views included. ``gemms`` counts matrix products with weights that share an input."""

    name: str
    kind: Kind
    nodes: list[fx.Node]
    gemms: int = 0

    @property
    def outputs(self) -> list[fx.Node]:
        """Nodes that something outside the operator reads, in order."""
        inside = set(self.nodes)
        return [node for node in self.nodes if any(user not in inside for user in node.users)]

    @property
    def inputs(self) -> list[fx.Node]:
        """Nodes outside the operator that it reads, in order of first use."""
        inside = set(self.nodes)
        return list(dict.fromkeys(a for node in self.nodes for a in node.all_input_nodes if a not in inside))

    def __str__(self) -> str:
        return f"{self.name} x{self.gemms}" if self.gemms > 1 else self.name


@dataclass
class OpGraph:
    """Operators in order of execution, the nodes that depend on no input, and the graph they are views of."""

    captured: Captured
    ops: list[Op]
    constants: list[fx.Node] = field(default_factory=list)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The captured graph."""
        return self.captured.graph_module

    def producer_index(self) -> dict[fx.Node, int]:
        """Index of the operator that each active node belongs to."""
        return {node: i for i, op in enumerate(self.ops) for node in op.nodes}

    def __str__(self) -> str:
        return " | ".join(str(op) for op in self.ops)


def build(captured: Captured) -> OpGraph:
    """The operators of a captured graph."""
    graph = captured.graph_module.graph
    constants, active = _split(graph, captured.weights)
    ops = _operators(active)
    return OpGraph(captured, _share_inputs(_in_order(ops, active)), constants)


def _split(graph: fx.Graph, weights: frozenset[str]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Computing nodes that depend on weights and constants only, and those that depend on an input."""
    depends: set[fx.Node] = {n for n in graph.nodes if n.op == "placeholder" and n.name not in weights}
    constants, active = [], []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if any(a in depends for a in node.all_input_nodes):
            depends.add(node)
            active.append(node)
        else:
            constants.append(node)
    return constants, active


def _operators(active: list[fx.Node]) -> list[Op]:
    grouped = {node: (name, nodes) for name, nodes in patterns.find(active) for node in nodes}
    ops: list[Op] = []
    owner: dict[fx.Node, Op] = {}
    waiting: list[fx.Node] = []  # views of inputs, until an operator reads them
    for node in active:
        if node in owner:
            continue
        if node in grouped:
            name, nodes = grouped[node]
            kind = Kind.ATTENTION if name == "attention" else Kind.MEMORY
            op = Op(name, kind, list(nodes))
        elif node.target in VIEWS:
            source = next((owner[a] for a in node.all_input_nodes if a in owner), None)
            if source is None:
                waiting.append(node)
            else:
                source.nodes.append(node)
                owner[node] = source
            continue
        else:
            op = _single(node)
        ops.append(op)
        owner.update(dict.fromkeys(op.nodes, op))
    _adopt(waiting, owner, active)
    position = {node: i for i, node in enumerate(active)}
    for op in ops:
        op.nodes.sort(key=position.__getitem__)
    return ops


def _single(node: fx.Node) -> Op:
    if str(node.target) in _ATTENTION:
        return Op("attention", Kind.ATTENTION, [node])
    if node.target in _COMPUTE:
        return Op(_COMPUTE[node.target], Kind.COMPUTE, [node], gemms=1)
    return Op(str(node.target).split(".")[1] if "." in str(node.target) else str(node.target), Kind.MEMORY, [node])


def _adopt(waiting: list[fx.Node], owner: dict[fx.Node, Op], active: list[fx.Node]) -> None:
    """Views of graph inputs join the first operator that reads them."""
    for node in reversed(waiting):
        reader = next((owner[user] for user in active if user in node.users and user in owner), None)
        if reader is not None:
            reader.nodes.append(node)
            owner[node] = reader


def _in_order(ops: list[Op], active: list[fx.Node]) -> list[Op]:
    """Operators so that each comes after those it reads from, otherwise as captured."""
    position = {node: i for i, node in enumerate(active)}
    owner = {node: op for op in ops for node in op.nodes}
    done: list[Op] = []
    placed: set[int] = set()

    def place(op: Op) -> None:
        stack = [op]
        while stack:
            top = stack[-1]
            missing = [owner[a] for a in top.inputs if a in owner and id(owner[a]) not in placed]
            if missing:
                stack += missing
                continue
            stack.pop()
            if id(top) not in placed:
                placed.add(id(top))
                done.append(top)

    for op in sorted(ops, key=lambda o: position[o.nodes[0]]):
        place(op)
    return done


def gemm_input(op: Op) -> fx.Node | None:
    """The activation that a linear operator multiplies with its weights, seen through views; None for other operators."""
    if op.name != "linear":
        return None
    node = next(n for n in op.nodes if n.target in _LINEAR)
    source = node.args[_LINEAR[node.target]]
    while source in op.nodes:
        source = source.args[0]
    return source


def _share_inputs(ops: list[Op]) -> list[Op]:
    """Linear operators of one input become one where only memory-intensive operators stand between them.

    Query, key and value projections, or a gate and what it gates: one read of the activation serves all.
    """
    merged: list[Op] = []
    for op in ops:
        source = gemm_input(op)
        partner = _partner(merged, source) if source is not None else None
        if partner is None or any(a in _nodes_after(merged, partner) for a in op.inputs):
            merged.append(op)
        else:
            partner.nodes += op.nodes
            partner.gemms += op.gemms
    return merged


def _partner(before: list[Op], source: fx.Node) -> Op | None:
    for op in reversed(before):
        if op.name == "linear":
            return op if gemm_input(op) is source else None
        if op.kind is not Kind.MEMORY:
            return None
    return None


def _nodes_after(ops: list[Op], op: Op) -> set[fx.Node]:
    at = next(i for i, other in enumerate(ops) if other is op)
    return {node for later in ops[at + 1 :] for node in later.nodes}


def external(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """Inputs of a run of nodes in order of first use, without repetition."""
    inside, seen = set(nodes), set()
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and source not in seen:
                seen.add(source)
                yield source
