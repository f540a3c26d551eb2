"""Blocks: what is tuned once. A repeated layer is one block however often it occurs; what stands between is a block each."""

from __future__ import annotations

from collections import Counter

from . import repeats
from .graph import Kind, OpGraph
from .repeats import Block
from .scheme import FusionScheme

_FEW_ROWS = 256  # up to here weights dominate and a chain of products is tried as one kernel first


def split(graph: OpGraph) -> list[Block]:
    """The graph as blocks, in order, without gaps."""
    blocks: list[Block] = []
    at = 0
    for repeat in repeats.find(graph):
        if repeat.start > at:
            blocks.append(Block(at, repeat.start - at, 1))
        blocks.append(repeat)
        at = repeat.stop
    if at < len(graph.ops):
        blocks.append(Block(at, len(graph.ops) - at, 1))
    return blocks


def start_schemes(graph: OpGraph, block: Block) -> list[FusionScheme]:
    """Where a search starts: first frequent runs of memory-intensive operators as one segment each, then rules on top.

    A run is frequent if its structure occurs at least twice in the graph. The rules: the other runs as one segment each too,
    for no move around a product comes to those that stand far from any; and, of STOF's paper, with few rows a chain product -
    elementwise - product is fused first.
    """
    ops = [graph.ops[i] for i in block.layer(0)]
    keys = [repeats.op_key(op, graph) for op in graph.ops]
    kinds = [op.kind for op in ops]
    frequent = Counter(tuple(keys[i] for i in run) for run in _memory_runs([op.kind for op in graph.ops]))
    joined: set[int] = set()  # operators that belong to the segment of the one before
    for run in _memory_runs(kinds):
        if frequent[tuple(keys[block.start + i] for i in run)] >= 2:
            joined |= set(run[1:])
    found = [joined, {i for run in _memory_runs(kinds) for i in run[1:]}]
    if _rows(graph, block) <= _FEW_ROWS:
        for run in _memory_runs(kinds):
            chain = range(run[0] - 1, run[-1] + 2)
            if chain[0] >= 0 and chain[-1] < len(ops) and _is_chain(ops, chain):
                found.append(found[-1] | set(chain[1:]))
    schemes = [FusionScheme.from_boundaries([i for i in range(1, len(ops)) if i not in j], len(ops)) for j in found]
    return [scheme for scheme in dict.fromkeys(schemes) if scheme.illegal(kinds) is None]


def _memory_runs(kinds: list[Kind]) -> list[list[int]]:
    runs: list[list[int]] = []
    for i, kind in enumerate(kinds):
        if kind is not Kind.MEMORY:
            continue
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _is_chain(ops: list, chain: range) -> bool:
    """Product, elementwise operators, product: no norm between, which would need whole rows."""
    between = [ops[i].name for i in chain[1:-1]]
    ends = ops[chain[0]].kind is Kind.COMPUTE and ops[chain[-1]].kind is Kind.COMPUTE
    return ends and not any(name.endswith("norm") or name in ("add", "rope") for name in between)


def _rows(graph: OpGraph, block: Block) -> int:
    """Rows of the block's activations: elements over the last dimension."""
    for i in block.layer(0):
        for node in graph.ops[i].outputs:
            value = node.meta.get("val")
            if hasattr(value, "shape") and value.dim() >= 2:
                return value.numel() // value.shape[-1]
    return 0
