"""The Hopper kernel, the very sources, run lane by lane on the CPU by simt/: copies and products as late or early as may be."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from emulation import SIMT, emulated_library, hopper_sources

from stof_kernels.kernels import instances

KERNEL_HEADERS = ("common.cuh", "hopper_config.cuh", "hopper_rows.cuh", "hopper_consumer.cuh", "hopper_producer.cuh",
                  "hopper_run.cuh", "hopper_maps.h", "item_order.cuh", "problem.h")  # fmt: skip
# What is built, and what could be.
BUILT = {f"{tile.shape}_{tile.dim}": tile for tile in instances.HOPPER_TILES}
KERNELS = BUILT | {
    "halved": instances.HopperTile("hopper", 64, 3, 1, slots=7, registers=152, paired=False),
}
ITEM_INTS = 12


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hopper")
    hopper_sources(folder, KERNEL_HEADERS, KERNELS.values())
    for source in (SIMT / "hopper").iterdir():
        (folder / source.name).write_text(source.read_text(encoding="utf-8"))
    return emulated_library(folder, [folder / "hopper.cpp"], [folder], "-O1")


def layout(keep, q_tile):
    """Items, columns and bitmaps of the mask as the kernel reads them, longest items first, each one's full tiles first."""
    q_len, kv_len = keep.shape
    rows = torch.zeros(-(-q_len // q_tile) * q_tile, -(-kv_len // 64) * 64, dtype=torch.bool)
    rows[:q_len, :kv_len] = keep
    found, col, bits = [], [], []
    lane, bit = torch.arange(32)[:, None], torch.arange(32)
    row_of, col_of = lane // 4 + 8 * (bit // 2 % 2), bit // 4 * 8 + lane % 4 * 2 + bit % 2
    for tile, strip in enumerate(rows.split(q_tile)):
        parts = list(enumerate(strip.split(64, 1)))
        full = [k for k, part in parts if part.all()]
        found.append((tile, full, [k for k, part in parts if part.any() and not part.all()]))
    found.sort(key=lambda item: -len(item[1]) - len(item[2]))
    items = []
    for tile, full, partial in found:
        runs = [[16 * run for run in range(4 * k, 4 * k + 4)] for k in full + partial]
        runs = [[start // 16 if start < kv_len else -1 for start in four] for four in runs]
        first = runs[0] if runs else [-1] * 4
        items.append([tile, len(col), len(runs), -1, len(full), len(bits), 0, 0, *first])
        col += runs
        for k in partial:
            part = rows[tile * q_tile : (tile + 1) * q_tile, 64 * k : 64 * k + 64].view(-1, 16, 64)
            bits.append((part[:, row_of, col_of].long() << bit).sum(-1).flatten())
    as_ints = [torch.tensor(x or [[0] * 4], dtype=torch.int32) for x in (items, col)]
    words = torch.stack(bits) if bits else torch.zeros(1, 2 * q_tile, dtype=torch.long)
    # Tensor copies want 16 bytes of alignment, which torch's memory has.
    return *as_ints, torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def attend(library, kernel, q, k, v, keep, blocks=2, counted=False):
    tile, number = KERNELS[kernel], list(KERNELS).index(kernel)
    q_tile = tile.q_tile
    items, col, bits = layout(keep, q_tile)
    assert items.shape[1] == ITEM_INTS
    assert q.shape[-1] <= tile.dim
    out, lse = torch.full_like(q.transpose(1, 2), math.nan).contiguous(), torch.full(q.shape[:3], math.nan)
    sizes = [*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], len(items), q_tile, blocks, counted, 1]
    ints = torch.tensor(sizes, dtype=torch.int32)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (q, k, v, out, lse, items, col, bits, ints)]
    library.run(number, *pointers, ctypes.c_double(q.shape[-1] ** -0.5))
    return out.transpose(1, 2), lse


def assert_right(result, q, k, v, keep):
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = (q.double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~keep, -math.inf)
    lse = scores.logsumexp(-1)
    want = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0) @ v
    assert not result[0].isnan().any()
    assert (result[0].double() - want).norm() <= 7e-4 * want.norm() + 1e-9
    assert torch.equal(result[1].isneginf(), lse.isneginf())
    torch.testing.assert_close(result[1].double()[lse.isfinite()], lse[lse.isfinite()], rtol=1e-5, atol=5e-3)


def draw(heads, kv_heads, q_len, kv_len, dim):
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(1, h, n, dim).half() for h, n in shapes]


@pytest.fixture(params=list(KERNELS))
def kernel(request):
    torch.manual_seed(len(request.param))
    return request.param


@pytest.fixture(params=[(0, 7), (1, 99)], ids=["ascending", "descending"])
def emulated(library, request):
    library.set_order(*request.param)
    return library


def test_shared_memory_is_what_the_instances_say(library):
    sizes = [library.shared_bytes(number) for number in range(len(KERNELS))]
    assert sizes == [tile.shared_bytes for tile in KERNELS.values()]


def masks(q_len, kv_len):
    q, k = torch.arange(q_len)[:, None], torch.arange(kv_len)
    yield k <= q
    thin = torch.rand(q_len, kv_len) < 0.02
    thin[::3], thin[:40, :64] = False, True
    thin[128:192] = False  # an item without tiles
    yield thin


def test_masks_and_many_items_a_block(emulated, kernel):
    q, k, v = draw(2, 1, 333, 273, KERNELS[kernel].dim - 8)
    for keep, counted in zip(masks(333, 273), (False, True), strict=True):
        assert_right(attend(emulated, kernel, q, k, v, keep, counted=counted), q, k, v, keep)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
def test_a_loud_tile_wherever_it_stands(emulated, kernel, tiles):
    q, k, v = draw(1, 1, 128, 64 * tiles - 7, KERNELS[kernel].dim)
    keep = torch.rand(128, 64 * tiles - 7) < 0.8
    keep[:64], keep[70] = True, False
    for loud in range(tiles):
        louder = k.clone()
        louder[:, :, 64 * loud :] *= 12
        louder[:, :, 64 * (loud + 1) : 64 * (loud + 2)] *= 3
        assert_right(attend(emulated, kernel, q, louder, v, keep, blocks=1), q, louder, v, keep)


@pytest.mark.parametrize("tiles", [1, 2])
def test_queries_come_while_the_items_before_are_worked_on(emulated, kernel, tiles):
    """Short items: the producer has nothing left to bring for one when it may bring the queries of the next."""
    kv_len = 64 * tiles - 3
    q, k, v = draw(8, 2, 192, kv_len, KERNELS[kernel].dim)
    keep = torch.rand(192, kv_len) < 0.5
    assert_right(attend(emulated, kernel, q, k, v, keep, blocks=1), q, k, v, keep)
