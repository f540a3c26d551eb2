"""The text of two matrix products in a row: whole rows by one block, or a part of the inner width by each block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .gemm_source import Product, exact
from .rows import RowProgram
from .rowwise import indent, stores

_WHOLE = """
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

_PARTS = """
@triton.jit
def kernel(x_ptr, {pointers}, M: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
           FETCH: tl.constexpr, OVERLAP: tl.constexpr):
    part = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    rows64 = rows.to(tl.int64)
    ks = tl.arange(0, BK)
    if OVERLAP:
        # Weights are on their way to L2 while the kernel before this one ends.
        if FETCH:
            start = part * {span}
{fetch}
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    # Rows beyond the end read the last one and are not stored.
    x_at = x_ptr + tl.minimum(rows64, M - 1)[:, None] * {depth} + ks[None, :]
{slices}
    for n in range(0, {columns}, BN):
        outer = n + tl.arange(0, BN)
        total = tl.zeros((BM, BN), tl.float32)
{second}
        tl.store(p_ptr + (part * M + rows64)[:, None] * {columns} + outer[None, :], total,
                 mask=(rows[:, None] < M) & (outer[None, :] < {columns}))
"""

_SLICE = """
cols{j} = (part * {slices} + {j}) * BH + tl.arange(0, BH)
cols = cols{j}
inside = (rows[:, None] < M) & (cols[None, :] < {inner})
{zeros}
for k in range(0, {depth}, BK):
    at = k + ks
    x = tl.load(x_at + k{x_mask})
{products}
{between}
hidden{j} = tl.where(inside, {hidden}, 0.0).to(u_ptr.dtype.element_ty)
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

    @property
    def inner(self) -> int:
        """Width between the two products."""
        return self.between.columns

    @property
    def operands(self) -> list[fx.Node]:
        """What both kernels read of the chain, in the order of their pointers."""
        return [self.x, *(p.weight for p in self.first), *self.between.inputs, self.second.weight]

    @property
    def pointers(self) -> list[str]:
        """Names of the same behind ``x_ptr``."""
        return [*(f"w{i}_ptr" for i in range(len(self.first))), *self.between.pointers, "u_ptr"]

    @property
    def steps(self) -> tuple[int, int]:
        """Strides of the second weight along the inner width and along the columns."""
        return (self.after.columns, 1) if self.second.transposed else (1, self.inner)


def whole_source(program: ChainProgram) -> str:
    """The kernel of which a block walks through the inner width for whole rows."""
    between, after, count = program.between, program.after, len(program.first)
    outputs = [f"o{i}_ptr" for i in range(len(after.outputs))]
    return _WHOLE.format(
        pointers=", ".join([*program.pointers, *after.pointers, *outputs]),
        inner=program.inner,
        columns=after.columns,
        depth=program.depth,
        step_in=program.steps[0],
        step_out=program.steps[1],
        hidden=program.hidden,
        exact=exact(program.second),
        zeros=indent([f"    acc{i} = tl.zeros((BM, BH), tl.float32)" for i in range(count)]),
        products=indent([f"        {line}" for line in _product_lines(program.first, program.inner, program.depth)]),
        between=indent([f"    {line}" for line in (*between.loads, *between.lines)]),
        body=indent([*after.loads, *after.lines]),
        stores=indent(stores(after)),
    )


def _product_lines(products: list[Product], columns: int, depth: int) -> list[str]:
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


def parts_source(program: ChainProgram, values: dict[str, int]) -> str:
    """The kernel of which a block takes so many ``slices`` of the inner width; stores sums as (part, row, column)."""
    columns, span = program.after.columns, values["slices"] * values["BH"]
    kept = program.inner % span == 0
    second = []
    for j in range(values["slices"]):
        at = _tile("u_ptr", f"cols{j}", "outer", *program.steps)
        mask = _mask(
            (f"cols{j}[:, None]", program.inner, kept), ("outer[None, :]", columns, columns % values["BN"] == 0)
        )
        second.append(f"total = tl.dot(hidden{j}, tl.load({at}{mask}), total{exact(program.second)})")
    return _PARTS.format(
        pointers=", ".join([*program.pointers, "p_ptr"]),
        depth=program.depth,
        columns=columns,
        span=span,
        fetch=indent(f"        {line}" for line in _fetch(program, span)),
        slices="\n".join(_slice(program, values, kept, j) for j in range(values["slices"])),
        second=indent(f"    {line}" for line in second),
    )


def _slice(program: ChainProgram, values: dict[str, int], kept: bool, j: int) -> str:
    """Lines that compute slice ``j`` of the inner activation, rounded as the operators apart would round it."""
    between, depth = program.between, program.depth
    deep = ("at[:, None]", depth, depth % values["BK"] == 0)
    products = []
    for i, product in enumerate(program.first):
        at = _tile(f"w{i}_ptr", "at", "cols", *((program.inner, 1) if product.transposed else (1, depth)))
        mask = _mask(deep, ("cols[None, :]", program.inner, kept))
        products.append(f"acc{i} = tl.dot(x, tl.load({at}{mask}), acc{i}{exact(product)})")
    text = _SLICE.format(
        slices=values["slices"],
        j=j,
        inner=program.inner,
        depth=depth,
        zeros="\n".join(f"acc{i} = tl.zeros((BM, BH), tl.float32)" for i in range(len(program.first))),
        x_mask=_mask(("at[None, :]", depth, deep[2])),
        products=indent(products),
        between="\n".join([*between.loads, *between.lines]),
        hidden=program.hidden,
    )
    return indent(line for line in text.splitlines() if line.strip())


def _tile(pointer: str, down: str, across: str, step_down: int, step_across: int) -> str:
    """Addresses of a tile by the index of its rows and of its columns."""
    return f"{pointer} + {down}[:, None].to(tl.int64) * {step_down} + {across}[None, :].to(tl.int64) * {step_across}"


def _mask(*limits: tuple[str, int, bool]) -> str:
    """The mask of a load whose indices have these limits, but for those that tiles divide."""
    found = " & ".join(f"({index} < {limit})" for index, limit, whole in limits if not whole)
    return f", mask={found}, other=0.0" if found else ""


def _fetch(program: ChainProgram, span: int) -> list[str]:
    """Lines that ask for a part's weights, one address a cache line of half precision."""
    inner, columns = program.inner, program.after.columns
    lines = []
    for i, product in enumerate(program.first):
        lines += _ask(f"w{i}_ptr", inner, program.depth, span, down=not product.transposed)
    return lines + _ask("u_ptr", inner, columns, span, down=program.second.transposed)


def _ask(pointer: str, inner: int, other: int, span: int, down: bool) -> list[str]:
    """Prefetches of ``span`` inner columns from ``start`` on, which lie ``down`` the matrix's rows or side by side."""
    rows, columns = (span, other) if down else (other, span)
    first, width, last = ("start", other, inner) if down else ("0", inner, other)
    along = "0" if down else "start"
    return [
        f"down = tl.minimum({first} + tl.arange(0, {_power(rows)}), {last} - 1).to(tl.int64)",
        f"line = tl.minimum({along} + tl.arange(0, {_power(-(-columns // 64))}) * 64, {width} - 1)",
        f"prefetch({pointer} + down[:, None] * {width} + line[None, :])",
    ]


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
