"""A linear layer in two kernels (Triton): its depth is cut into parts that run side by side, a pass over the rows adds them.

Where rows are few, whole products are too few blocks to fill the card; the second pass is where a residual and a norm are
computed anyway. Parts are added in a fixed order, so the result is the same every time.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..segments import Run, Segment
from .base import Setting, TritonTemplate, Unsupported, setting
from .gemm import GemmProgram, gemm_program
from .gemm_source import gemm_launch
from .library import Launch
from .rows import RowProgram
from .rowwise import empty_outputs, row_launch, row_settings
from .tiles import candidates, device_of, power_of_two

_MOST_ROWS = 1024
_FEW_PARTS = 8


class SplitGemm(TritonTemplate[GemmProgram]):
    """One linear layer and the memory-intensive operators after it, for few rows."""

    name: ClassVar[str] = "split_gemm"

    def analyse(self, segment: Segment) -> GemmProgram:
        """Raises `Unsupported` unless it is a linear operator of few rows with memory-intensive ones after it."""
        program = gemm_program(segment)
        if program.rows.rows > _MOST_ROWS or program.depth < 128:
            raise Unsupported(
                f"{program.rows.rows} rows of depth {program.depth}, allowed: up to {_MOST_ROWS} rows, from 128 on"
            )
        if program.sides > 1:
            raise Unsupported("products side by side, allowed: one")
        return program

    def settings(self, segment: Segment) -> list[Setting]:
        """Parts and tiles of the first pass; the second takes a row a block."""
        program = self.program(segment)
        rows, size, device = program.rows, program.x.meta["val"].element_size(), device_of(segment.device)
        found = []
        for parts in (4, 2, 8, 3, 6):
            if program.depth % (parts * 64) == 0:
                tiles = candidates(
                    rows.rows, rows.columns, program.depth // parts, program.count, parts, size, device, most=5
                )
                found += [(i, s, parts) for i, s in enumerate(tiles)]
        second = dict(row_settings(rows)[0])
        return [
            setting(**dict(s), parts=parts, RM=second["BM"], RN=second["BN"], row_warps=second["warps"])
            for _, s, parts in sorted(found, key=lambda f: f[0])
        ] or [
            setting(BM=16, BN=32, BK=16, warps=4, stages=2, parts=2, RM=1, RN=second["BN"], row_warps=second["warps"])
        ]

    def build(self, segment: Segment, setting: Setting) -> Run:
        """The two kernels of this segment and their launches."""
        program, values = self.program(segment), dict(setting)
        rows, parts, count = program.rows, values["parts"], program.count
        first, first_grid = gemm_launch(program, segment.device, values, split=parts)
        second, second_grid = second_pass(rows, segment, values, parts, count)
        places = segment.placeholders
        operands = [places.index(node) for node in (program.x, *(p.weight for p in program.products))]
        picked = [places.index(node) for node in rows.inputs]
        shape = (parts, count, rows.rows, rows.columns)

        def run(*inputs: Tensor) -> list[Tensor]:
            partial = torch.empty(shape, dtype=torch.float32, device=inputs[operands[0]].device)
            first(first_grid, *(inputs[i] for i in operands), partial)
            stored = empty_outputs(rows)
            second(second_grid, partial, *(inputs[i] for i in picked), *stored)
            return rows.returns(stored, inputs)

        run.launches = (first, second)
        return run


def second_pass(
    rows: RowProgram, segment: Segment, values: dict[str, int], parts: int, count: int = 1
) -> tuple[Launch, tuple[int, int]]:
    """The pass over the rows behind partial results (part, accumulator, row, column), its first argument, and its grid.

    More than 8 parts need blocks of one row.
    """
    add = _few if parts <= _FEW_PARTS else _many
    lines = [f"acc{i} = {add(rows, parts, count, i)}" for i in range(count)]
    after = {"BM": values["RM"], "BN": values["RN"], "warps": values["row_warps"]}
    return row_launch(rows, segment, after, [torch.float32], lines)


def _few(rows: RowProgram, parts: int, count: int, i: int) -> str:
    """The sum of the parts of accumulator ``i``, one after the other."""
    planes = (f"({(part * count + i) * rows.rows} + rows64[:, None])" for part in range(parts))
    return " + ".join(f"tl.load(p0_ptr + {p} * {rows.columns} + cols[None, :], mask=inside, other=0.0)" for p in planes)


def _many(rows: RowProgram, parts: int, count: int, i: int) -> str:
    """The same of one row, parts over warps: a thread has no more than about six loads on their way."""
    part = f"tl.arange(0, {power_of_two(parts)})[:, None]"
    at = f"(({part}.to(tl.int64) * {count} + {i}) * {rows.rows} + rows64[:, None]) * {rows.columns} + cols[None, :]"
    return f"tl.sum(tl.load(p0_ptr + {at}, mask=inside & ({part} < {parts}), other=0.0), 0)[None, :]"
