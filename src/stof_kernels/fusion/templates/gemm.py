"""Matrix products with what follows them, in one kernel (Triton): bias, activation, gate, residual, norm.

Products that share an input (query, key, value; a gate and what it gates) are computed side by side in one pass over it. What
follows a product runs on the accumulator; a norm there needs the whole row in one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..graph import Kind
from ..segments import Run, Segment
from .base import Setting, Template, Unsupported, require_triton, setting
from .library import load
from .rows import RowProgram, base_of, through_views
from .rowwise import empty_outputs, indent, power_of_two, stores

aten = torch.ops.aten
_MOST_WIDE = 1024  # columns of a row that one block holds as float32 accumulators

_KERNEL = """
@triton.jit
def kernel(x_ptr, {pointers}, M, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    # Neighbouring blocks take neighbouring rows of one column tile, so that weights are read from L2.
    tiles_m, tiles_n = tl.cdiv(M, BM), {tiles_n}
    pid, width = tl.program_id(0), GROUP * tiles_n
    first = pid // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    rows = (first + pid % width % height) * BM + tl.arange(0, BM)
    cols = pid % width // height * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    inside = (rows[:, None] < M) & (cols[None, :] < {columns})
    rows64 = rows.to(tl.int64)
{zeros}
    for k in range(0, {depth}, BK):
        at = k + ks
        x = tl.load(x_ptr + rows64[:, None] * {depth} + at[None, :],
                    mask=(rows[:, None] < M) & (at[None, :] < {depth}), other=0.0)
{products}
{body}
{stores}
"""


@dataclass(frozen=True)
class Product:
    """One matrix product: its node, weight and bias, and whether the weight is (in, out) instead of (out, in)."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool


def product_of(node: fx.Node) -> Product | None:
    """The product that a node computes, or None."""
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
        return Product(node, x, weight, bias, transposed=False)
    if node.target is aten.addmm.default and not node.kwargs:
        return Product(node, node.args[1], node.args[2], node.args[0], transposed=True)
    if node.target is aten.mm.default:
        return Product(node, *node.args, None, transposed=True)
    return None


@dataclass
class GemmProgram:
    """Products of one input and the row program that follows them."""

    products: list[Product]
    x: fx.Node
    depth: int
    rows: RowProgram


class Gemm(Template):
    """One to three linear layers of one input, then elementwise operators and norms on their results."""

    name: ClassVar[str] = "gemm"

    def check(self, segment: Segment) -> None:
        """Raises `Unsupported` unless the segment is one linear operator followed by memory-intensive ones."""
        require_triton(segment)
        self.program(segment)

    def program(self, segment: Segment) -> GemmProgram:
        """The segment as products and a row program."""
        if segment.kinds[0] is not Kind.COMPUTE or Kind.COMPUTE in segment.kinds[1:] or Kind.ATTENTION in segment.kinds:
            raise Unsupported("one linear operator first and memory-intensive ones after it, this segment differs")
        products = [p for p in map(product_of, segment.computing) if p is not None]
        if len(products) != segment.ops[0].gemms:
            raise Unsupported(f"{segment.ops[0]} is no linear layer")
        x = common_input(products)
        columns = products[0].node.meta["val"].shape[-1]
        rows = RowProgram(segment, products[0].node.meta["val"].numel() // columns, columns)
        start(rows, products)
        rows.compute([n for n in segment.computing if n not in rows.values])
        rows.store()
        if rows.reduces and power_of_two(columns) > _MOST_WIDE:
            raise Unsupported(f"a norm over {columns} columns, allowed: up to {_MOST_WIDE} behind a matrix product")
        return GemmProgram(products, x, x.meta["val"].shape[-1], rows)

    def settings(self, segment: Segment) -> list[Setting]:
        """Tile sizes, warps and pipeline stages that fit registers and shared memory."""
        program = self.program(segment)
        whole, count = power_of_two(program.rows.columns), len(program.products)
        widths = (
            [whole]
            if program.rows.reduces
            else sorted({min(whole, n) for n in (64, 128, 32, 256)}, key=lambda n: abs(n - 128))
        )
        heights = sorted({min(power_of_two(program.rows.rows), m) for m in (16, 32, 64, 128)}, reverse=True)
        size = program.x.meta["val"].element_size()
        found = [
            setting(BM=m, BN=n, BK=k, warps=w, stages=s)
            for n in widths
            for m in heights
            for k in (64, 32, 16)
            for w in (4, 8)
            for s in (3, 2, 4)
            if k <= power_of_two(program.depth) and _fits(m, n, k, w, s, count, size, segment.device)
        ]
        return found or [setting(BM=16, BN=widths[0], BK=16, warps=8, stages=2)]

    def build(self, segment: Segment, setting: Setting) -> Run:
        """The kernel of this segment and its launch."""
        program, values = self.program(segment), dict(setting)
        rows = program.rows
        kernel = load(_source(program)).kernel
        places = segment.placeholders
        picked = [places.index(node) for node in (program.x, *(p.weight for p in program.products), *rows.inputs)]
        grid = (-(-rows.rows // values["BM"]) * -(-rows.columns // values["BN"]),)

        def run(*inputs: Tensor) -> list[Tensor]:
            stored = empty_outputs(rows)
            kernel[grid](
                *(inputs[i] for i in picked),
                *stored,
                rows.rows,
                BM=values["BM"],
                BN=values["BN"],
                BK=values["BK"],
                GROUP=8,
                num_warps=values["warps"],
                num_stages=values["stages"],
            )
            return rows.returns(stored, inputs)

        return run


def _source(program: GemmProgram) -> str:
    rows, count = program.rows, len(program.products)
    pointers = [f"w{i}_ptr" for i in range(count)] + rows.pointers + [f"o{i}_ptr" for i in range(len(rows.outputs))]
    return _KERNEL.format(
        pointers=", ".join(pointers),
        columns=rows.columns,
        depth=program.depth,
        tiles_n=f"tl.cdiv({rows.columns}, BN)",
        zeros=indent([f"acc{i} = tl.zeros((BM, BN), tl.float32)" for i in range(count)]),
        products=indent([f"    {line}" for line in product_lines(program.products, rows.columns, program.depth)]),
        body=indent([*rows.loads, *rows.lines]),
        stores=indent(stores(rows)),
    )


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


def exact(product: Product) -> str:
    """float32 products are exact; half precision accumulates in float32 either way."""
    return ', input_precision="ieee"' if product.x.meta["val"].dtype == torch.float32 else ""


def common_input(products: list[Product]) -> fx.Node:
    """The one input of up to three products of equal shape. Raises `Unsupported` for anything else."""
    sources = {through_views(p.x) for p in products}
    shapes = {tuple(p.node.meta["val"].shape) for p in products}
    if len(sources) != 1 or len(shapes) != 1 or len(products) > 3:
        raise Unsupported(
            f"{len(products)} products of {len(sources)} inputs and {len(shapes)} shapes, allowed: 3 of 1 and 1"
        )
    (x,) = sources
    require_contiguous(x, *(p.weight for p in products))
    return x


def start(rows: RowProgram, products: list[Product]) -> None:
    """Begin a row program with the accumulators of these products and their biases."""
    for i, product in enumerate(products):
        rows.give(product.node, f"acc{i}")
    for i, product in enumerate(products):
        if product.bias is not None:
            rows.lines.append(f"acc{i} = acc{i} + {rows.read(product.bias)[0]}")


def require_contiguous(*nodes: fx.Node) -> None:
    """Raises `Unsupported` unless all are contiguous floating-point inputs of the segment."""
    for node in nodes:
        if base_of(node).op != "placeholder" or node.op != "placeholder" or not node.meta["val"].is_contiguous():
            raise Unsupported(f"an operand {tuple(node.meta['val'].shape)} of the product is not a contiguous input")
        if not node.meta["val"].is_floating_point():
            raise Unsupported(f"a product of {node.meta['val'].dtype}, allowed: floating point")


def _fits(m: int, n: int, k: int, warps: int, stages: int, count: int, size: int, device: torch.device) -> bool:
    """Whether tiles fit: accumulators in about half of the registers of the block, operands in shared memory."""
    if m * n * count > 32 * warps * 128:
        return False
    limit = 96 * 1024  # what the smallest of the supported cards gives one block
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return (m * k + n * k * count) * size * stages <= limit
