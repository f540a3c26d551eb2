"""The text of a matrix product's kernel: tiles, what is fetched early, the loop, and where the results go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .library import Launch, arch_of
from .rowwise import indent, stores
from .tiles import power_of_two

if TYPE_CHECKING:
    from .gemm import GemmProgram

aten = torch.ops.aten
_FETCH_ROWS = 512  # up to here a block spends its time waiting for its weights
_LINE = 128  # bytes of a cache line
GROUP = 8  # row tiles that neighbouring blocks take before the next column tile

_ORDER = """
# Neighbouring blocks take neighbouring rows of one column tile, so that weights are read from L2.
tiles_m: tl.constexpr = (M + BM - 1) // BM
tiles_n: tl.constexpr = ({columns} + BN - 1) // BN
width: tl.constexpr = GROUP * tiles_n * {sides}
first = pid // width * GROUP
height = tl.minimum(tiles_m - first, GROUP)
row0 = (first + pid % width % height) * BM
rows = row0 + tl.arange(0, BM)
tile = pid % width // height
side = tile // tiles_n
col0 = tile % tiles_n * BN
{cols} = col0 + tl.arange(0, BN)
"""

_KERNEL = """
@triton.jit
def kernel(x_ptr, {pointers}, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
           SPLIT: tl.constexpr, FETCH: tl.constexpr, OVERLAP: tl.constexpr):
    pid, part = tl.program_id(0), tl.program_id(1)
{order}
    steps: tl.constexpr = ({depth} + BK * SPLIT - 1) // (BK * SPLIT)
    whole_k: tl.constexpr = {depth} % (BK * SPLIT) == 0
    whole_n: tl.constexpr = {columns} % BN == 0
    near = tl.minimum(cols, {columns} - 1).to(tl.int64)
    ks = tl.arange(0, BK)
{select}
    if OVERLAP:
        # Weights are on their way to L2 while the kernel before this one ends.
        if FETCH > 0:
            ahead = part * steps * BK + tl.arange(0, FETCH) * {line}
{fetch}
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    if (M % BM == 0) and whole_n:
        inside = tl.full((BM, BN), True, tl.int1)
    else:
        inside = (rows[:, None] < M) & (cols[None, :] < {columns})
    rows64 = rows.to(tl.int64)
    # Rows and columns beyond the end read the last ones and are not stored.
    x_at = x_ptr + tl.minimum(rows64, M - 1)[:, None] * {depth} + ks[None, :]
{bases}
{zeros}
    for step in range(steps):
        k = (part * steps + step) * BK
        if whole_k:
            x = tl.load(x_at + k)
        else:
            x = tl.load(x_at + k, mask=(k + ks)[None, :] < {depth}, other=0.0)
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


def gemm_launch(
    program: GemmProgram, device: torch.device, values: dict[str, int], split: int = 1
) -> tuple[Launch, tuple[int, int]]:
    """The launch of a program and its grid. With ``split`` > 1 or its partial results wanted (0: one part), see `_source`."""
    parts, rows = max(1, split), program.rows
    source = _source(program, partial=split != 1)
    tiles_m = -(-rows.rows // values["BM"])
    span = -(-program.depth // (values["BK"] * parts)) * values["BK"]
    constants = {
        "M": rows.rows,
        **{name: values[name] for name in ("BM", "BN", "BK")},
        "GROUP": GROUP,
        "SPLIT": parts,
        "FETCH": fetch_lines(rows.rows, span, program.products[0], device),
    }
    pointers: list[Any] = [program.x, *(p.weight for p in program.products)]
    pointers += [torch.float32] if split != 1 else [*rows.inputs, *rows.outputs]
    launch = Launch(source, device, pointers, constants, values["warps"], values["stages"])
    return launch, (tiles_m * -(-rows.columns // values["BN"]) * program.sides, parts)


def fetch_lines(rows: int, span: int, product: Product, device: torch.device) -> int:
    """Addresses to ask for ahead, per column of a weight (out, in) or in all; 0 where rows are many or kernels interpreted."""
    if rows > _FETCH_ROWS or not arch_of(device):
        return 0
    return power_of_two(span if product.transposed else -(-span * product.x.meta["val"].element_size() // _LINE))


def tile_order(columns: int, sides: int, cols: str = "cols") -> list[str]:
    """Lines that find the ``rows``, ``side`` and columns of tile ``pid``, for products of so many columns side by side."""
    return _ORDER.format(columns=columns, sides=sides, cols=cols).strip().splitlines()


def of_side(names: dict[str, str], sides: int) -> list[str]:
    """Lines that give each variable the pointer of its block's side; pointers are called by a letter and the side."""
    lines = [f"{variable} = {letter}0_ptr" for variable, letter in names.items()]
    for side in range(1, sides):
        lines += [
            f"if side == {side}:",
            *(f"    {variable} = {letter}{side}_ptr" for variable, letter in names.items()),
        ]
    return lines


def _source(program: GemmProgram, partial: bool) -> str:
    """The kernel's text; a partial one stores float32 sums of its part of the depth as (part, side, row, column)."""
    rows, products = program.rows, program.products
    count, sides, columns, depth = program.count, program.sides, rows.columns, program.depth
    weights = [f"w{i}_ptr" for i in range(len(products))]
    outputs = ["p_ptr"] if partial else [*rows.pointers, *(f"o{i}_ptr" for i in range(len(rows.outputs)))]
    element = program.x.meta["val"].element_size()
    return _KERNEL.format(
        pointers=", ".join(weights + outputs),
        columns=columns,
        depth=depth,
        order=indent(tile_order(columns, sides)),
        line=1 if products[0].transposed else _LINE // element,
        select=indent(_select(program, partial)),
        fetch=indent([f"        {line}" for i in range(count) for line in _fetch(i, products[i], columns, depth)]),
        bases=indent([_base(i, products[i], columns, depth) for i in range(count)]),
        zeros=indent([f"acc{i} = tl.zeros((BM, BN), tl.float32)" for i in range(count)]),
        products=indent([f"    {line}" for i in range(count) for line in _step(i, products[i], columns, depth)]),
        body="" if partial else indent(_side_body(program) if sides > 1 else [*rows.loads, *rows.lines]),
        stores=indent(_partial_stores(program) if partial else _side_store(columns) if sides > 1 else stores(rows)),
    )


def _select(program: GemmProgram, partial: bool) -> list[str]:
    """Lines that pick the tensors of this block's side."""
    if program.sides == 1:
        return [f"weight{i} = w{i}_ptr" for i in range(program.count)]
    names = {"weight0": "w"}
    if not partial:
        names |= {"out": "o"} | ({"bias": "i"} if program.products[0].bias is not None else {})
    return of_side(names, program.sides)


def _fetch(i: int, product: Product, columns: int, depth: int) -> list[str]:
    """Ask for this block's weights: one address a cache line."""
    if product.transposed:
        return [
            f"row = tl.minimum(ahead, {depth} - 1).to(tl.int64)[:, None] * {columns}",
            "edge: tl.constexpr = (BN + 63) // 64",
            "line = tile % tiles_n * BN + tl.arange(0, edge) * 64",
            f"prefetch(weight{i} + row + tl.minimum(line, {columns} - 1)[None, :])",
        ]
    return [f"prefetch(weight{i} + near[:, None] * {depth} + tl.minimum(ahead, {depth} - 1)[None, :])"]


def _base(i: int, product: Product, columns: int, depth: int) -> str:
    """Addresses of the weights' tile at depth 0."""
    if product.transposed:
        return f"w{i}_at = weight{i} + ks.to(tl.int64)[:, None] * {columns} + cols[None, :]"
    return f"w{i}_at = weight{i} + near[None, :] * {depth} + ks[:, None]"


def _step(i: int, product: Product, columns: int, depth: int) -> list[str]:
    """Load the weights' tile at depth ``k`` and add its product with ``x``."""
    at = f"w{i}_at + k.to(tl.int64) * {columns}" if product.transposed else f"w{i}_at + k"
    whole = "whole_k and whole_n" if product.transposed else "whole_k"
    return [
        f"if {whole}:",
        f"    w{i} = tl.load({at})",
        "else:",
        f"    w{i} = tl.load({at}, mask=((k + ks)[:, None] < {depth}) & (cols[None, :] < {columns}), other=0.0)",
        f"acc{i} = tl.dot(x, w{i}, acc{i}{exact(product)})",
    ]


def _side_body(program: GemmProgram) -> list[str]:
    if program.products[0].bias is None:
        return []
    return [f"acc0 += tl.load(bias + cols, mask=cols < {program.rows.columns}, other=0.0).to(tl.float32)[None, :]"]


def _side_store(columns: int) -> list[str]:
    return [f"tl.store(out + rows64[:, None] * {columns} + cols[None, :], acc0, mask=inside)"]


def _partial_stores(program: GemmProgram) -> list[str]:
    columns, planes = program.rows.columns, len(program.products)
    return [
        f"tl.store(p_ptr + ((part * {planes} + {'side' if program.sides > 1 else i}).to(tl.int64) * M + rows64[:, None]) * "
        f"{columns} + cols[None, :], acc{i}, mask=inside)"
        for i in range(program.count)
    ]


def exact(product: Product) -> str:
    """float32 products are exact; half precision accumulates in float32 either way."""
    return ', input_precision="ieee"' if product.x.meta["val"].dtype == torch.float32 else ""
