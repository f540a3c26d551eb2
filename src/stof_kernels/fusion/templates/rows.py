"""A segment's elementwise and row-wise operators as lines of a Triton kernel over a tile of rows and columns.

Every tensor is seen as (rows, columns) with the last dimension as columns. A value in the kernel is a tile (BM, BN), one column
per row (BM, 1), or one row for all (1, BN); arithmetic is in float32, rounded once where it is stored.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ..capture import VIEWS
from ..segments import Segment
from .base import Unsupported

aten = torch.ops.aten
TILE, ROW, COLUMN, NUMBER = "tile", "row", "column", "number"
_LOAD = {
    TILE: "tl.load({p} + rows64[:, None] * {n} + cols[None, :], mask=inside, other=0.0).to(tl.float32)",
    COLUMN: "tl.load({p} + cols, mask=cols < {n}, other=0.0).to(tl.float32)[None, :]",
    ROW: "tl.load({p} + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]",
    NUMBER: "tl.load({p}).to(tl.float32)",
}


@dataclass
class RowProgram:
    """Lines that compute a segment's values from its inputs, and which of them are stored.

    ``inputs`` are placeholders that become pointers, ``outputs`` the computing nodes that are stored, both in order.
    ``reduces``: some value needs its whole row in one tile. ``prefix`` keeps the names of two programs in one kernel apart.
    """

    segment: Segment
    rows: int
    columns: int
    prefix: str = ""
    values: dict[fx.Node, str] = field(default_factory=dict)
    shapes: dict[fx.Node, str] = field(default_factory=dict)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    reduces: bool = False

    def give(self, node: fx.Node, name: str) -> None:
        """Name a tile that the kernel has computed itself, such as a matrix product."""
        self.values[node], self.shapes[node] = name, TILE

    def compute(self, nodes: list[fx.Node]) -> None:
        """Append the lines of these nodes. Raises `Unsupported` for an operator, shape or stride it does not know."""
        for node in nodes:
            if node.target in VIEWS:
                continue
            rule = _RULES.get(node.target)
            if rule is None:
                raise Unsupported(f"{node.target} has no row-wise form")
            text, shape = rule(self, node)
            name = f"{self.prefix}v{len(self.lines)}"
            self.lines.append(f"{name} = {text}")
            self.values[node], self.shapes[node] = name, shape

    def store(self) -> None:
        """Note what the segment returns; views of it are taken afterwards. Raises `Unsupported` for what is no tile."""
        for node in self.segment.outputs:
            base = base_of(node)
            if base not in self.values or self.shapes[base] != TILE:
                raise Unsupported(f"its result {describe(node)} is not a tile of {self.rows} x {self.columns}")
            if not base.meta["val"].is_contiguous():
                raise Unsupported(f"its result {describe(base)} is not contiguous")
            if base not in self.outputs:
                self.outputs.append(base)

    def read(self, argument: object) -> tuple[str, str]:
        """Text and shape of an operand: a number, a computed value, or an input, which is loaded."""
        if not isinstance(argument, fx.Node):
            if isinstance(argument, bool) or not isinstance(argument, (int, float)):
                raise Unsupported(f"operand {argument!r} is not a number")
            return repr(float(argument)), NUMBER
        base = through_views(argument)
        if base not in self.values:
            if base.op != "placeholder":
                raise Unsupported(f"{describe(argument)} is a view that changes rows or columns")
            self._load(base, argument)
        return self.values[base], self.shapes[base]

    def _load(self, node: fx.Node, seen_as: fx.Node) -> None:
        shape = self._shape_of(seen_as.meta["val"])
        if not node.meta["val"].is_contiguous():
            raise Unsupported(f"input {describe(node)} is not contiguous")
        name = f"{self.prefix}i{len(self.inputs)}"
        self.loads.append(f"{name} = " + _LOAD[shape].format(p=f"{name}_ptr", n=self.columns))
        self.inputs.append(node)
        self.values[node], self.shapes[node] = name, shape

    def _shape_of(self, value: Tensor) -> str:
        last = value.shape[-1] if value.dim() else 1
        if value.numel() == self.rows * self.columns and last == self.columns:
            return TILE
        if value.numel() == self.columns and last == self.columns:
            return COLUMN
        if value.numel() == self.rows and last == 1:
            return ROW
        if value.numel() == 1:
            return NUMBER
        raise Unsupported(f"an input {tuple(value.shape)} does not broadcast over {self.rows} x {self.columns}")

    @property
    def pointers(self) -> list[str]:
        """Names of the inputs' pointers."""
        return [f"{self.prefix}i{i}_ptr" for i in range(len(self.inputs))]

    def returns(self, stored: list[Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The segment's results from the stored tensors: views are taken here, at no cost."""
        known: dict[fx.Node, object] = dict(zip(self.outputs, stored, strict=True))
        known.update(zip(self.segment.placeholders, inputs, strict=True))
        return [_evaluate(node, known) for node in self.segment.outputs]


def _evaluate(node: fx.Node, known: dict[fx.Node, object]) -> Tensor:
    if node not in known:
        args = fx.map_arg(node.args, lambda n: _evaluate(n, known))
        known[node] = node.target(*args, **node.kwargs)
    return known[node]


def through_views(node: fx.Node) -> fx.Node:
    """The value behind views that keep rows and columns as they are in memory."""
    while node.target in VIEWS and node.op == "call_function" and node.target is not operator.getitem:
        source = node.args[0]
        value, before = node.meta["val"], source.meta["val"]
        same_rows = value.is_contiguous() and before.is_contiguous() and value.numel() == before.numel()
        if not same_rows or value.dim() == 0 or before.dim() == 0 or value.shape[-1] != before.shape[-1]:
            break
        node = source
    return node


def base_of(node: fx.Node) -> fx.Node:
    """The value behind any views."""
    while node.op == "call_function" and node.target in VIEWS:
        node = node.args[0]
    return node


def describe(node: fx.Node) -> str:
    """Shape of what a node returns, for reasons."""
    value = node.meta["val"]
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


# ---- operators -------------------------------------------------------------------------------------------------------

Rule = Callable[[RowProgram, fx.Node], tuple[str, str]]
_RANK = {NUMBER: 0, COLUMN: 1, ROW: 1, TILE: 2}


def _join(a: str, b: str) -> str:
    """Shape of a binary operation."""
    if {a, b} == {ROW, COLUMN}:
        return TILE
    return max(a, b, key=_RANK.__getitem__)


def _binary(sign: str) -> Rule:
    def rule(program: RowProgram, node: fx.Node) -> tuple[str, str]:
        (a, shape_a), (b, shape_b) = program.read(node.args[0]), program.read(node.args[1])
        alpha = node.kwargs.get("alpha", 1)
        return f"{a} {sign} {b if alpha == 1 else f'{float(alpha)!r} * {b}'}", _join(shape_a, shape_b)

    return rule


def _unary(text: str) -> Rule:
    def rule(program: RowProgram, node: fx.Node) -> tuple[str, str]:
        x, shape = program.read(node.args[0])
        return text.format(x=x), shape

    return rule


def _power(program: RowProgram, node: fx.Node) -> tuple[str, str]:
    x, shape = program.read(node.args[0])
    forms = {2: f"{x} * {x}", 3: f"{x} * {x} * {x}", 0.5: f"tl.sqrt({x})", -0.5: f"tl.rsqrt({x})", 1: x}
    if node.args[1] not in forms:
        raise Unsupported(f"power {node.args[1]!r} has no row-wise form")
    return forms[node.args[1]], shape


def _gelu(program: RowProgram, node: fx.Node) -> tuple[str, str]:
    x, shape = program.read(node.args[0])
    return (f"gelu_tanh({x})" if node.kwargs.get("approximate") == "tanh" else f"gelu({x})"), shape


def _whole_row(program: RowProgram, node: fx.Node, dims: object) -> str:
    x, shape = program.read(node.args[0])
    rank = node.args[0].meta["val"].dim()
    if list(dims) not in ([-1], [rank - 1]) or shape != TILE:
        raise Unsupported(f"{node.target} over dimensions {dims} is not over a row")
    program.reduces = True
    return x


def _mean(program: RowProgram, node: fx.Node) -> tuple[str, str]:
    x = _whole_row(program, node, node.args[1])
    if len(node.args) < 3 or not node.args[2]:
        raise Unsupported("a mean that drops its dimension has no row-wise form")
    return f"row_sum({x}, cols < {program.columns}) / {float(program.columns)!r}", ROW


def _layer_norm(program: RowProgram, node: fx.Node) -> tuple[str, str]:
    x = _whole_row(program, node, [-1])
    weight, bias, eps = (*node.args[2:], *[None] * 3)[:3]
    if list(node.args[1]) != [program.columns]:
        raise Unsupported(f"layer_norm over {list(node.args[1])}, a row has {program.columns} columns")
    text = (
        f"normalise({x}, cols < {program.columns}, {float(program.columns)!r}, {1e-5 if eps is None else float(eps)!r})"
    )
    if weight is not None:
        text += f" * {program.read(weight)[0]}"
    return (f"{text} + {program.read(bias)[0]}" if bias is not None else text), TILE


def _where(program: RowProgram, node: fx.Node) -> tuple[str, str]:
    (c, shape_c), (a, shape_a), (b, shape_b) = (program.read(arg) for arg in node.args)
    return f"tl.where({c} != 0, {a}, {b})", _join(shape_c, _join(shape_a, shape_b))


_RULES: dict[object, Rule] = {
    aten.add.Tensor: _binary("+"),
    aten.sub.Tensor: _binary("-"),
    aten.mul.Tensor: _binary("*"),
    aten.div.Tensor: _binary("/"),
    aten.neg.default: _unary("-{x}"),
    aten.abs.default: _unary("tl.abs({x})"),
    aten.relu.default: _unary("tl.where({x} > 0, {x}, {x} * 0.0)"),
    aten.silu.default: _unary("{x} / (1.0 + tl.exp(-{x}))"),
    aten.sigmoid.default: _unary("1.0 / (1.0 + tl.exp(-{x}))"),
    aten.tanh.default: _unary("tanh({x})"),
    aten.exp.default: _unary("tl.exp({x})"),
    aten.erf.default: _unary("tl.erf({x})"),
    aten.sqrt.default: _unary("tl.sqrt({x})"),
    aten.rsqrt.default: _unary("tl.rsqrt({x})"),
    aten.to.dtype: _unary("{x}"),
    aten._to_copy.default: _unary("{x}"),
    aten.contiguous.default: _unary("{x}"),
    aten.clone.default: _unary("{x}"),
    aten.pow.Tensor_Scalar: _power,
    aten.gelu.default: _gelu,
    aten.mean.dim: _mean,
    aten.layer_norm.default: _layer_norm,
    aten.where.self: _where,
}

HELPERS = """
@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def row_sum(x, inside):
    return tl.sum(tl.where(inside[None, :], x, 0.0), 1)[:, None]


@triton.jit
def normalise(x, inside, count, eps):
    centred = tl.where(inside[None, :], x - row_sum(x, inside) / count, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / count + eps)
"""
"""Functions that generated kernels call."""
