"""Capture: a model and an example call become one flat graph of ATen operators with everything static.

torch.export (non-strict, undecomposed) is the one route: linear, layer_norm and gelu stay whole, and shapes, dtypes and strides
are on every node. What it captured is then cleaned: no dropout, no asserts, no in-place operators, no dead nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .inputs import Signature, example_problems

aten = torch.ops.aten


class CaptureError(RuntimeError):
    """The model could not be captured; the message is one line that says why."""


@dataclass
class Captured:
    """``graph_module(*flat tensors)`` returns a flat tuple of tensors; ``signature`` and ``unflatten`` are its two ends.

    ``weights`` names the placeholders that hold weights (Dynamo hands them in as inputs); a torch.export capture has none and
    reads weights by attribute.
    """

    graph_module: fx.GraphModule
    signature: Signature | None
    unflatten: Callable[[tuple[Tensor, ...]], Any]
    weights: frozenset[str] = frozenset()


_PLAIN = (type(None), bool, int, float, str)
"""What may stand beside tensors in a model's result; anything else might hold traced tensors that mean nothing later."""


class _Flat(nn.Module):
    """The model with the flat calling convention."""

    def __init__(self, model: nn.Module, signature: Signature):
        super().__init__()
        self.model = model
        self._signature = signature
        self.outputs = SimpleNamespace()  # an object of its own: export resets what a forward does to attributes

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self._signature.arguments(flat)
        leaves, self.outputs.spec = pytree.tree_flatten(self.model(*args, **kwargs))
        # What is not a tensor is part of the structure and cannot be an output of the graph.
        self.outputs.constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def capture(model: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Captured:
    """One clean graph of ``model(*args, **kwargs)`` for these shapes and dtypes, in inference mode.

    Weights stay where they are: the graph reads the model's own parameters. Raises `CaptureError` in one line for a model in
    training mode or one that torch.export cannot follow.
    """
    kwargs = kwargs or {}
    if model.training:
        raise CaptureError("capture: the model is in training mode, allowed: inference (model.eval())")
    signature = Signature.of(args, kwargs)
    signature.problems = example_problems(model, args, kwargs)
    flat = _Flat(model, signature)
    # export merges leaves that are one tensor into one input, and a later call with two different ones would be wrong.
    leaves = _separate(signature.tensors(args, kwargs))
    graph_module = _export(flat, leaves)
    for leaf in flat.outputs.constants.values():
        if not isinstance(leaf, _PLAIN):
            raise CaptureError(
                f"capture: the model returns a {type(leaf).__name__}, allowed: tensors and plain values "
                "(for a cache: use_cache=False)"
            )
    spec, constants = flat.outputs.spec, flat.outputs.constants

    def unflatten(outputs: tuple[Tensor, ...]) -> Any:
        rest = iter(outputs)
        n = len(outputs) + len(constants)
        return pytree.tree_unflatten([constants[i] if i in constants else next(rest) for i in range(n)], spec)

    return Captured(clean(graph_module), signature, unflatten)


def capture_graph(graph_module: fx.GraphModule, example_inputs: list[Tensor]) -> Captured:
    """The same from a graph that Dynamo made, whose weights are inputs."""
    names = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    weights = {n for n, t in zip(names, example_inputs, strict=True) if isinstance(t, nn.Parameter)}
    with torch._guards.tracing(None):
        exported = _export(graph_module, _separate(list(example_inputs)))
    renamed = [node.name for node in exported.graph.nodes if node.op == "placeholder"]
    if len(renamed) != len(names):
        raise CaptureError(f"capture: {len(names)} inputs became {len(renamed)}")
    chosen = frozenset(new for old, new in zip(names, renamed, strict=True) if old in weights)
    return Captured(clean(exported), None, lambda outputs: outputs, chosen)


def _separate(leaves: list[Tensor]) -> list[Tensor]:
    seen: set[int] = set()
    out = []
    for leaf in leaves:
        out.append(leaf.clone() if id(leaf) in seen else leaf)
        seen.add(id(leaf))
    return out


def _export(module: nn.Module, leaves: list[Tensor]) -> fx.GraphModule:
    try:
        with torch.no_grad():
            return torch.export.export(module, tuple(leaves), strict=False).module(check_guards=False)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(f"capture: torch.export could not follow the model: {reason}") from error


# ---- cleaning --------------------------------------------------------------------------------------------------------

_ASSERTS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
}
_IDENTITIES = {aten.dropout.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
_FUNCTIONAL = {aten.add_.Tensor: aten.add.Tensor, aten.mul_.Tensor: aten.mul.Tensor, aten.sub_.Tensor: aten.sub.Tensor}


def clean(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Drop what computes nothing at inference, in place; returns the module.

    Raises `CaptureError` for dropout in training mode and for an in-place operator that it does not know.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTS:
            graph.erase_node(node)
        elif node.target is aten.dropout.default and node.args[1] and node.args[2]:
            raise CaptureError("capture: the graph holds dropout in training mode, allowed: inference (model.eval())")
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _FUNCTIONAL:
            _functionalise(node)
        elif _mutates(node.target):
            raise CaptureError(f"capture: the graph holds the in-place operator {node.target}, which is not supported")
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()
    return graph_module


def _does_nothing(node: fx.Node) -> bool:
    """Whether the node returns its first argument as it is: no-op casts and copies included."""
    if node.target is aten.to.dtype:
        return node.args[0].meta["val"].dtype == node.args[1]
    if node.target is aten.contiguous.default:
        return node.args[0].meta["val"].is_contiguous()
    return node.target in _IDENTITIES


def _functionalise(node: fx.Node) -> None:
    """``a.add_(b)`` as ``a + b``, with every later use of ``a`` reading the result."""
    source = node.args[0]
    if source.op != "call_function" or source.target in VIEWS:
        raise CaptureError(f"capture: {node.target} writes into an input, a weight or a view, which is not supported")
    later = [user for user in source.users if user is not node and user > node]
    node.target = _FUNCTIONAL[node.target]
    for user in later:
        user.replace_input_with(source, node)


def _mutates(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.t.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    operator.getitem,
}
"""Operators that move no data (a reshape may copy, but then it is the reader's strides that ask for it)."""
