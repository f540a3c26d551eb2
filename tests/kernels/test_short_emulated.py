"""Hopper's kernels for short calls, the very sources, run lane by lane on the CPU by simt/: clusters, copies and stores between
blocks as late or early as may be."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import pytest
import torch
from emulation import SIMT, emulated_library, hopper_sources
from test_hopper_emulated import assert_right, draw, layout

from stof_kernels.kernels import instances

# What is built, and what could be.
BUILT = {
    unit.tile.shape: unit.tile
    for unit in instances.instances("sm_90a", main_only=True)
    if isinstance(unit.tile, instances.HopperSplitTile)
}
KERNELS = BUILT | {
    "quad_alone": replace(BUILT["hopper_quad"], shares=False),
    "two_share": instances.HopperSplitTile("hopper_split", 64, groups=2, stages=2, shares=True),
}
SHARING = [name for name, tile in KERNELS.items() if tile.shares]
HEADERS = ("common.cuh", "item_order.cuh", "hopper_config.cuh", "hopper_rows.cuh", "hopper_split_config.cuh",
           "hopper_split_join.cuh", "hopper_split.cuh", "hopper_split_run.cuh", "hopper_maps.h", "problem.h")  # fmt: skip
# Two blocks' shared memory, a megabyte apart; descriptors of operands are of the block that uses them.
PATCHES = {
    "ptx.cuh": [
        ("kSharedMemory = 227 * 1024", "kSharedMemory = 2 << 20"),
        ("{ return 0; }", "{ return threadIdx.y << 20; }"),
    ],
    "hopper_ptx.cuh": [
        ("shared_memory + swizzled(address)", "shared_memory + (threadIdx.y << 20) + swizzled(address)")
    ],
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    hopper_sources(folder, HEADERS, KERNELS.values())
    for name, changes in PATCHES.items():
        text = (SIMT / "hopper" / name).read_text(encoding="utf-8")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (folder / name).write_text(text)
    for source in (SIMT / "hopper_short").iterdir():
        (folder / source.name).write_text(source.read_text(encoding="utf-8"))
    return emulated_library(folder, [folder / "hopper_short.cpp"], [folder], "-O1")


@pytest.fixture(params=[(0, 7, 1), (1, 8, 2)], ids=["ascending", "descending"], scope="module")
def emulated(library, request):
    library.set_order(*request.param)
    return library


@pytest.fixture(params=KERNELS)
def kernel(request):
    torch.manual_seed(list(KERNELS).index(request.param))
    return request.param


def attend(library, kernel, q, k, v, keep, units=132, exact=True, scale=None, spare=0, parts=None):
    """``spare``: items launched beyond those that there are; ``parts``: lists are cut in two behind so many tiles."""
    items, col, bits = layout(keep, 64)
    count = len(items)
    if parts is not None:
        items = cut(items, parts)
        count = len(items)
    if spare:
        items = torch.cat([items, torch.full((spare, items.shape[1]), -(1 << 20), dtype=torch.int32)])
    out, lse = torch.full_like(q.transpose(1, 2), math.nan).contiguous(), torch.full(q.shape[:3], math.nan)
    copies, dim = q.shape[0] * q.shape[1], q.shape[3]
    part_out, part_stat = torch.full((count, copies, 64, dim), math.nan), torch.full((count, copies, 64, 2), math.nan)
    header = torch.tensor([count, 0, 0, 0, 0, 0, 0, 0], dtype=torch.int32)
    sizes = [*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], dim, len(items), units, exact]
    ints = torch.tensor(sizes, dtype=torch.int32)
    tensors = (q, k, v, out, lse, header, items, col, bits, part_out, part_stat, ints)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    number, scale = list(KERNELS).index(kernel), ctypes.c_double(dim**-0.5 if scale is None else scale)
    assert library.run(number, *pointers, scale) == 0
    if parts is not None:
        return joined(items, part_out, part_stat, q.shape[2])
    return out.transpose(1, 2), lse


def cut(items, tiles):
    """Every list as two parts, the second perhaps empty; a part's number is its place."""
    pieces = []
    for tile, first, count, _, full, bits, *rest in items.tolist():
        here = min(tiles, count)
        pieces.append([tile, first, here, 0, min(full, here), bits, *rest])
        skipped = max(0, here - full)
        pieces.append([tile, first + here, count - here, 0, max(0, full - here), bits + skipped, *rest])
    pieces.sort(key=lambda piece: -piece[2])
    return torch.tensor([[*piece[:3], number, *piece[4:]] for number, piece in enumerate(pieces)], dtype=torch.int32)


def joined(items, part_out, part_stat, q_len):
    """What the combine kernel makes of the parts (csrc/attention/cuda/combine.cu)."""
    copies, dim = part_out.shape[1], part_out.shape[3]
    rows = -(-q_len // 64) * 64
    out, lse = torch.empty(1, copies, rows, dim), torch.empty(1, copies, rows)
    for tile in range(rows // 64):
        mine = [n for n, item in enumerate(items.tolist()) if item[0] == tile]
        top = part_stat[mine, :, :, 0].amax(0)
        weight = torch.exp2(part_stat[mine, :, :, 0] - top.nan_to_num(neginf=0.0)).double()
        total = (part_stat[mine, :, :, 1] * weight).sum(0)
        sums = (part_out[mine] * weight.unsqueeze(-1)).sum(0)
        here = slice(tile * 64, tile * 64 + 64)
        out[0, :, here] = torch.where(total.unsqueeze(-1) == 0, 0.0, sums / total.unsqueeze(-1))
        lse[0, :, here] = (top + total.log2()) * math.log(2)
    return out[:, :, :q_len].half(), lse[:, :, :q_len]


def test_shared_memory_is_what_the_instances_say(library):
    sizes = [library.shared_bytes(number) for number in range(len(KERNELS))]
    assert sizes == [tile.shared_bytes for tile in KERNELS.values()]


@pytest.mark.parametrize("tiles", [0, 3, 4, 9])
def test_any_number_of_tiles(emulated, kernel, tiles):
    kv_len = max(1, 64 * tiles - 7)
    q, k, v = draw(1, 1, 70, kv_len, 64)
    keep = torch.rand(70, kv_len) < (0.5 if tiles else 0.0)
    keep[:64, : 64 * (tiles // 2)] = True
    assert_right(attend(emulated, kernel, q, k, v, keep), q, k, v, keep)


# Of 4 items all are shared, the longest two, the longest one, none; then there are fewer multiprocessors than items.
@pytest.mark.parametrize("units", [132, 6, 5, 4, 3])
@pytest.mark.parametrize("kernel", SHARING)
def test_as_many_items_are_shared_as_leave_a_multiprocessor_for_each_block(emulated, kernel, units):
    q, k, v = draw(1, 1, 250, 330, 56)
    keep = torch.arange(330) <= torch.arange(250)[:, None] + 80
    keep[100] = False
    assert_right(attend(emulated, kernel, q, k, v, keep, units), q, k, v, keep)


def test_heads_that_share_keys_and_the_same_bits_again(library, kernel):
    library.set_order(0, 7, 2)
    q, k, v = draw(2, 1, 100, 260, 64)
    keep = torch.rand(100, 260) < 0.4
    result = attend(library, kernel, q, k, v, keep)
    assert_right(result, q, k, v, keep)
    library.set_order(1, 99, 0)
    assert torch.equal(result[0], attend(library, kernel, q, k, v, keep)[0])


@pytest.mark.parametrize("units", [132, 7])
def test_blocks_beyond_the_items(emulated, kernel, units):
    q, k, v = draw(1, 1, 130, 300, 64)
    keep = torch.rand(130, 300) < 0.6
    assert_right(attend(emulated, kernel, q, k, v, keep, units, exact=False, spare=2), q, k, v, keep)


def test_rows_that_meet_their_first_key_late(emulated, kernel):
    q, k, v = draw(1, 1, 64, 448, 64)
    k[:, :, 64:] *= torch.linspace(1, 30, 384).half()[:, None]
    keep = torch.rand(64, 448) < 0.5
    for row in range(64):
        keep[row, : row * 448 // 70 * (row % 4 > 0)] = False
    assert_right(attend(emulated, kernel, q, k, v, keep), q, k, v, keep)


@pytest.mark.parametrize("tiles", [2, 5])
def test_parts_of_cut_lists(emulated, kernel, tiles):
    q, k, v = draw(1, 1, 100, 500, 64)
    keep = torch.rand(100, 500) < 0.7
    keep[:64, 64:192] = True
    assert_right(attend(emulated, kernel, q, k, v, keep, parts=tiles), q, k, v, keep)
