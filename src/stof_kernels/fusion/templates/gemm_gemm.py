"""Two matrix products in a row, as in a feed-forward block, whose inner activation never leaves the multiprocessor (Triton).

Where rows are few, the inner width is cut into parts that run side by side: a block computes its rows of one part, multiplies
them with the second weight's share and stores float32 sums; a pass over the rows adds the parts in a fixed order and computes
what follows, so the result is the same every time. Where rows are many, a block owns whole rows and walks through the inner
width alone (``parts`` 1).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..graph import Kind
from ..segments import Run, Segment
from .base import Setting, TritonTemplate, Unsupported, setting
from .chain_tiles import Chain
from .gemm import common_input, lead_of, require_contiguous, start
from .gemm_gemm_source import ChainProgram, parts_source, whole_source
from .gemm_source import product_of
from .library import Launch
from .rows import RowProgram, through_views
from .rowwise import empty_outputs
from .split_gemm import second_pass
from .tiles import Device, device_of, power_of_two

_MOST_WIDE = 1024  # columns of the result that one block accumulates
_MOST_NORMED = 4096  # columns of a row that the pass over partial results normalises
_MOST_ROWS = 2048  # beyond, two products of larger tiles take a fraction of its time
_FETCH_ROWS = 512  # up to here a block spends its time waiting for its weights


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
        if power_of_two(columns) > _MOST_WIDE and (inner <= 16 or (after.reduces and columns > _MOST_NORMED)):
            raise Unsupported(
                f"{inner} columns between the products and {columns} behind them, allowed: up to {_MOST_WIDE} behind them, or "
                f"from 17 on between and no norm over more than {_MOST_NORMED}"
            )
        return ChainProgram(first, x, x.meta["val"].shape[-1], between, between.values[hidden], last, after)

    def promising(self, segment: Segment) -> bool:
        """Where rows are few and weights dominate."""
        return self.program(segment).after.rows <= _MOST_ROWS

    def settings(self, segment: Segment) -> list[Setting]:
        """Parts of the inner width and tiles of both products, best guess first; whole rows where rows are many."""
        program, device = self.program(segment), device_of(segment.device)
        after, size = program.after, program.x.meta["val"].element_size()
        chain = Chain(after.rows, program.depth, program.inner, after.columns, len(program.first), size)
        apart = chain.settings(device)
        whole = _whole_rows(program, size, device) if after.rows > _MOST_ROWS or not apart else []
        return [setting(**dict(s), **_second(after, dict(s)["parts"])) for s in apart] + whole

    def build(self, segment: Segment, setting: Setting) -> Run:
        """The kernels of this segment and their launches."""
        values = dict(setting)
        return self._in_parts(segment, values) if values["parts"] > 1 else self._whole(segment, values)

    def _whole(self, segment: Segment, values: dict[str, int]) -> Run:
        program = self.program(segment)
        after = program.after
        nodes = [*program.operands, *after.inputs]
        picked = [segment.placeholders.index(node) for node in nodes]
        constants = {"M": after.rows, **{name: values[name] for name in ("BM", "BH", "BN", "BK")}}
        launch = Launch(whole_source(program), segment.device, [*nodes, *after.outputs], constants, values["warps"], 2)
        grid = (-(-after.rows // values["BM"]),)

        def run(*inputs: Tensor) -> list[Tensor]:
            stored = empty_outputs(after)
            launch(grid, *(inputs[i] for i in picked), *stored)
            return after.returns(stored, inputs)

        run.launches = (launch,)
        return run

    def _in_parts(self, segment: Segment, values: dict[str, int]) -> Run:
        program, parts, places = self.program(segment), values["parts"], segment.placeholders
        after = program.after
        constants = {"M": after.rows, **{name: values[name] for name in ("BM", "BH", "BN", "BK")}}
        constants["FETCH"] = int(after.rows <= _FETCH_ROWS)
        described = [*program.operands, torch.float32]
        first = Launch(
            parts_source(program, values), segment.device, described, constants, values["warps"], values["stages"]
        )
        first_grid = (-(-after.rows // values["BM"]), parts)
        second, second_grid = second_pass(after, segment, values, parts)
        operands = [places.index(node) for node in program.operands]
        picked = [places.index(node) for node in after.inputs]
        shape = (parts, after.rows, after.columns)

        def run(*inputs: Tensor) -> list[Tensor]:
            partial = torch.empty(shape, dtype=torch.float32, device=inputs[operands[0]].device)
            first(first_grid, *(inputs[i] for i in operands), partial)
            stored = empty_outputs(after)
            second(second_grid, partial, *(inputs[i] for i in picked), *stored)
            return after.returns(stored, inputs)

        run.launches = (first, second)
        return run


def _second(after: RowProgram, parts: int) -> dict[str, int]:
    """Rows, columns and warps of the pass that adds the parts: a row a block, eight wide loads a thread."""
    wide = power_of_two(after.columns)
    columns = wide if after.reduces else min(wide, 1024)
    loads = columns * (1 << (parts - 1).bit_length()) // 4  # of four numbers each
    return {"RM": 1, "RN": columns, "row_warps": min(16, max(1, loads // 256))}


def _whole_rows(program: ChainProgram, size: int, device: Device) -> list[Setting]:
    """Rows of a block, width of an inner step, depth of a step, warps; none where a row does not fit into a block."""
    wide = power_of_two(program.after.columns)
    if wide > _MOST_WIDE:
        return []
    return [
        setting(parts=1, BM=m, BH=h, BK=k, BN=wide, warps=8)
        for m in (16, 32, 64)
        for h, k in ((32, 64), (64, 32), (16, 32))
        if m * wide <= 64 * 512 and (m * (k + h) + h * k * len(program.first) + h * wide) * size * 2 <= device.shared
    ] or [setting(parts=1, BM=16, BH=16, BK=16, BN=wide, warps=8)]
