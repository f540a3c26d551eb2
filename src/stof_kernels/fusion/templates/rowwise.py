"""Elementwise chains, and norms with what stands before and after them, in one pass over the rows (Triton)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..graph import Kind
from ..segments import Run, Segment
from .base import Setting, TritonTemplate, Unsupported, setting
from .library import Launch
from .rows import RowProgram, base_of, describe
from .tiles import power_of_two

_MOST_COLUMNS = 16384  # a row of a norm has to fit into one block's registers

_KERNEL = """
@triton.jit
def kernel({pointers}, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    if (M % BM == 0) and ({columns} % BN == 0):
        inside = tl.full((BM, BN), True, tl.int1)
    else:
        inside = (rows[:, None] < M) & (cols[None, :] < {columns})
    rows64 = rows.to(tl.int64)
    if OVERLAP:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
{body}
{stores}
"""


class Rowwise(TritonTemplate[RowProgram]):
    """Memory-intensive operators of one shape: residual + LayerNorm or RMSNorm, activations, gates, chains of them."""

    name: ClassVar[str] = "rowwise"

    def analyse(self, segment: Segment) -> RowProgram:
        """Raises `Unsupported` for other operators than memory-intensive ones with a row-wise form."""
        if any(kind is not Kind.MEMORY for kind in segment.kinds):
            raise Unsupported("only memory-intensive operators, this segment has others")
        value = base_of(segment.outputs[-1]).meta["val"]
        if not isinstance(value, Tensor) or value.dim() == 0 or not value.is_floating_point():
            raise Unsupported(f"its result {describe(segment.outputs[-1])} is no floating-point tensor with columns")
        columns = value.shape[-1]
        program = RowProgram(segment, value.numel() // max(1, columns), columns, lead=tuple(value.shape[:-1]))
        program.compute(segment.computing)
        program.store()
        if program.reduces and columns > _MOST_COLUMNS:
            raise Unsupported(f"rows of {columns}, allowed: up to {_MOST_COLUMNS} where a row is reduced")
        return program

    def settings(self, segment: Segment) -> list[Setting]:
        """Rows and columns of a tile and warps; a reduction takes whole rows."""
        return row_settings(self.program(segment))

    def build(self, segment: Segment, setting: Setting) -> Run:
        """The kernel of this segment and its launch."""
        program = self.program(segment)
        launch, grid = row_launch(program, segment, dict(setting))
        picked = [segment.placeholders.index(node) for node in program.inputs]

        def run(*inputs: Tensor) -> list[Tensor]:
            stored = empty_outputs(program)
            launch(grid, *(inputs[i] for i in picked), *stored)
            return program.returns(stored, inputs)

        run.launches = (launch,)
        return run


def row_settings(program: RowProgram) -> list[Setting]:
    """Rows and columns of a tile and warps."""
    whole = power_of_two(program.columns)
    if program.reduces:
        tiles = [(rows, whole) for rows in (1, 2, 4) if rows * whole <= 8192 or rows == 1]
    else:
        tiles = [(rows, min(whole, 1024)) for rows in (1, 4, 2)]
    found = [(m, n, w) for m, n in tiles for w in (4, 2, 1, 8) if 32 * w <= m * n <= 1024 * w]
    found.sort(key=lambda f: abs(math.log2(f[0] * f[1] / (256 * f[2]))))  # eight elements a thread are one wide load
    return [setting(BM=m, BN=n, warps=w) for m, n, w in dict.fromkeys(found)] or [setting(BM=1, BN=whole, warps=1)]


def row_launch(
    program: RowProgram, segment: Segment, values: dict[str, int], before: Sequence[Any] = (), lines: Sequence[str] = ()
) -> tuple[Launch, tuple[int, int]]:
    """The launch of a row program and its grid.

    ``before`` describes pointers ``p0_ptr``, ... in front of the program's own, and ``lines`` read from them.
    """
    names = [f"p{i}_ptr" for i in range(len(before))] + program.pointers
    text = _KERNEL.format(
        pointers=", ".join([*names, *(f"o{i}_ptr" for i in range(len(program.outputs)))]),
        columns=program.columns,
        body=indent([*lines, *program.loads, *program.lines]),
        stores=indent(stores(program)),
    )
    constants = {"M": program.rows, "BM": values["BM"], "BN": values["BN"]}
    described = [*before, *program.inputs, *program.outputs]
    launch = Launch(text, segment.device, described, constants, values["warps"])
    return launch, (-(-program.rows // values["BM"]), -(-program.columns // values["BN"]))


def stores(program: RowProgram) -> list[str]:
    """Lines that write the program's outputs."""
    return [
        f"tl.store(o{i}_ptr + rows64[:, None] * {program.columns} + cols[None, :], {program.values[node]}, mask=inside)"
        for i, node in enumerate(program.outputs)
    ]


def indent(lines: Iterable[str]) -> str:
    """Lines of a kernel's body."""
    return "\n".join(f"    {line}" for line in lines)


def empty_outputs(program: RowProgram) -> list[Tensor]:
    """Fresh tensors for the program's outputs."""
    values = (node.meta["val"] for node in program.outputs)
    return [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in values]
