"""Matrix products of many rows and the elementwise operators that follow them, fed by tensor maps (Triton, from Hopper on).

One thread asks for a tile where `gemm` has all of them compute addresses. ``blocks`` 0 is a block a tile; else so many blocks
walk through the tiles, so that one tile's results leave while the next one's operands arrive.
"""

from __future__ import annotations

import importlib.util
from typing import ClassVar

import torch
from torch import Tensor

from ..segments import Run, Segment
from .base import Setting, TritonTemplate, Unsupported, setting
from .gemm import GemmProgram, gemm_program
from .gemm_source import GROUP, tile_order
from .library import Launch, Map, arch_of
from .rowwise import empty_outputs, indent, stores
from .tiles import device_of

_ARCH = 90
_FEWEST_ROWS = 1024

_KERNEL = """
@triton.jit
def kernel(x_map, {pointers}, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
           BLOCKS: tl.constexpr, FLAT: tl.constexpr, OVERLAP: tl.constexpr):
    tiles: tl.constexpr = ((M + BM - 1) // BM) * (({columns} + BN - 1) // BN)
    if OVERLAP:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    for pid in tl.range(tl.program_id(0), tiles, BLOCKS, flatten=FLAT):
{order}
{zeros}
        for k in range(0, {depth}, BK):
            x = x_map.load([row0, k])
{products}
        inside = (rows[:, None] < M) & (cols[None, :] < {columns})
        rows64 = rows.to(tl.int64)
{body}
{stores}
"""


class GemmMaps(TritonTemplate[GemmProgram]):
    """One linear layer, or a gate and what it gates, and elementwise operators on the result."""

    name: ClassVar[str] = "gemm_maps"

    def analyse(self, segment: Segment) -> GemmProgram:
        """Raises `Unsupported` for few rows, other types than half precision, norms, and cards before Hopper."""
        program = gemm_program(segment)
        rows, value = program.rows, program.x.meta["val"]
        if segment.device.type == "cuda" and arch_of(segment.device) < _ARCH:
            raise Unsupported("tensor maps need compute capability 9.0")
        if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
            raise Unsupported("this triton has no tensor maps")
        if value.dtype not in (torch.float16, torch.bfloat16):
            raise Unsupported(f"a product of {value.dtype}, allowed: float16, bfloat16")
        if rows.rows < _FEWEST_ROWS or rows.reduces or program.sides > 1:
            raise Unsupported(f"products side by side, a norm, or fewer than {_FEWEST_ROWS} rows")
        if any(p.transposed for p in program.products):
            raise Unsupported("weights (in, out), allowed: (out, in)")
        if program.depth % 8 or rows.columns % 8:
            raise Unsupported(f"{rows.columns} columns of depth {program.depth}, allowed: multiples of 8")
        return program

    def promising(self, segment: Segment) -> bool:
        """Not for a product alone, which is cuBLAS's."""
        return len(segment.ops) > 1

    def settings(self, segment: Segment) -> list[Setting]:
        """Tiles, how deep the pipeline is, and whether blocks stay."""
        program, device = self.program(segment), device_of(segment.device)
        found = []
        for m, n, warps, stages, stay in _TILES:
            wide = n // program.count
            bytes_ = (m + n) * 64 * 2 * stages + (m * n * 2 if stay else 0)
            tiles = -(-program.rows.rows // m) * -(-program.rows.columns // wide)
            if bytes_ <= device.shared and (not stay or tiles > device.multiprocessors):
                blocks = device.multiprocessors if stay else 0
                found.append(setting(BM=m, BN=wide, BK=64, warps=warps, stages=stages, blocks=blocks))
        if not found:
            raise Unsupported("no tile fits into shared memory")
        return found

    def build(self, segment: Segment, setting: Setting) -> Run:
        """The kernel of this segment and its launch."""
        program, values = self.program(segment), dict(setting)
        rows, dtype = program.rows, program.x.meta["val"].dtype
        weights = [p.weight for p in program.products]
        maps = [Map(dtype, (values["BM"], values["BK"])), *[Map(dtype, (values["BN"], values["BK"]))] * len(weights)]
        tiles = -(-rows.rows // values["BM"]) * -(-rows.columns // values["BN"])
        blocks = min(values["blocks"] or tiles, tiles)
        constants = {"M": rows.rows, **{name: values[name] for name in ("BM", "BN", "BK")}}
        constants |= {"GROUP": GROUP, "BLOCKS": blocks, "FLAT": int(bool(values["blocks"]))}
        described = [*maps, *rows.inputs, *rows.outputs]
        launch = Launch(_source(program), segment.device, described, constants, values["warps"], values["stages"])
        places = segment.placeholders
        operands = [places.index(node) for node in (program.x, *weights)]
        picked = [places.index(node) for node in rows.inputs]

        def run(*inputs: Tensor) -> list[Tensor]:
            stored = empty_outputs(rows)
            matrices = [inputs[i].view(-1, inputs[i].shape[-1]) for i in operands]
            mapped = [kind.of(matrix) for kind, matrix in zip(maps, matrices, strict=True)]
            launch((blocks,), *mapped, *(inputs[i] for i in picked), *stored)
            return rows.returns(stored, inputs)

        run.launches = (launch,)
        return run


# Rows and columns of a tile (of all its products together), warps, stages, and whether blocks stay for the next tile.
_TILES = (
    (128, 256, 8, 3, 0),
    (128, 256, 8, 3, 1),
    (128, 128, 8, 3, 0),
    (256, 128, 8, 3, 0),
    (128, 128, 8, 4, 1),
)


def _source(program: GemmProgram) -> str:
    rows, products = program.rows, program.products
    outputs = [*rows.pointers, *(f"o{i}_ptr" for i in range(len(rows.outputs)))]
    count = len(products)
    return _KERNEL.format(
        pointers=", ".join([f"w{i}_map" for i in range(count)] + outputs),
        columns=rows.columns,
        depth=program.depth,
        order=indent(f"    {line}" for line in tile_order(rows.columns, 1)),
        zeros=indent(f"    acc{i} = tl.zeros((BM, BN), tl.float32)" for i in range(count)),
        products=indent(f"        acc{i} = tl.dot(x, w{i}_map.load([col0, k]).T, acc{i})" for i in range(count)),
        body=indent(f"    {line}" for line in (*rows.loads, *rows.lines)),
        stores=indent(f"    {line}" for line in stores(rows)),
    )
