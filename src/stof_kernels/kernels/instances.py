"""Which instantiations of the block-wise CUDA kernel are built, and the small sources that hold them.

One translation unit per shape, head dim and dtype, so that ninja compiles them side by side; a table lists them for the
dispatch in ``csrc/attention/cuda/dispatch.cpp``. The generated files are not in git. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

SHAPES = ("wide", "large", "split", "hopper", "hopper_pair", "hopper_split", "hopper_quad")
"""Names in the order of ``enum class Shape`` in csrc/attention/cuda/problem.h; plan[3] is the index plus one."""

_TYPES = {"fp16": "__half", "bf16": "__nv_bfloat16"}


@dataclass(frozen=True)
class Tile:
    """Template arguments of one instantiation: a group of ``warps`` warps, each with ``blocks`` x 16 query rows."""

    shape: str
    dim: int
    warps: int
    blocks: int
    keys: int
    stages: int
    groups: int
    min_blocks: int

    @property
    def q_tile(self) -> int:
        """Query rows of a block."""
        return self.warps * self.blocks * 16

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block; wide heads keep their queries there too."""
        stage, queries = 2 * self.keys * self.dim * 2, self.q_tile * self.dim * 2
        return self.groups * (self.stages * stage + (queries if self.dim > 128 or queries > stage else 0))


@dataclass(frozen=True)
class Instance:
    """One translation unit: a tile for one dtype, without bias and, where it exists, with."""

    tile: Tile
    dtype: str
    biases: tuple[bool, ...]

    @property
    def name(self) -> str:
        """Stem of the source and of its functions."""
        return f"block_wise_{self.tile.shape}_d{self.tile.dim}_{self.dtype}"

    def function(self, bias: bool) -> str:
        """Launcher of the variant."""
        return f"{self.name}_bias" if bias else self.name

    def source(self) -> str:
        """Text of the translation unit."""
        t = self.tile
        lines = ['#include "attention/cuda/block_wise_run.cuh"', ""]
        for bias in self.biases:
            # A bias costs registers for its addresses: fewer blocks rather than spills.
            floor = max(1, t.min_blocks - 1) if bias else t.min_blocks
            arguments = (t.dim, t.warps, t.blocks, t.keys, t.stages, t.groups, "true" if bias else "false", floor)
            lines.append(
                f"STOF_BLOCK_WISE({self.function(bias)}, {_TYPES[self.dtype]}, {', '.join(map(str, arguments))})"
            )
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class HopperTile:
    """Template arguments of one instantiation of the Hopper kernel: ``sets`` of ``share`` warpgroups, each set with a ring of
    ``slots``; ``registers`` of a thread that multiplies. A slot has the keys of a tile and the values of the tile before if
    ``paired``, else the one or the other."""

    shape: str
    dim: int
    sets: int
    share: int
    slots: int
    registers: int
    paired: bool

    defined_by: ClassVar[tuple[str, str]] = ("hopper_run.cuh", "STOF_HOPPER")
    """Header and macro that define a launcher."""

    @property
    def arguments(self) -> tuple[int | str, ...]:
        """Of the macro, behind name and type."""
        return self.dim, self.sets, self.share, self.slots, self.registers, str(self.paired).lower()

    @property
    def q_tile(self) -> int:
        """Query rows of a work item."""
        return self.share * 64

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: queries, ring and bitmaps of each set, then barriers, and what alignment may take."""
        row = -(-self.dim // 64) * 128
        one = self.q_tile * row + self.slots * ((2 if self.paired else 1) * 64 * row + self.q_tile * 8)
        return self.sets * -(-one // 1024) * 1024 + 1536 + 1024


@dataclass(frozen=True)
class HopperSplitTile:
    """Template arguments of one instantiation of Hopper's kernel for short calls: ``groups`` warpgroups share an item, each has
    room for ``stages`` key tiles, and a multiprocessor for ``blocks`` blocks."""

    shape: str
    dim: int
    groups: int
    stages: int
    blocks: int = 1
    shares: bool = False
    """Blocks are launched in clusters of two, which share the longest items."""

    defined_by: ClassVar[tuple[str, str]] = ("hopper_split_run.cuh", "STOF_HOPPER_SPLIT")
    """Header and macro that define a launcher."""

    @property
    def arguments(self) -> tuple[int | str, ...]:
        """Of the macro, behind name and type."""
        return self.dim, self.groups, self.stages, self.blocks, str(self.shares).lower()

    @property
    def q_tile(self) -> int:
        """Query rows of a work item."""
        return 64

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: each warpgroup's tiles and bitmaps, queries, what another block sends of its rows."""
        dim = -(-self.dim // 64) * 64
        tile, inbox = 64 * dim * 2, 32 * (dim * 4 + 8) if self.shares else 0
        one = self.stages * (2 * tile + 512 + 32) + 64 * 16 + 8
        return self.groups * (-(-one // 1024) * 1024) + tile + inbox + 64 + 1024


@dataclass(frozen=True)
class HopperInstance:
    """One translation unit of a Hopper kernel. None takes a bias: where there is one, another shape runs."""

    tile: HopperTile | HopperSplitTile
    dtype: str
    biases: tuple[bool, ...] = (False,)

    @property
    def name(self) -> str:
        """Stem of the source and of its function."""
        return f"{self.tile.shape}_d{self.tile.dim}_{self.dtype}"

    def function(self, bias: bool) -> str:
        """Launcher; there is one."""
        return self.name

    def source(self) -> str:
        """Text of the translation unit."""
        header, macro = self.tile.defined_by
        arguments = (self.name, _TYPES[self.dtype], *self.tile.arguments)
        return f'#include "attention/cuda/{header}"\n\n{macro}({", ".join(map(str, arguments))})\n'


_TILES = (
    Tile("wide", 32, warps=4, blocks=1, keys=64, stages=2, groups=1, min_blocks=4),
    Tile("wide", 64, warps=4, blocks=1, keys=64, stages=2, groups=1, min_blocks=4),
    Tile("wide", 96, warps=4, blocks=1, keys=64, stages=2, groups=1, min_blocks=3),
    Tile("wide", 128, warps=4, blocks=1, keys=64, stages=2, groups=1, min_blocks=2),
    Tile("wide", 192, warps=4, blocks=1, keys=32, stages=2, groups=1, min_blocks=2),
    Tile("wide", 256, warps=4, blocks=1, keys=32, stages=2, groups=1, min_blocks=2),
    Tile("large", 64, warps=4, blocks=2, keys=64, stages=2, groups=1, min_blocks=2),
    Tile("large", 128, warps=8, blocks=1, keys=64, stages=2, groups=1, min_blocks=1),
    Tile("split", 64, warps=4, blocks=1, keys=64, stages=2, groups=3, min_blocks=1),
    Tile("split", 128, warps=4, blocks=1, keys=64, stages=2, groups=2, min_blocks=1),
)


# Pairs need room for three slots, which 128 dims have only where two warpgroups share a ring.
HOPPER_TILES = (
    HopperTile("hopper", 64, sets=3, share=1, slots=4, registers=152, paired=True),
    HopperTile("hopper", 128, sets=2, share=1, slots=5, registers=224, paired=False),
    HopperTile("hopper_pair", 128, sets=1, share=2, slots=5, registers=224, paired=True),
)
_HOPPER_SPLIT_TILES = (
    HopperSplitTile("hopper_split", 64, groups=2, stages=2, blocks=2),
    HopperSplitTile("hopper_quad", 64, groups=4, stages=2, shares=True),
)


def _for_target(tile: Tile, target: str) -> Tile:
    # A block gets 227 KiB on sm_90a and 99 on sm_89; sm_80's library also runs where there are 99. What does not fit there
    # loads half a tile at a time, in more stages.
    limit = (227 if target == "sm_90a" else 99) * 1024
    return replace(tile, keys=tile.keys // 2, stages=tile.stages + 1) if tile.shared_bytes > limit else tile


def instances(target: str, main_only: bool = False) -> tuple[Instance | HopperInstance, ...]:
    """Translation units of ``target`` (sm_80, sm_89, sm_90a); ``main_only``: head dims 64 and 128 in fp16."""
    found: list[Instance | HopperInstance] = []
    for tile in _TILES:
        for dtype in _TYPES:
            if main_only and (dtype != "fp16" or tile.dim not in (64, 128)):
                continue
            biases = (False,) if tile.shape == "split" else (False, True)
            found.append(Instance(_for_target(tile, target), dtype, biases))
    if target == "sm_90a":
        dtypes = ("fp16",) if main_only else tuple(_TYPES)
        found += [HopperInstance(tile, dtype) for tile in (*HOPPER_TILES, *_HOPPER_SPLIT_TILES) for dtype in dtypes]
    return tuple(found)


def table_source(units: tuple[Instance | HopperInstance, ...]) -> str:
    """Text of the table of all launchers, compiled once per library."""
    entries = [(unit, bias) for unit in units for bias in unit.biases]
    lines = ['#include "attention/cuda/problem.h"', "", "namespace stof::cuda {", ""]
    lines += [
        f"cudaError_t {unit.function(bias)}(const Problem&, const BlockLayout&, cudaStream_t);"
        for unit, bias in entries
    ]
    lines += ["", "const BlockWiseEntry kBlockWiseTable[] = {"]
    for unit, bias in entries:
        flags = f"{str(unit.dtype == 'bf16').lower()}, {str(bias).lower()}"
        lines.append(
            f"    {{Shape::k{unit.tile.shape.title().replace('_', '')}, {unit.tile.dim}, {flags}, &{unit.function(bias)}}},"
        )
    lines += ["};", f"const int kBlockWiseEntries = {len(entries)};", "", "}  // namespace stof::cuda", ""]
    return "\n".join(lines)


def sources(target: str, main_only: bool = False) -> dict[str, str]:
    """Generated files of a target: name -> text."""
    units = instances(target, main_only)
    return {f"{unit.name}.cu": unit.source() for unit in units} | {"block_wise_table.cpp": table_source(units)}
