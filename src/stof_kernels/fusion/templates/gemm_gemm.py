"""Two matrix products in a row, as in a feed-forward block, whose inner activation never leaves the multiprocessor (Triton).

A block owns a few whole rows of the result and walks through the inner width; it pays where rows are few and weights dominate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from ..graph import Kind
from ..segments import Run, Segment
from .base import Setting, TritonTemplate, Unsupported, setting
from .gemm import common_input, lead_of, require_contiguous, start
from .gemm_source import Product, exact, product_of
from .library import Launch
from .rows import RowProgram, through_views
from .rowwise import empty_outputs, indent, stores
from .tiles import device_of, power_of_two

_MOST_WIDE = 1024  # columns of the result that one block accumulates
_MOST_ROWS = 2048  # beyond, two products of larger tiles take a fraction of its time

_KERNEL = """
@triton.jit
def kernel(x_ptr, {pointers}, M: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
           OVERLAP: tl.constexpr):
    if OVERLAP:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    rows64 = rows.to(tl.int64)
    outer = tl.arange(0, BN)
    ks = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for h in range(0, {inner}, BH):
        cols = h + tl.arange(0, BH)
        inside = (rows[:, None] < M) & (cols[None, :] < {inner})
{zeros}
        for k in range(0, {depth}, BK):
            at = k + ks
            x = tl.load(x_ptr + rows64[:, None] * {depth} + at[None, :],
                        mask=(rows[:, None] < M) & (at[None, :] < {depth}), other=0.0)
{products}
{between}
        second = tl.load(u_ptr + cols[:, None].to(tl.int64) * {step_in} + outer[None, :].to(tl.int64) * {step_out},
                         mask=(cols[:, None] < {inner}) & (outer[None, :] < {columns}), other=0.0)
        total = tl.dot(tl.where(inside, {hidden}, 0.0).to(second.dtype), second, total{exact})
    cols = outer
    inside = (rows[:, None] < M) & (cols[None, :] < {columns})
    acc0 = total
{body}
{stores}
"""


@dataclass
class ChainProgram:
    """The first products, what stands between, the second product and what follows it."""

    first: list[Product]
    x: fx.Node
    depth: int
    between: RowProgram
    hidden: str
    second: Product
    after: RowProgram


class GemmGemm(TritonTemplate[ChainProgram]):
    """Linear (one, or a gate and what it gates), elementwise operators, linear, and what follows."""

    name: ClassVar[str] = "gemm_gemm"

    def analyse(self, segment: Segment) -> ChainProgram:
        """Raises `Unsupported` unless it is linear, elementwise operators, linear, memory-intensive operators."""
        if (
            segment.kinds.count(Kind.COMPUTE) != 2
            or segment.kinds[0] is not Kind.COMPUTE
            or Kind.ATTENTION in segment.kinds
        ):
            raise Unsupported("two linear operators, the first one first, this segment differs")
        products = [p for p in map(product_of, segment.computing) if p is not None]
        first, second = products[:-1], products[-1:]
        if len(first) != segment.ops[0].gemms or not second:
            raise Unsupported("two linear operators, the second with one product, this segment differs")
        x, (last,) = common_input(first), second
        require_contiguous(last.weight)
        inner = first[0].node.meta["val"].shape[-1]
        rows = first[0].node.meta["val"].numel() // inner
        between = RowProgram(segment, rows, inner, prefix="a", lead=lead_of(segment))
        start(between, first)
        order = segment.computing
        at = order.index(last.node)
        between.compute([n for n in order[:at] if n not in between.values])
        hidden = through_views(last.x)
        if between.reduces or hidden not in between.values:
            raise Unsupported("what stands between the products is not elementwise on the first")
        columns = last.node.meta["val"].shape[-1]
        after = RowProgram(segment, rows, columns, lead=lead_of(segment))
        start(after, second)
        after.compute(order[at + 1 :])
        after.store()
        if power_of_two(columns) > _MOST_WIDE:
            raise Unsupported(f"a result of {columns} columns, allowed: up to {_MOST_WIDE}")
        return ChainProgram(first, x, x.meta["val"].shape[-1], between, between.values[hidden], last, after)

    def promising(self, segment: Segment) -> bool:
        """Where rows are few and weights dominate."""
        return self.program(segment).after.rows <= _MOST_ROWS

    def settings(self, segment: Segment) -> list[Setting]:
        """Rows of a block, width of an inner step, depth of a step, warps."""
        program = self.program(segment)
        wide, shared = power_of_two(program.after.columns), device_of(segment.device).shared
        size = program.x.meta["val"].element_size()
        return [
            setting(BM=m, BH=h, BK=k, BN=wide, warps=8)
            for m in (16, 32, 64)
            for h, k in ((32, 64), (64, 32), (16, 32))
            if m * wide <= 64 * 512 and (m * (k + h) + h * k * len(program.first) + h * wide) * size * 2 <= shared
        ] or [setting(BM=16, BH=16, BK=16, BN=wide, warps=8)]

    def build(self, segment: Segment, setting: Setting) -> Run:
        """The kernel of this segment and its launch."""
        program, values = self.program(segment), dict(setting)
        after = program.after
        nodes = (
            program.x,
            *(p.weight for p in program.first),
            *program.between.inputs,
            program.second.weight,
            *after.inputs,
        )
        picked = [segment.placeholders.index(node) for node in nodes]

        constants = {"M": after.rows, **{name: values[name] for name in ("BM", "BH", "BN", "BK")}}
        launch = Launch(_source(program), segment.device, [*nodes, *after.outputs], constants, values["warps"], 2)
        grid = (-(-after.rows // values["BM"]),)

        def run(*inputs: Tensor) -> list[Tensor]:
            stored = empty_outputs(after)
            launch(grid, *(inputs[i] for i in picked), *stored)
            return after.returns(stored, inputs)

        run.launches = (launch,)
        return run


def product_lines(products: list[Product], columns: int, depth: int) -> list[str]:
    """Lines that load the weights' tiles at depth ``at`` and columns ``cols`` and add their products with ``x``."""
    lines = []
    for i, product in enumerate(products):
        step = (columns, 1) if product.transposed else (1, depth)
        lines.append(
            f"w{i} = tl.load(w{i}_ptr + at[:, None].to(tl.int64) * {step[0]} + cols[None, :].to(tl.int64) * {step[1]}, "
            f"mask=(at[:, None] < {depth}) & (cols[None, :] < {columns}), other=0.0)"
        )
        lines.append(f"acc{i} = tl.dot(x, w{i}, acc{i}{exact(product)})")
    return lines


def _source(program: ChainProgram) -> str:
    between, after, count = program.between, program.after, len(program.first)
    inner = between.columns
    pointers = [f"w{i}_ptr" for i in range(count)] + between.pointers + ["u_ptr"] + after.pointers
    step_in, step_out = (after.columns, 1) if program.second.transposed else (1, inner)
    return _KERNEL.format(
        pointers=", ".join(pointers + [f"o{i}_ptr" for i in range(len(after.outputs))]),
        inner=inner,
        columns=after.columns,
        depth=program.depth,
        step_in=step_in,
        step_out=step_out,
        hidden=program.hidden,
        exact=exact(program.second),
        zeros=indent([f"    acc{i} = tl.zeros((BM, BH), tl.float32)" for i in range(count)]),
        products=indent([f"        {line}" for line in product_lines(program.first, inner, program.depth)]),
        between=indent([f"    {line}" for line in (*between.loads, *between.lines)]),
        body=indent([*after.loads, *after.lines]),
        stores=indent(stores(after)),
    )
