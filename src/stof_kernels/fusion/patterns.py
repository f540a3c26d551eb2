"""Operators that a graph spells out in many nodes: normalisation, GELU by tanh, rotary embedding, unfused attention, clamping.

Each matcher starts at one telling node and returns the nodes of the whole, or None. They look at arithmetic only: no module
names, no model. `find` keeps a match only if nothing outside reads its inner values and it can run as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from .capture import VIEWS

aten = torch.ops.aten
Match = set[fx.Node]
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default}
_MULTIPLY, _ADD = aten.mul.Tensor, aten.add.Tensor


def find(nodes: Iterable[fx.Node]) -> list[tuple[str, list[fx.Node]]]:
    """Composite operators among the nodes (in graph order): their names and nodes, none in two of them."""
    order = {node: i for i, node in enumerate(nodes)}
    taken: set[fx.Node] = set()
    found = []
    for node in order:
        for anchor, name, match in _MATCHERS:
            if node.target not in anchor or node in taken:
                continue
            group = match(node)
            if group and group <= order.keys() and not group & taken and _closed(group):
                taken |= group
                found.append((name, sorted(group, key=order.__getitem__)))
    return found


def _closed(group: Match) -> bool:
    """Only one node of the group is read from outside, and it comes last."""
    exits = [node for node in group if any(user not in group for user in node.users)]
    return len(exits) == 1 and not any(user in group for user in exits[0].users)


def _follow(node: fx.Node, targets: set, group: Match) -> fx.Node | None:
    """The only user of a node if it is one of the targets; it joins the group."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in targets:
        group.add(users[0])
        return users[0]
    return None


def _rms_norm(rsqrt: fx.Node) -> Match | None:
    """``weight * (x * rsqrt(mean(x ** 2) + eps))`` with casts to and from float32."""
    add = rsqrt.args[0]
    if not _is(add, _ADD) or not _is(mean := add.args[0], aten.mean.dim):
        return None
    power = mean.args[0]
    if not _is(power, aten.pow.Tensor_Scalar) or power.args[1] != 2:
        return None
    group = {rsqrt, add, mean, power}
    scaled = _follow(rsqrt, {_MULTIPLY}, group)
    if scaled is None:
        return None
    x = power.args[0]
    if isinstance(x, fx.Node) and x.target in _CASTS:
        group.add(x)
    last = scaled
    cast = _follow(last, _CASTS, group)
    last = cast or last
    users = list(last.users)
    if len(users) == 1 and users[0].target is _MULTIPLY and _other(users[0], last).op != "call_function":
        group.add(users[0])
        _follow(users[0], _CASTS, group)
    return group


def _gelu_tanh(tanh: fx.Node) -> Match | None:
    """``0.5 x (1 + tanh(c (x + 0.044715 x^3)))``."""
    outer = tanh.args[0]
    if not _is(outer, _MULTIPLY) or not _is(total := outer.args[0], _ADD) or len(total.args) != 2:
        return None
    cubic = total.args[1]
    if not _is(cubic, _MULTIPLY) or not _is(power := cubic.args[0], aten.pow.Tensor_Scalar) or power.args[1] != 3:
        return None
    x = power.args[0]
    group = {tanh, outer, total, cubic, power}
    plus_one = _follow(tanh, {_ADD}, group)
    product = plus_one and _follow(plus_one, {_MULTIPLY}, group)
    if product is None or total.args[0] is not x:
        return None
    half = _other(product, plus_one)
    if not _is(half, _MULTIPLY) or half.args[0] is not x or half.args[1] != 0.5:
        return None
    return group | {half}


def _rope(neg: fx.Node) -> Match | None:
    """``x * cos + cat(-x[half:], x[:half]) * sin``."""
    upper = neg.args[0]
    if not _is(upper, aten.slice.Tensor):
        return None
    group = {neg, upper}
    joined = _follow(neg, {aten.cat.default}, group)
    if joined is None or len(joined.args[0]) != 2 or not _is(lower := joined.args[0][1], aten.slice.Tensor):
        return None
    x = upper.args[0]
    rotated = _follow(joined, {_MULTIPLY}, group)
    total = rotated and _follow(rotated, {_ADD}, group)
    if total is None or lower.args[0] is not x:
        return None
    straight = _other(total, rotated)
    if not _is(straight, _MULTIPLY) or x not in straight.args:
        return None
    return group | {lower, straight}


def _attention(softmax: fx.Node) -> Match | None:
    """Unfused attention: product, anything elementwise, softmax, product; between them only views and casts."""
    group = {softmax}
    node = softmax.args[0]
    while isinstance(node, fx.Node) and node.target not in _PRODUCTS:
        if node.target not in _SCORE_STEPS:
            return None
        group.add(node)
        node = next((a for a in node.args if isinstance(a, fx.Node) and _is_score(a)), None)
    if not isinstance(node, fx.Node):
        return None
    group.add(node)
    step = softmax
    while step.target not in _PRODUCTS:
        step = _follow(step, _CASTS | _PRODUCTS | VIEWS, group)
        if step is None:
            return None
    return group


def _clamp(clamp: fx.Node) -> Match | None:
    """T5's guard in float16: ``any(isinf(x))`` chooses between two bounds, and x is clamped to them."""
    group, stack = {clamp}, [a for a in clamp.args[1:] if isinstance(a, fx.Node)]
    while stack:
        node = stack.pop()
        if node is clamp.args[0] or node in group:
            continue
        if node.target not in _GUARD_STEPS:
            return None
        group.add(node)
        stack += [a for a in node.all_input_nodes if a is not clamp.args[0]]
    return group if len(group) > 1 else None


def overflow_guard(clamp: fx.Node) -> Match | None:
    """The nodes of T5's guard if this is exactly it: +-c with c = max - 1000 where any float16 is infinite, else max."""
    if clamp.meta["val"].dtype != torch.float16 or len(clamp.args) != 3 or (group := _clamp(clamp)) is None:
        return None
    low, high = clamp.args[1], clamp.args[2]
    if not _is(low, aten.neg.default) or low.args[0] is not high or high.target not in _CHOICES:
        return None
    condition, *bounds = high.args
    found = [
        b.args[1] if _is(b, aten.full.default) else b.args[0] if _is(b, aten.scalar_tensor.default) else b
        for b in bounds
    ]
    largest = torch.finfo(torch.float16).max
    any_inf = (
        _is(condition, aten.any.default) and len(condition.args) == 1 and _is(condition.args[0], aten.isinf.default)
    )
    if found != [largest - 1000, largest] or not any_inf or condition.args[0].args[0] is not clamp.args[0]:
        return None
    return group


def _is(node: object, target: Callable) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _other(node: fx.Node, operand: fx.Node) -> fx.Node:
    """The other operand of a binary node (itself where the second is a number)."""
    rest = [a for a in node.args if isinstance(a, fx.Node) and a is not operand]
    return rest[0] if rest else node


def _is_score(node: fx.Node) -> bool:
    """Whether a chain of score arithmetic leads from this node back to a product."""
    while node.target in _SCORE_STEPS:
        inner = [a for a in node.args if isinstance(a, fx.Node)]
        if not inner:
            return False
        node = inner[0]
    return node.target in _PRODUCTS


_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_SCORE_STEPS = {_ADD, _MULTIPLY, aten.div.Tensor, aten.masked_fill.Scalar, aten.where.self} | _CASTS
_CHOICES = {aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar}
_GUARD_STEPS = {
    aten.isinf.default,
    aten.any.default,
    aten.where.self,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.neg.default,
    aten.full.default,
    aten.scalar_tensor.default,
}
_MATCHERS: tuple[tuple[set, str, Callable[[fx.Node], Match | None]], ...] = (
    ({aten.rsqrt.default}, "rms_norm", _rms_norm),
    ({aten.tanh.default}, "gelu_tanh", _gelu_tanh),
    ({aten.neg.default}, "rope", _rope),
    ({aten.softmax.int, aten._softmax.default}, "attention", _attention),
    ({aten.clamp.Tensor}, "clamp", _clamp),
)
