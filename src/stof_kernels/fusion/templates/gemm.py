"""Matrix products with what follows them, in one kernel (Triton): bias, activation, gate, residual, norm.

Products that share an input either stand side by side in one launch (query, key, value: nothing follows but their biases) or
are computed together in one pass over it (a gate and what it gates). What follows a product runs on the accumulator; a norm
there needs the whole row in one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..graph import Kind
from ..segments import Run, Segment
from .base import Setting, TritonTemplate, Unsupported, setting
from .gemm_source import Product, gemm_launch, product_of
from .rows import RowProgram, base_of, through_views
from .rowwise import empty_outputs
from .tiles import candidates, device_of, power_of_two

aten = torch.ops.aten
_MOST_WIDE = 1024  # columns of a row that one block holds as float32 accumulators
_MANY_ROWS = 8192  # from here on cuBLAS is 5 to 15 % faster at a product alone
_FEW_ROWS = 1024  # with a norm behind a product of more rows, cuBLAS and a pass of its own take a tenth to a third


@dataclass
class GemmProgram:
    """Products of one input and the row program that follows them; ``sides``: how many stand side by side."""

    products: list[Product]
    x: fx.Node
    depth: int
    rows: RowProgram
    sides: int = 1

    @property
    def count(self) -> int:
        """Accumulators of one tile."""
        return len(self.products) // self.sides


class Gemm(TritonTemplate[GemmProgram]):
    """One to three linear layers of one input, then elementwise operators and norms on their results."""

    name: ClassVar[str] = "gemm"

    def analyse(self, segment: Segment) -> GemmProgram:
        """Raises `Unsupported` unless the segment is one linear operator followed by memory-intensive ones."""
        program = gemm_program(segment)
        if program.rows.reduces and power_of_two(program.rows.columns) > _MOST_WIDE:
            columns = program.rows.columns
            raise Unsupported(f"a norm over {columns} columns, allowed: up to {_MOST_WIDE} behind a matrix product")
        return program

    def promising(self, segment: Segment) -> bool:
        """Not for a product alone of many rows, nor with a norm behind it: tiles of whole rows are few and flat."""
        rows = self.program(segment).rows
        return rows.rows <= _FEW_ROWS if rows.reduces else rows.rows < _MANY_ROWS or len(segment.ops) > 1

    def settings(self, segment: Segment) -> list[Setting]:
        """Tile sizes, warps and pipeline stages that fit registers and shared memory."""
        program = self.program(segment)
        rows, size, device = program.rows, program.x.meta["val"].element_size(), device_of(segment.device)
        if rows.reduces:
            return whole_rows(rows.rows, power_of_two(rows.columns), program.depth, program.count)
        found = candidates(rows.rows, rows.columns, program.depth, program.count, program.sides, size, device)
        return found or [setting(BM=16, BN=16, BK=16, warps=4, stages=2)]

    def build(self, segment: Segment, setting: Setting) -> Run:
        """The kernel of this segment and its launch."""
        program = self.program(segment)
        rows = program.rows
        launch, grid = gemm_launch(program, segment.device, dict(setting))
        places = segment.placeholders
        picked = [places.index(node) for node in (program.x, *(p.weight for p in program.products), *rows.inputs)]

        def run(*inputs: Tensor) -> list[Tensor]:
            beside = program.sides > 1
            stored = list(torch.empty(shape, dtype=dtype, device=device)) if beside else empty_outputs(rows)
            launch(grid, *(inputs[i] for i in picked), *stored)
            return rows.returns(stored, inputs)

        value = program.products[0].node.meta["val"]
        shape, dtype, device = (program.sides, *value.shape), value.dtype, value.device
        run.launches = (launch,)
        return run


def gemm_program(segment: Segment) -> GemmProgram:
    """A linear operator and the memory-intensive ones after it. Raises `Unsupported` for other segments."""
    if segment.kinds[0] is not Kind.COMPUTE or Kind.COMPUTE in segment.kinds[1:] or Kind.ATTENTION in segment.kinds:
        raise Unsupported("one linear operator first and memory-intensive ones after it, this segment differs")
    products = [p for p in map(product_of, segment.computing) if p is not None]
    if len(products) != segment.ops[0].gemms:
        raise Unsupported(f"{segment.ops[0]} is no linear layer")
    x = common_input(products)
    shape = products[0].node.meta["val"].shape
    rows = RowProgram(segment, products[0].node.meta["val"].numel() // shape[-1], shape[-1], lead=lead_of(segment))
    start(rows, products)
    rows.compute([n for n in segment.computing if n not in rows.values])
    rows.store()
    sides = len(products) if _independent(segment, products, rows) else 1
    return GemmProgram(products, x, x.meta["val"].shape[-1], rows, sides)


def _independent(segment: Segment, products: list[Product], rows: RowProgram) -> bool:
    """Whether several products are all that there is, with biases on all of them or on none."""
    biases = {p.bias is None for p in products}
    alone = len(segment.ops) == 1 and rows.outputs == [p.node for p in products]
    alone = alone and len(rows.inputs) in (0, len(products))
    return len(products) > 1 and alone and len(biases) == 1 and len({p.transposed for p in products}) == 1


def lead_of(segment: Segment) -> tuple[int, ...]:
    """The dimensions that count the rows of a segment's results."""
    return tuple(base_of(segment.outputs[-1]).meta["val"].shape[:-1])


def whole_rows(rows: int, wide: int, depth: int, count: int) -> list[Setting]:
    """Settings of a tile that holds whole rows; it cannot be tall, or accumulators spill out of the registers."""
    found = []
    for m, step, warps, stages in ((16, 32, 16, 3), (16, 32, 8, 3), (32, 32, 16, 3), (64, 32, 16, 3), (16, 64, 16, 2)):
        if m <= max(16, power_of_two(rows)) and (m == 16 or m * wide * count <= 32 * 1024):
            step = next((s for s in (64, 32, 16) if depth % s == 0 and s <= step), 16)
            found.append(setting(BM=m, BN=wide, BK=step, warps=warps, stages=stages))
    return list(dict.fromkeys(found))


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
