"""A segment's elementwise and row-wise operators as lines of a Triton kernel over a tile of rows and columns.

Every tensor is seen as (rows, columns) with the last dimension as columns. A value in the kernel is a tile (BM, BN), one column
per row (BM, 1), or one row for all (1, BN); arithmetic is in float32, rounded once where it is stored.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from .. import patterns
from ..capture import VIEWS
from ..segments import Segment
from .base import Unsupported, compiles_for

aten = torch.ops.aten
TILE, ROW, COLUMN, NUMBER = "tile", "row", "column", "number"
_LOAD = {
    TILE: "tl.load({p} + {r}[:, None] * {n} + cols[None, :], mask=inside, other=0.0).to(tl.float32)",
    COLUMN: "tl.load({p} + cols, mask=cols < {n}, other=0.0).to(tl.float32)[None, :]",
    ROW: "tl.load({p} + {r}, mask=rows < M, other=0.0).to(tl.float32)[:, None]",
    NUMBER: "tl.load({p}).to(tl.float32)",
}


@dataclass
class RowProgram:
    """Lines that compute a segment's values from its inputs, and which of them are stored.

    ``inputs`` are placeholders that become pointers, ``outputs`` the computing nodes that are stored, both in order.
    ``reduces``: some value needs its whole row in one tile. ``prefix`` keeps the names of two programs in one kernel apart.
    ``lead`` are the dimensions that the rows count, by which an input of fewer rows is repeated.
    """

    segment: Segment
    rows: int
    columns: int
    prefix: str = ""
    lead: tuple[int, ...] = ()
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
        guards = {n for node in nodes if node.target is aten.clamp.Tensor for n in patterns.overflow_guard(node) or ()}
        for node in nodes:
            if node.target in VIEWS or (node in guards and node.target is not aten.clamp.Tensor):
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
        shape, row = self._shape_of(seen_as.meta["val"])
        name = self.pointer(node)
        self.loads.append(f"{name} = " + _LOAD[shape].format(p=f"{name}_ptr", n=self.columns, r=row))
        self.values[node], self.shapes[node] = name, shape

    def pointer(self, node: fx.Node) -> str:
        """The name of a new input; its pointer is called like that with ``_ptr`` behind it."""
        if node.op != "placeholder" or not node.meta["val"].is_contiguous():
            raise Unsupported(f"input {describe(node)} is not contiguous")
        self.inputs.append(node)
        return f"{self.prefix}i{len(self.inputs) - 1}"

    def _shape_of(self, value: Tensor) -> tuple[str, str]:
        """How an input lies over the tile, and which of its rows a row of the tile reads."""
        last = value.shape[-1] if value.dim() else 1
        if value.numel() == self.columns and last == self.columns and self.rows > 1:
            return COLUMN, ""
        if value.numel() == 1:
            return NUMBER, ""
        if last in (self.columns, 1) and (row := self.row_of(value.shape[:-1])) is not None:
            return (TILE if last == self.columns else ROW), row
        raise Unsupported(f"an input {tuple(value.shape)} does not broadcast over {self.rows} x {self.columns}")

    def row_of(self, lead: Sequence[int]) -> str | None:
        """Text of the row that a row of the tile reads in a tensor with these leading dimensions; None if it has none."""
        count = math.prod(lead)
        if count == self.rows:
            return "rows64"
        while lead and lead[0] == 1:
            lead = lead[1:]
        repeats = lead and tuple(lead) == self.lead[len(self.lead) - len(lead) :]
        return f"(rows64 % {count})" if repeats else None

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


def _activation(name: str) -> Rule:
    """A function of `HELPERS`, in its short form where the result is rounded to half precision by a GPU."""

    def rule(program: RowProgram, node: fx.Node) -> tuple[str, str]:
        x, shape = program.read(node.args[0])
        by_tanh = node.kwargs.get("approximate") == "tanh"
        value = node.meta["val"]
        short = compiles_for(value.device) and value.dtype in (torch.float16, torch.bfloat16)
        return f"{'short_' if short else ''}{name}{'_tanh' if by_tanh else ''}({x})", shape

    return rule


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


def _embedding(program: RowProgram, node: fx.Node) -> tuple[str, str]:
    table, index = node.args[0], node.args[1]
    if table.op != "placeholder" or list(node.meta["val"].shape[-1:]) != [program.columns]:
        raise Unsupported(f"an embedding {describe(node)} of a computed table, or not over a row")
    row = program.row_of(index.meta["val"].shape)
    if row is None or index.meta["val"].numel() != program.rows:
        raise Unsupported(f"an index {describe(index)} of other rows than {program.rows}")
    ids, name = program.pointer(base_of(index)), program.pointer(table)
    count = table.meta["val"].shape[0]
    program.loads += [
        f"{ids}_at = tl.load({ids}_ptr + rows64, mask=rows < M, other=0).to(tl.int64)[:, None]",
        # An index that is none makes its row NaN; eager PyTorch stops the process there.
        f"{name} = tl.load({name}_ptr + {ids}_at * {program.columns} + cols[None, :], "
        f"mask=inside & ({ids}_at >= 0) & ({ids}_at < {count}), other=float('nan')).to(tl.float32)",
    ]
    return name, TILE


def _clamp(program: RowProgram, node: fx.Node) -> tuple[str, str]:
    if patterns.overflow_guard(node) is None:
        raise Unsupported("a clamp between tensors has no row-wise form")
    x, shape = program.read(node.args[0])
    return f"finite({x})", shape


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
    aten.relu.default: _unary("tl.where({x} < 0, 0.0, {x})"),
    aten.silu.default: _activation("silu"),
    aten.sigmoid.default: _unary("1.0 / (1.0 + tl.exp(-{x}))"),
    aten.tanh.default: _activation("tanh"),
    aten.exp.default: _unary("tl.exp({x})"),
    aten.erf.default: _unary("tl.erf({x})"),
    aten.sqrt.default: _unary("tl.sqrt({x})"),
    aten.rsqrt.default: _unary("tl.rsqrt({x})"),
    aten.to.dtype: _unary("{x}"),
    aten._to_copy.default: _unary("{x}"),
    aten.contiguous.default: _unary("{x}"),
    aten.clone.default: _unary("{x}"),
    aten.pow.Tensor_Scalar: _power,
    aten.gelu.default: _activation("gelu"),
    aten.mean.dim: _mean,
    aten.layer_norm.default: _layer_norm,
    aten.embedding.default: _embedding,
    aten.clamp.Tensor: _clamp,
    aten.where.self: _where,
}

HELPERS = """
@triton.jit
def prefetch(at):
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False,
                              pack=1)


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
def silu(x):
    return x / (1.0 + tl.exp(-x))


# The short forms are within the rounding of half precision: the instruction's tanh has a relative error of 2 ** -11. Behind a
# product they take a third of the issue slots of the others, which is what such a kernel is slower by than the product alone.
@triton.jit
def short_tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def short_gelu(x):
    # erf(x / sqrt(2)) = tanh(u(x)) with u's series fitted so that x * erf is within 5e-5.
    square = tl.minimum(x * x, 20.0)
    half = 0.5 * x
    return half + half * short_tanh(x * (0.79750788 + square * (0.0370056495 - 0.000351517322 * square)))


@triton.jit
def short_gelu_tanh(x):
    half = 0.5 * x
    return half + half * short_tanh(x * (0.7978845608028654 + 0.03567740813636141 * (x * x)))


@triton.jit
def short_silu(x):
    half = 0.5 * x
    return half + half * short_tanh(half)


@triton.jit
def finite(x):
    # T5's guard: infinities of float16 become its largest number less 1000. In the model the numbers between those two are
    # clamped as well wherever the tensor has an infinity anywhere; here they stay as they are.
    x = x.to(tl.float16).to(tl.float32)
    return tl.where(tl.abs(x) == float("inf"), tl.where(x > 0, 64504.0, -64504.0), x)


@triton.jit
def row_sum(x, inside):
    return tl.sum(tl.where(inside[None, :], x, 0.0), 1)[:, None]


@triton.jit
def normalise(x, inside, count, eps):
    centred = tl.where(inside[None, :], x - row_sum(x, inside) / count, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / count + eps)
"""
"""Functions that generated kernels call."""
