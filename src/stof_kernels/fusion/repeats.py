"""Repeated layers, found by structure alone: equal operators at a constant distance whose dataflow is equal too.

A maximal run of repetitions may start anywhere inside a layer. It is turned so that a layer starts at the matrix product before
an attention: in pre-norm models the norm of the next layer then stands beside the sum that it reads.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import fx

from .capture import VIEWS
from .graph import Kind, Op, OpGraph


@dataclass(frozen=True)
class Block:
    """``count`` equal layers of ``period`` operators each, from operator ``start`` on."""

    start: int
    period: int
    count: int

    def layer(self, i: int) -> range:
        """Operator indices of layer ``i``."""
        return range(self.start + i * self.period, self.start + (i + 1) * self.period)

    @property
    def stop(self) -> int:
        """One past the last operator."""
        return self.start + self.count * self.period


def op_key(op: Op, graph: OpGraph) -> str:
    """Hash of an operator's structure: targets, static arguments, and shape, dtype and role of what it reads.

    Views are left out: the last layer's result may be viewed differently from the others'.
    """
    constants = set(graph.constants)
    computing = [node for node in op.nodes if node.target not in VIEWS]
    local = {node: i for i, node in enumerate(computing)}

    def reference(node: fx.Node) -> str:
        if node in local:
            return f"%{local[node]}"
        return f"{role(node, constants, graph.captured.weights)}:{describe(node)}"

    text = [op.name]
    for node in computing:
        args = fx.map_arg((node.args, tuple(sorted(node.kwargs.items()))), reference)
        text.append(f"{node.target}{args}->{describe(node)}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def role(node: fx.Node, constants: set[fx.Node], weights: frozenset[str]) -> str:
    """``weight`` for what depends on no input, else ``value``."""
    return "weight" if node.op == "get_attr" or node in constants or node.name in weights else "value"


def describe(node: fx.Node) -> str:
    """Shape, dtype and strides of what a node returns."""
    value = node.meta.get("val")
    parts = value if isinstance(value, (list, tuple)) else [value]
    return ";".join(
        f"{tuple(v.shape)}{str(v.dtype)[6:]}{tuple(v.stride())}" if isinstance(v, torch.Tensor) else type(v).__name__
        for v in parts
    )


def find(graph: OpGraph) -> list[Block]:
    """The repeated layers of a graph, in order; a layer has a matrix product in it."""
    keys = [op_key(op, graph) for op in graph.ops]
    found: list[Block] = []
    _search(graph, keys, 0, len(keys), found)
    return sorted(found, key=lambda r: r.start)


def _search(graph: OpGraph, keys: list[str], low: int, high: int, found: list[Block]) -> None:
    runs = sorted(_candidates(keys, low, high), key=lambda c: (c[0] - c[1], c[2]))
    repeat = next((turned for run in runs if (turned := _turn(graph, *run)) is not None), None)
    if repeat is None:
        return
    found.append(repeat)
    _search(graph, keys, low, repeat.start, found)
    _search(graph, keys, repeat.stop, high, found)


def _candidates(keys: list[str], low: int, high: int) -> list[tuple[int, int, int]]:
    """Maximal periodic runs (start, stop, period) of at least two periods."""
    runs = []
    for period in range(2, (high - low) // 2 + 1):
        start = low
        for i in range(low, high - period + 1):
            if i < high - period and keys[i] == keys[i + period]:
                continue
            if i - start >= period:
                runs.append((start, i + period, period))
            start = i + 1
    return runs


def _turn(graph: OpGraph, start: int, stop: int, period: int) -> Block | None:
    """The run as whole layers with equal dataflow, starting where a layer naturally does; None if there is no such turn."""
    ops = graph.ops
    window = range(start, start + period)
    if not any(ops[i].kind is Kind.COMPUTE for i in window):
        return None
    most = (stop - start) // period
    for first in sorted(window, key=lambda i: _distance_to_attention(ops, i, period)):
        count = (stop - first) // period
        # Another turn may cost a layer at the end; that is worth it only if it costs no more than one.
        if (
            count >= max(2, most - 1)
            and (count == most or most > 2)
            and _isomorphic(graph, Block(first, period, count))
        ):
            return Block(first, period, count)
    return None


def _distance_to_attention(ops: list[Op], i: int, period: int) -> tuple[int, int, int]:
    """Sort key of a turn: starts with a matrix product that follows a memory-intensive operator and soon meets attention."""
    product = ops[i].kind is Kind.COMPUTE and (i == 0 or ops[i - 1].kind is Kind.MEMORY)
    ahead = next((d for d in range(period) if i + d < len(ops) and ops[i + d].kind is Kind.ATTENTION), period)
    return (0 if product else 1, ahead, i)


def _isomorphic(graph: OpGraph, repeat: Block) -> bool:
    """Whether every layer reads what the one before reads, one period later, or the same node outside."""
    producer = graph.producer_index()
    outputs = {node: j for op in graph.ops for j, node in enumerate(op.outputs)}
    constants = set(graph.constants)

    def reads(layer: int) -> list[object]:
        found: list[object] = []
        for i in repeat.layer(layer):
            for node in graph.ops[i].inputs:
                at = producer.get(node)
                if role(node, constants, graph.captured.weights) == "weight":
                    found.append("weight")
                elif at is not None and at >= repeat.start:
                    found.append((at - repeat.layer(layer)[0], outputs[node]))
                else:
                    found.append(node)
        return found

    pattern = reads(1)
    # What a layer reads of the one before it, the first layer reads from before all of them.
    carried = all(a == b or (isinstance(b, tuple) and b[0] < 0) for a, b in zip(reads(0), pattern, strict=True))
    return carried and all(reads(layer) == pattern for layer in range(2, repeat.count))
