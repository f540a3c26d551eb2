"""Elementwise chains, and norms with what stands before and after them, in one pass over the rows (Triton)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..graph import Kind
from ..segments import Run, Segment
from .base import Setting, Template, Unsupported, require_triton, setting
from .library import load
from .rows import RowProgram, base_of, describe

_MOST_COLUMNS = 16384  # a row of a norm has to fit into one block's registers

_KERNEL = """
@triton.jit
def kernel({pointers}, M, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows[:, None] < M) & (cols[None, :] < {columns})
    rows64 = rows.to(tl.int64)
{body}
{stores}
"""


class Rowwise(Template):
    """Memory-intensive operators of one shape: residual + LayerNorm or RMSNorm, activations, gates, chains of them."""

    name: ClassVar[str] = "rowwise"

    def check(self, segment: Segment) -> None:
        """Raises `Unsupported` for other operators than memory-intensive ones with a row-wise form."""
        require_triton(segment)
        self.program(segment)

    def program(self, segment: Segment) -> RowProgram:
        """The segment as a row program."""
        if any(kind is not Kind.MEMORY for kind in segment.kinds):
            raise Unsupported("only memory-intensive operators, this segment has others")
        value = base_of(segment.outputs[-1]).meta["val"]
        if not isinstance(value, Tensor) or value.dim() == 0 or not value.is_floating_point():
            raise Unsupported(f"its result {describe(segment.outputs[-1])} is no floating-point tensor with columns")
        columns = value.shape[-1]
        program = RowProgram(segment, value.numel() // max(1, columns), columns)
        program.compute(segment.computing)
        program.store()
        if program.reduces and columns > _MOST_COLUMNS:
            raise Unsupported(f"rows of {columns}, allowed: up to {_MOST_COLUMNS} where a row is reduced")
        return program

    def settings(self, segment: Segment) -> list[Setting]:
        """Rows and columns of a tile and warps; a reduction takes whole rows."""
        program = self.program(segment)
        whole = power_of_two(program.columns)
        if program.reduces:
            tiles = [(rows, whole) for rows in (1, 2, 4, 8) if rows * whole <= 8192 or rows == 1]
        else:
            tiles = [(rows, min(whole, width)) for rows in (1, 4, 16) for width in (256, 1024)]
        found = [setting(BM=m, BN=n, warps=w) for m, n in dict.fromkeys(tiles) for w in (4, 8, 2, 1) if m * n >= 32 * w]
        return found or [setting(BM=1, BN=whole, warps=1)]

    def build(self, segment: Segment, setting: Setting) -> Run:
        """The kernel of this segment and its launch."""
        program, values = self.program(segment), dict(setting)
        pointers = program.pointers + [f"o{i}_ptr" for i in range(len(program.outputs))]
        text = _KERNEL.format(
            pointers=", ".join(pointers),
            columns=program.columns,
            body=indent([*program.loads, *program.lines]),
            stores=indent(stores(program)),
        )
        kernel = load(text).kernel
        grid = (-(-program.rows // values["BM"]), -(-program.columns // values["BN"]))
        picked = [segment.placeholders.index(node) for node in program.inputs]

        def run(*inputs: Tensor) -> list[Tensor]:
            stored = empty_outputs(program)
            kernel[grid](
                *(inputs[i] for i in picked),
                *stored,
                program.rows,
                BM=values["BM"],
                BN=values["BN"],
                num_warps=values["warps"],
            )
            return program.returns(stored, inputs)

        return run


def power_of_two(n: int) -> int:
    """The next power of two from 16 on, the smallest tile that all kernels accept."""
    return max(16, 1 << (n - 1).bit_length())


def stores(program: RowProgram) -> list[str]:
    """Lines that write the program's outputs."""
    return [
        f"tl.store(o{i}_ptr + rows64[:, None] * {program.columns} + cols[None, :], {program.values[node]}, mask=inside)"
        for i, node in enumerate(program.outputs)
    ]


def indent(lines: list[str]) -> str:
    """Lines of a kernel's body."""
    return "\n".join(f"    {line}" for line in lines)


def empty_outputs(program: RowProgram) -> list[Tensor]:
    """Fresh tensors for the program's outputs."""
    values = (node.meta["val"] for node in program.outputs)
    return [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in values]
