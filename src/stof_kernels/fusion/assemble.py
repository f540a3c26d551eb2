"""From a plan to a callable: one flat function for the captured shapes, eager operators in line and fused segments as calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .capture import VIEWS
from .graph import Kind, OpGraph
from .plan import Choice, FusionPlan
from .segments import Run, Segment, cut
from .templates import TEMPLATES, Setting

Built = dict[tuple[str, str, Setting], Run]
"""Callables by segment key, template and setting."""


@dataclass
class Program:
    """``function(*inputs, *weights, *constants)``; weights are the model's own tensors, constants computed from them.

    Constants are computed again when one of the weights behind them has been written to. ``calls`` are the names of the
    function's modules by the key of the segment that they run, ``places`` the segment's blocks and positions in the plan.
    """

    function: fx.GraphModule
    weights: list[Tensor]
    constants: Constants
    calls: dict[str, str] = field(default_factory=dict)
    places: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def exchange(self, key: str, run: Run) -> Run:
        """Run a segment another way from now on, wherever it stands; returns the way before. KeyError for an unknown key."""
        before = getattr(self.function, self.calls[key]).run
        setattr(self.function, self.calls[key], Fused(run))
        return before

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The captured graph's outputs for new values of its inputs."""
        return self.function(*inputs, *self.weights, *self.constants.current(inputs))


class Constants:
    """Values that depend on weights and constants only, computed once and again after a weight behind them has changed.

    The tensors stay the same ones: new values are written into them, so that a CUDA graph that reads them sees the change. Only
    what is a view of a weight is another tensor once the weight's memory has been exchanged.
    """

    def __init__(self, graph: OpGraph, needed: list[fx.Node]):
        module = graph.graph_module
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self._graph, copies = fx.Graph(), {}
        sources = [n for n in _behind(needed) if n.op in ("get_attr", "placeholder")]
        for node in sources:
            copies[node] = self._graph.placeholder(node.name)
        wanted = set(_behind(needed))
        for node in graph.constants:
            if node in wanted:
                copies[node] = self._graph.node_copy(node, copies.__getitem__)
        self._graph.output(tuple(copies[n] for n in needed))
        self._function = fx.GraphModule(torch.nn.Module(), self._graph)
        self._at = [placeholders.index(n) if n.op == "placeholder" else attribute(module, n.target) for n in sources]
        attention = {node for op in graph.ops if op.kind is Kind.ATTENTION for node in op.nodes}
        self._packed = [bool(n.users) and all(user in attention for user in n.users) for n in needed]
        self._state: tuple | None = None
        self._values: list[Tensor] = []
        self._firsts: dict[tuple, int] = {}
        self._first: list[int] = []  # by value: the first one that is the same view of the same memory

    def current(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The values for the weights as they are now; ``inputs`` holds weights where Dynamo passes them in."""
        sources = [inputs[at] if isinstance(at, int) else at for at in self._at]
        state = tuple((s.data_ptr(), 0 if s.is_inference() else s._version) for s in sources)
        if state != self._state or any(s.is_inference() for s in sources):
            # They are written again in later calls, whichever mode this one is in.
            with torch.inference_mode(False), torch.no_grad():
                found = self._function(*sources)
                theirs = {s.untyped_storage().data_ptr() for s in sources}
                for i, new in enumerate(found):
                    self._put(i, new, new.untyped_storage().data_ptr() in theirs)
            self._state = state
        return self._values

    def _put(self, i: int, new: Tensor, is_view: bool) -> None:
        """Take over a computed value; a view of a weight is kept as it is, so that the weight is not held twice.

        Layers that look at one tensor alike share what is packed from it: T5's bias would else be held once a layer.
        """
        if i == len(self._values):
            look = (new.data_ptr(), new.shape, new.stride(), new.dtype, self._packed[i])
            first = self._firsts.setdefault(look, i)
            self._first.append(first)
            if first < i:
                self._values.append(self._values[first])
            else:
                self._values.append(packed(new) if self._packed[i] and not is_view else new)
        elif self._first[i] < i:
            self._values[i] = self._values[self._first[i]]
        elif is_view:
            self._values[i] = new
        else:
            unexpanded(self._values[i]).copy_(unexpanded(new))


def packed(value: Tensor) -> Tensor:
    """The same values with rows side by side in memory, repeated dimensions still not stored: attention reads a bias often."""
    return unexpanded(value).contiguous().expand(value.shape)


def unexpanded(value: Tensor) -> Tensor:
    """One entry of each dimension that only repeats."""
    for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if stride == 0 and size > 1:
            value = value.narrow(dim, 0, 1)
    return value


def attribute(module: torch.nn.Module, target: str) -> Tensor:
    """The tensor behind a get_attr node."""
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name)
    return value


def _behind(nodes: list[fx.Node]) -> list[fx.Node]:
    """The nodes and everything that they depend on."""
    found: dict[fx.Node, None] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            stack += node.all_input_nodes
    return list(found)


def assemble(
    graph: OpGraph, plan: FusionPlan, built: Built | None = None, apart: Collection[str] = frozenset()
) -> Program:
    """The callable of a plan. What a search has built already is taken as it is, anything else is built now.

    Eager segments are in line, but for those whose keys are in ``apart``: these can be exchanged as well.

    Raises what a template raises where it cannot build a segment.
    """
    old = graph.graph_module.graph
    new, env = fx.Graph(), {}
    module = torch.nn.Module()
    for node in old.nodes:
        if node.op == "placeholder":
            env[node] = new.placeholder(node.name)
    active = [node for op in graph.ops for node in op.nodes]
    read = dict.fromkeys(a for node in (*active, old.output_node()) for a in node.all_input_nodes)
    weights = [n for n in read if n.op == "get_attr"]
    constant_set = set(graph.constants)
    needed = [n for n in read if n in constant_set]
    for node in (*weights, *needed):
        env[node] = new.placeholder(f"w_{node.name}")
    names: dict[tuple[str, str, Setting], str] = {}
    keys: dict[tuple[int, int], set[str]] = {}
    for number, block in enumerate(plan.blocks):
        for layer in range(block.count):
            first = block.start + layer * block.period
            for at, (part, choice) in enumerate(zip(block.scheme.segments, block.choices, strict=True)):
                indices = range(first + part.start, first + part.stop)
                segment = cut(graph, indices) if apart or choice.template != "eager" else None
                if segment is None or (choice.template == "eager" and segment.key not in apart):
                    _copy(graph, new, env, indices)
                else:
                    _call(segment, choice, new, env, module, names, built or {})
                    keys.setdefault((number, at), set()).add(segment.key)
    outputs = fx.map_arg(old.output_node().args[0], lambda n: _fresh(new, env, n, constant_set))
    new.output(outputs)
    new.lint()
    return Program(
        fx.GraphModule(module, new),
        [attribute(graph.graph_module, n.target) for n in weights],
        Constants(graph, needed),
        {key: name for (key, _, _), name in names.items()},
        _places(keys),
    )


def _places(keys: dict[tuple[int, int], set[str]]) -> dict[str, list[tuple[int, int]]]:
    """Where each segment stands in a plan, of those that are the same one in all layers wherever they stand."""
    found: dict[str, list[tuple[int, int]]] = {}
    for place, own in keys.items():
        for key in own:
            found.setdefault(key, []).append(place)
    return {key: places for key, places in found.items() if all(keys[place] == {key} for place in places)}


def _copy(graph: OpGraph, new: fx.Graph, env: dict[fx.Node, fx.Node], indices: range) -> None:
    """Append the operators of a segment one by one."""
    for i in indices:
        for node in graph.ops[i].nodes:
            env[node] = new.node_copy(node, env.__getitem__)


def _call(
    segment: Segment,
    choice: Choice,
    new: fx.Graph,
    env: dict[fx.Node, fx.Node],
    module: torch.nn.Module,
    names: dict[tuple[str, str, Setting], str],
    built: Built,
) -> None:
    """Append one call of what a template built for a segment; equal segments of other layers share it."""
    key = (segment.key, choice.template, choice.setting)
    if key not in names:
        names[key] = f"segment_{len(names)}"
        run = built.get(key) or TEMPLATES[choice.template].build(segment, choice.setting)
        setattr(module, names[key], Fused(run))
    call = new.call_module(names[key], tuple(env[n] for n in segment.sources))
    for i, result in enumerate(segment.results):
        env[result] = new.call_method("__getitem__", (call, i))


class Fused(torch.nn.Module):
    """A compiled segment as a module, so that a graph can call it by name."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run
        # Called without a frame in between; an attribute that is a module would be a child instead.
        self.forward = run.forward if isinstance(run, torch.nn.Module) else run


def _fresh(new: fx.Graph, env: dict[fx.Node, fx.Node], node: fx.Node, constants: set[fx.Node]) -> fx.Node:
    """An output; what depends on weights only is kept between calls, so the caller gets a copy."""
    base = node
    while base.op == "call_function" and base.target in VIEWS:
        base = base.args[0]
    if node in constants or base in constants:
        return new.call_function(torch.ops.aten.clone.default, (env[node],))
    return env[node]
