"""Query, key and value projections with the rotary embedding of queries and keys in the same kernel (Triton).

A tile holds the first and the second halves of some heads as two accumulators, so that a rotation stays inside one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..graph import Kind
from ..segments import Run, Segment
from .base import Setting, TritonTemplate, Unsupported
from .gemm import common_input
from .gemm_source import GROUP, Product, exact, fetch_lines, of_side, product_of, tile_order
from .library import Launch
from .rotary import Rotation, rotation_of, value_of
from .rows import base_of
from .rowwise import indent
from .tiles import candidates, device_of

aten = torch.ops.aten

_KERNEL = """
@triton.jit
def kernel(x_ptr, {pointers}, cos_ptr, sin_ptr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
           GROUP: tl.constexpr, FETCH: tl.constexpr, OVERLAP: tl.constexpr):
    pid = tl.program_id(0)
{order}
    cols = pair // {half} * {dim} + pair % {half}
    near = cols.to(tl.int64)
    ks = tl.arange(0, BK)
{select}
    if OVERLAP:
        if FETCH > 0:
            ahead = tl.arange(0, FETCH) * {line}
            prefetch(weight + near[:, None] * {depth} + tl.minimum(ahead, {depth} - 1)[None, :])
            prefetch(weight + (near + {half})[:, None] * {depth} + tl.minimum(ahead, {depth} - 1)[None, :])
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    rows64 = rows.to(tl.int64)
    x_at = x_ptr + tl.minimum(rows64, M - 1)[:, None] * {depth} + ks[None, :]
    low_at = weight + near[None, :] * {depth} + ks[:, None]
    low = tl.zeros((BM, BN), tl.float32)
    high = tl.zeros((BM, BN), tl.float32)
    for k in range(0, {depth}, BK):
        x = tl.load(x_at + k)
        low = tl.dot(x, tl.load(low_at + k), low{exact})
        high = tl.dot(x, tl.load(low_at + ({half} * {depth} + k)), high{exact})
{biases}
    last = 0  # rows from here on are not turned: all of them in the other products
{turned}
    turn = rows[:, None] < last
    inside = rows[:, None] < M
    table = (rows % {length})[:, None] * {table_stride} + (pair % {half})[None, :]
    cos_low = tl.load(cos_ptr + table, mask=turn, other=1.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + table + {half}, mask=turn, other=1.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + table, mask=turn, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + table + {half}, mask=turn, other=0.0).to(tl.float32)
    at = out + rows64[:, None] * {columns} + cols[None, :]
    tl.store(at, low * cos_low - high * sin_low, mask=inside)
    tl.store(at + {half}, high * cos_high + low * sin_high, mask=inside)
"""


@dataclass
class ProjectionProgram:
    """Products side by side, their common input, and the rotations by the index of the product that they turn."""

    products: list[Product]
    x: fx.Node
    rotations: dict[int, Rotation]

    @property
    def rows(self) -> int:
        """Rows of the input."""
        return self.x.meta["val"].numel() // self.depth

    @property
    def depth(self) -> int:
        """Width of the input."""
        return self.x.meta["val"].shape[-1]

    @property
    def columns(self) -> int:
        """Width of each product."""
        return self.products[0].node.meta["val"].shape[-1]

    @property
    def rotation(self) -> Rotation:
        """One of the rotations; all have its shape and tables."""
        return next(iter(self.rotations.values()))


class ProjectionRotary(TritonTemplate[ProjectionProgram]):
    """Two or three linear layers of one input and rotations of some of their results."""

    name: ClassVar[str] = "projection_rotary"

    def analyse(self, segment: Segment) -> ProjectionProgram:
        """Raises `Unsupported` unless it is a linear operator with several products and rotary embeddings of them."""
        names = [op.name for op in segment.ops]
        if segment.kinds[0] is not Kind.COMPUTE or len(names) < 2 or set(names[1:]) != {"rope"}:
            raise Unsupported("one linear operator and rotary embeddings after it, this segment differs")
        products = [p for p in map(product_of, segment.computing) if p is not None]
        if len(products) != segment.ops[0].gemms or any(p.transposed for p in products):
            raise Unsupported("linear layers with weights (out, in), this segment differs")
        x = common_input(products)
        if len({p.bias is None for p in products}) != 1:
            raise Unsupported("biases on some of the products, allowed: on all or on none")
        index = {p.node: i for i, p in enumerate(products)}
        found = [rotation_of(node) for node in segment.computing if node.target is aten.cat.default]
        rotations = {index.get(base_of(r.x)): r for r in found}
        program = ProjectionProgram(products, x, rotations)
        if None in rotations or len(rotations) != len(found) or not _fits(program):
            raise Unsupported("its rotations are not over the heads of its products by one table")
        results = {r.result for r in found} | set(index)
        if any(base_of(node) not in results for node in segment.outputs):
            raise Unsupported("it returns something else than its products and their rotations")
        turned = {products[i].node for i in rotations}
        if any(base_of(node) in turned for node in segment.outputs):
            raise Unsupported("a product is wanted unrotated as well")
        return program

    def settings(self, segment: Segment) -> list[Setting]:
        """Tiles whose columns are whole halves of heads."""
        program = self.program(segment)
        half, size = program.rotation.x.meta["val"].shape[-1] // 2, program.x.meta["val"].element_size()
        found = candidates(
            program.rows,
            program.columns // 2,
            program.depth,
            2,
            len(program.products),
            size,
            device_of(segment.device),
            most=40,
        )
        values = [(s, dict(s)) for s in found]
        fitting = [
            s
            for s, v in values
            if v["BN"] % half == 0 and program.columns // 2 % v["BN"] == 0 and program.depth % v["BK"] == 0
        ]
        if not fitting:
            raise Unsupported(f"no tile fits {program.columns} columns of depth {program.depth}")
        return fitting[:12]

    def build(self, segment: Segment, setting: Setting) -> Run:
        """The kernel of this segment and its launch."""
        program, values = self.program(segment), dict(setting)
        launch = _launch(program, segment, values)
        count, places = len(program.products), segment.placeholders
        biases = [p.bias for p in program.products if p.bias is not None]
        picked = [places.index(n) for n in (program.x, *(p.weight for p in program.products), *biases)]
        tiles = -(-program.rows // values["BM"]) * (program.columns // 2 // values["BN"]) * count
        value, head = program.products[0].node.meta["val"], program.rotation.x.meta["val"]
        batch, heads, length, dim = head.shape

        def run(*inputs: Tensor) -> list[Tensor]:
            known = dict(zip(places, inputs, strict=True))
            tables = [value_of(t, known) for t in (program.rotation.cos, program.rotation.sin)]
            made = torch.empty((count, *value.shape), dtype=value.dtype, device=value.device)
            launch((tiles,), *(inputs[i] for i in picked), *made, *tables)
            for i, product in enumerate(program.products):
                known[product.node] = made[i]
                if i in program.rotations:
                    turned = made[i].view(batch, length, heads, dim).transpose(1, 2)
                    known[program.rotations[i].result] = turned
            return [value_of(node, known) for node in segment.outputs]

        run.launches = (launch,)
        return run


def _fits(program: ProjectionProgram) -> bool:
    """Whether heads lie side by side in the products, with tables that every batch entry shares."""
    if not program.rotations:
        return False
    r = program.rotation
    head, value = r.x.meta["val"], program.products[0].node.meta["val"]
    if head.dim() != 4 or value.dim() != 3:
        return False
    batch, heads, length, dim = head.shape
    strides = (length * heads * dim, dim, heads * dim, 1)
    if (batch, length, heads * dim) != tuple(value.shape) or dim % 32 or dim & (dim - 1):
        return False
    for other in program.rotations.values():
        shapes = (other.x.meta["val"], other.result.meta["val"])
        if any(t.shape != head.shape or t.stride() != strides for t in shapes):
            return False
        if (other.cos, other.sin) != (r.cos, r.sin):
            return False
    tables = [t.meta["val"] for t in (r.cos, r.sin)]
    return all(
        t.dim() == 4 and tuple(t.shape) == (1, 1, length, dim) and t.stride() == tables[0].stride() and t.stride(3) == 1
        for t in tables
    )


def _launch(program: ProjectionProgram, segment: Segment, values: dict[str, int]) -> Launch:
    count, biased = len(program.products), program.products[0].bias is not None
    dim, length = program.rotation.x.meta["val"].shape[-1], program.rotation.x.meta["val"].shape[2]
    variables = {"weight": "w"} | ({"bias": "b"} if biased else {}) | {"out": "o"}
    pointers = [f"{letter}{i}_ptr" for letter in variables.values() for i in range(count)]
    half = dim // 2
    biases = [
        f"{name} += tl.load(bias + cols + {offset}).to(tl.float32)[None, :]"
        for name, offset in (("low", 0), ("high", half))
    ]
    text = _KERNEL.format(
        pointers=", ".join(pointers),
        columns=program.columns,
        order=indent(tile_order(program.columns // 2, count, "pair")),
        half=half,
        dim=dim,
        depth=program.depth,
        length=length,
        table_stride=program.rotation.cos.meta["val"].stride(2),
        line=128 // program.x.meta["val"].element_size(),
        select=indent(of_side(variables, count)),
        biases=indent(biases if biased else []),
        turned=indent([f"last = tl.where(side == {i}, M, last)" for i in sorted(program.rotations)]),
        exact=exact(program.products[0]),
    )
    constants = {
        "M": program.rows,
        **{name: values[name] for name in ("BM", "BN", "BK")},
        "GROUP": GROUP,
        "FETCH": fetch_lines(program.rows, program.depth, program.products[0], segment.device),
    }
    described = [program.x, *(p.weight for p in program.products)]
    described += [p.bias for p in program.products if biased] + [p.node for p in program.products]
    described += [program.rotation.cos, program.rotation.sin]
    return Launch(text, segment.device, described, constants, values["warps"], values["stages"])
