"""The CUDA builders of the format, the very sources, run lane by lane on the CPU by simt/simt.h: equal to what they mean."""

from __future__ import annotations

import ctypes
import heapq
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from emulation import SIMT, emulated_library
from mask_lists import list_lengths, unpack_layout

from stof_kernels import SparseMask
from stof_kernels.formats import cells
from stof_kernels.provenance import PACKAGE_ROOT

CSRC = PACKAGE_ROOT / "kernels/csrc"
SOURCES = tuple(f"format/cuda/{name}.cu" for name in ("build_cells", "build_blocks", "build_layout", "schedule"))
LAUNCH = re.compile(r"(\w+(?:<true>|<false>)?)<<<(.+?), ([^,]+?), [^,]+?, stream>>>\((.*?)\);")
SHARED = "uint32_t* const bitmaps = reinterpret_cast<uint32_t*>(simt::state().dynamic_shared.get());"


def as_plain_cpp(source: str) -> str:
    """Launches as calls of the emulator, dynamic shared memory as a pointer to its own."""
    source = LAUNCH.sub(r"simt::launch({unsigned(\2)}, {unsigned(\3)}, [=] { \1(\4); });", source)
    assert "<<<" not in source
    return source.replace("extern __shared__ uint32_t bitmaps[];", SHARED)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("format")
    units = [SIMT / "format.cpp"]
    for name in SOURCES:
        units.append(folder / f"{Path(name).stem}.cpp")
        units[-1].write_text(as_plain_cpp((CSRC / name).read_text(encoding="utf-8")))
    return emulated_library(folder, units, [CSRC, CSRC / "format/cuda"], "-O1")


@pytest.fixture(params=["ascending", "descending"])
def emulated(library, request):
    library.set_descending(request.param == "descending")
    return library


def call(function, *args):
    """Arrays as pointers to their data, integers as 32 bits unless they come as 64."""
    return function(*[ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args])


def int32(*shape):
    return torch.full(shape, -7, dtype=torch.int32)


def buffers(strips, n_cells, n_bits):
    bits, counts = torch.full((n_bits, 16), -7, dtype=torch.int16), torch.full((4,), -7)
    return int32(strips + 1), int32(n_cells), int32(n_cells), bits, counts


def build_cells(emulated, keep, n_cells, n_bits):
    planes, (q_len, kv_len) = keep.shape[0] * keep.shape[1], keep.shape[2:]
    strips = planes * cells.n_strips(q_len)
    lists = buffers(strips, n_cells, n_bits)
    words = torch.zeros(strips, cells.n_cols(kv_len), 16, dtype=torch.int16)
    capacity = ctypes.c_int64(n_cells), ctypes.c_int64(n_bits)
    call(emulated.build_cells, keep, planes, q_len, kv_len, words, int32(strips, 4), *lists, *capacity)
    return lists


def build_blocks(emulated, table, block, q_len, kv_len, n_cells, n_bits):
    planes, rows = table.shape[0] * table.shape[1], table.shape[2]
    lists = buffers(planes * cells.n_strips(q_len), n_cells, n_bits)
    scratch = int32(planes * rows, 4), int32(planes * rows + 1)
    wide = torch.nn.functional.pad(table, (0, 3), value=True)  # what lies between the rows is not the table's
    capacity = ctypes.c_int64(n_cells), ctypes.c_int64(n_bits)
    call(emulated.build_blocks, wide, planes, wide.shape[3], q_len, kv_len, block, *scratch, *lists, *capacity)
    return lists


def assert_same(lists, mask):
    n, n_bits = mask.counts[:2].tolist()
    assert torch.equal(lists[4], mask.counts)
    assert torch.equal(lists[0], mask.strip_ptr)
    assert torch.equal(lists[1][:n], mask.cell_col[:n])
    assert torch.equal(lists[2][:n], mask.cell_slot[:n])
    assert torch.equal(lists[3][:n_bits], mask.cell_bits[:n_bits])
    assert (lists[1][n:] == -7).all()
    assert (lists[3][n_bits:] == -7).all()


def random_mask(*shape, share=0.2, seed=0):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    keep[..., : shape[2] // 3, : shape[3] // 2] = True
    keep[..., shape[2] // 2 : shape[2] // 2 + 20, :] = False
    return keep


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 70, 133), (1, 2, 33, 320), (1, 1, 9, 0)])
def test_dense_lists(emulated, shape):
    keep = random_mask(*shape)
    mask = SparseMask.from_dense(keep)
    n, n_bits = mask.counts[:2].tolist()
    assert_same(build_cells(emulated, keep, n + 5, n_bits + 5), mask)
    if n > 1:
        assert build_cells(emulated, keep, n - 1, n_bits)[4][3] == 1


@pytest.mark.parametrize("planes", [(1, 1), (2, 3)])
@pytest.mark.parametrize(
    ("block", "q_len", "kv_len"),
    [(64, 256, 256), (64, 200, 272), (16, 33, 48), (32, 1, 16), (128, 130, 410), (64, 100, 2090)],
)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_block_lists(emulated, planes, block, q_len, kv_len, share):
    table = torch.rand(*planes, -(-q_len // block), -(-kv_len // block)) < share
    mask = SparseMask.from_blocks(table, block, q_len, kv_len)
    n, n_bits = mask.counts[:2].tolist()
    assert_same(build_blocks(emulated, table, block, q_len, kv_len, n + 5, n_bits + 5), mask)
    if n:
        lists = build_blocks(emulated, table, block, q_len, kv_len, n - 1, n_bits)
        assert lists[4][3] == 1
        assert int(lists[0].max()) <= n - 1


def test_scans_of_several_rounds(emulated):
    table = torch.rand(1, 1, 9000, 2) < 0.5
    mask = SparseMask.from_blocks(table, 16, 9000 * 16, 32)
    n = int(mask.counts[0])
    assert_same(build_blocks(emulated, table, 16, 9000 * 16, 32, n, 1), mask)


def build_layout(emulated, mask, q_tile, chunk, copies, room=None, slots=528):
    planes, query_tiles = mask.batch * mask.heads, mask.batch * mask.heads * -(-mask.q_len // q_tile)
    tiles = query_tiles * -(-mask.kv_len // 64)
    combines, tiles, items, bit_tiles = room or (tiles, tiles, query_tiles + tiles, tiles)
    layout = int32(8 + 4 * combines), int32(tiles, 4), int32(items, 12), int32(bit_tiles, 2 * q_tile)
    sizes = torch.tensor([combines, tiles, items, bit_tiles])
    counts = mask.counts.clone()
    lists = mask.strip_ptr, mask.cell_col, mask.cell_slot, mask.cell_bits, counts
    shape = planes, mask.q_len, mask.kv_len, q_tile, chunk, copies, slots
    words = -(-mask.kv_len // 512)
    call(emulated.build_layout, *lists, *shape, int32(query_tiles * (8 + 2 * words)), *layout, sizes)
    return layout, counts


@pytest.mark.parametrize(
    ("shape", "q_tile", "chunk"),
    [((1, 1, 150, 300), 64, 2), ((1, 1, 150, 300), 128, 0), ((2, 2, 70, 133), 64, 0), ((2, 2, 70, 133), 128, -1),
     ((1, 1, 130, 1100), 64, -1), ((1, 1, 130, 1100), 128, 2), ((1, 1, 20, 131_200), 64, 0)],
)  # fmt: skip
def test_layout_holds_the_mask(emulated, shape, chunk, q_tile):
    keep = random_mask(*shape, share=0.02)
    keep[..., 2000:129_000] = False  # longer rows are mostly empty, so that this stays quick
    (ptr, col, items, bits), counts = build_layout(emulated, SparseMask.from_dense(keep), q_tile, chunk, 3, slots=12)
    dense, lengths = unpack_layout((ptr, col, items, bits), keep.shape, q_tile)
    assert torch.equal(dense, keep)
    order = list_lengths((ptr, col, items))
    assert order == sorted(order, reverse=True)
    assert chunk != 0 or lengths == order
    assert chunk < 1 or max(lengths) <= chunk
    assert ptr[6] == 0
    assert counts[3] == 0
    assert ptr[5] == max(lengths)


def pieces_of(tile_lengths, chunk):
    """(length, items that it is cut into) of every query tile."""
    return [(length, max(1, -(-length // chunk))) for length in tile_lengths]


def plain_schedule(tile_lengths, chunk):
    """{query tile: (first item, items, length of each)} and parts, by the rule: longest first, equal ones in order."""
    pieces = [(tile, n, -(-length // n)) for tile, (length, n) in enumerate(pieces_of(tile_lengths, chunk))]
    order = sorted(pieces, key=lambda p: -p[2])  # stable
    first, at = {}, 0
    for tile, n, _ in order:
        first[tile], at = at, at + n
    return first, at, sum(n for _, n, _ in pieces if n > 1), sum(n > 1 for _, n, _ in pieces)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize(
    ("planes", "tiles", "longest"), [(1, 1, 30), (1, 1, 0), (3, 13, 12), (1, 1100, 9), (2, 1150, 400), (1, 300, 1400)]
)
def test_items_are_in_the_promised_order(emulated, planes, tiles, longest, chunk):
    rng = np.random.default_rng(tiles)
    n = planes * tiles
    lengths = np.where(rng.random(n) < 0.2, rng.integers(0, longest + 1, n), longest // 2)
    full = np.minimum(rng.integers(0, longest + 1, n), lengths)
    first, total, parts, combines = plain_schedule(lengths.tolist(), chunk or 1 << 30)
    scratch, header, items = int32(n, 8), int32(8 + 4 * combines), int32(total, 12)
    scratch[:, 0], scratch[:, 1] = torch.from_numpy(lengths), torch.from_numpy(full)
    sizes, counts = torch.tensor([combines, int(lengths.sum()), total, int((lengths - full).sum())]), torch.zeros(4)
    call(emulated.schedule, planes, tiles * 64, chunk, 1, 528, scratch, counts.long(), header, items, sizes)
    longest_item = min(lengths.max(), chunk or lengths.max())
    sums = [total, parts, combines, lengths.sum(), (lengths - full).sum(), longest_item, 0]
    assert header[:7].tolist() == sums
    # The leading items are those longer than twice the mean, the parts of a cut list as long as its longest.
    item_lengths = np.repeat(*np.array([(-(-length // n), n) for length, n in pieces_of(lengths, chunk or 1 << 30)]).T)
    leading = (item_lengths > 2 * lengths.sum() // total).sum()
    assert header[7] == leading if longest_item < 512 else header[7] <= leading
    starts, slots, part, cuts = (
        np.cumsum([0, *lengths]),
        np.cumsum([0, *(lengths - full)]),
        0,
        header[8:].view(-1, 4).tolist(),
    )
    if longest_item < 512:  # longer ones share places in the order
        assert scratch[:, 4].tolist() == [first[i] for i in range(n)]
    assert sorted(i for at, count in scratch[:, 4:6].tolist() for i in range(at, at + count)) == list(range(total))
    for i in range(n):
        at, count = scratch[i, 4:6].tolist()
        mine, begins = items[at : at + count], np.cumsum([0, *items[at : at + count, 2].tolist()])
        assert begins[-1] == lengths[i]
        assert mine[:, 2].max() - mine[:, 2].min() <= 1
        assert mine[:, 0].tolist() == [i % tiles] * count
        assert mine[:, 6].tolist() == [i // tiles] * count
        assert mine[:, 1].tolist() == (starts[i] + begins[:-1]).tolist()
        assert mine[:, 4].tolist() == np.clip(full[i] - begins[:-1], 0, mine[:, 2].numpy()).tolist()
        assert mine[:, 5].tolist() == (slots[i] + np.maximum(begins[:-1] - full[i], 0)).tolist()
        if count == 1:
            assert mine[0, 3] == -1
            continue
        assert mine[:, 3].tolist() == list(range(part, part + count))
        assert cuts.pop(0) == [i % tiles, part, count, i // tiles]
        part += count


@pytest.mark.parametrize(("copies", "group"), [(1, 1), (12, 5), (192, 13), (16, 16)])
@pytest.mark.parametrize(("items", "leading"), [(1, 0), (9, 0), (9, 2), (9, 9)])
def test_items_that_lead_are_taken_for_all_copies_first(library, items, leading, copies, group):
    units = int32(items * copies, 2)
    call(library.staying_order, items, leading, copies, group, units)
    order = [tuple(unit) for unit in units.tolist()]
    assert sorted(order) == [(i, c) for i in range(items) for c in range(copies)]
    place = sorted(order, key=lambda u: (u[0] >= leading, u[1] // group, u))
    assert order == place


def longest_share(library, lengths, copies, copy_bytes, sets):
    """Work of the set that ends last, over what it must be at least: items taken in the promised order by whoever is ready."""
    lengths = sorted(lengths, reverse=True)
    leading = sum(length * len(lengths) > 2 * sum(lengths) for length in lengths)
    group = library.group_of_copies(ctypes.c_int64(copy_bytes), len(lengths), copies, sets)
    units = int32(len(lengths) * copies, 2)
    call(library.staying_order, len(lengths), leading if group < copies else 0, copies, group, units)
    ends = [0] * sets
    for item in units[:, 0].tolist():
        heapq.heapreplace(ends, ends[0] + lengths[item])
    return max(ends) / max(sum(lengths) * copies / sets, lengths[0])


@pytest.mark.parametrize(
    ("copies", "row_bytes", "rows", "sets"), [(16, 256, 64, 396), (16, 512, 128, 132), (96, 256, 64, 396)]
)
@pytest.mark.parametrize("mask", ["causal", "global rows"])
def test_no_set_of_warpgroups_ends_far_behind_the_others(library, mask, copies, row_bytes, rows, sets):
    # An H200's multiprocessors, keys and values of 64 and 128 dims; a global row is 13 times as long as others.
    q_tiles = 8192 // rows
    lengths = [1 + i * rows // 64 for i in range(q_tiles)] if mask == "causal" else [128] + [10] * (q_tiles - 1)
    assert longest_share(library, lengths, copies, 8192 * row_bytes, sets) < 1.06


def test_groups_of_copies_have_two_rounds_each(library):
    for items, copies, sets in [
        (128, 16, 396),
        (64, 16, 132),
        (64, 12, 132),
        (32, 96, 396),
        (1, 1, 396),
        (8, 5000, 396),
    ]:
        group = library.group_of_copies(ctypes.c_int64(2 << 20), items, copies, sets)
        last = copies % group or group
        assert group == copies or min(group, last) * items >= 2 * sets


@pytest.mark.parametrize("short", range(4))
def test_a_layout_that_does_not_fit_says_so(emulated, short):
    keep = random_mask(1, 1, 150, 300)
    mask = SparseMask.from_dense(keep)
    (ptr, *_), _ = build_layout(emulated, mask, 64, 2, 1)
    used = [int(ptr[i]) for i in (2, 3, 0, 4)]  # combines, tiles, items, bitmaps
    (header, *_), counts = build_layout(emulated, mask, 64, 2, 1, tuple(used))
    assert (header[6], counts[3]) == (0, 0)
    used[short] -= 1
    (header, *_), counts = build_layout(emulated, mask, 64, 2, 1, tuple(used))
    assert (header[6], counts[3]) == (1, 1)


TOGETHER = [  # block, q_len, kv_len, q_tile, chunk: cuts at every kind of end
    (64, 256, 256, 64, -1),
    (64, 200, 272, 64, 0),
    (64, 130, 330, 64, 2),
    (128, 300, 410, 64, 1),
    (128, 300, 448, 128, 3),
    (192, 70, 500, 64, 0),
    (256, 520, 1290, 128, 2),
    (64, 65, 2090, 64, 5),
    (64, 70, 17_000, 64, 4),
    (128, 30, 66_000, 128, 0),
    (64, 1, 1, 64, 0),
    (64, 100, 0, 64, -1),
    (1024, 300, 300, 128, 0),
]


def build_together(emulated, table, sizes, q_tile, chunk, copies, room, capacity, slots=12):
    """(lists, layout) of a table (B, H, rows, cols), or None; ``sizes``: block, q_len, kv_len."""
    block, q_len, kv_len = sizes
    planes, (combines, tiles, items, bit_tiles) = table.shape[0] * table.shape[1], room
    lists = buffers(planes * cells.n_strips(q_len), *capacity)
    layout = int32(8 + 4 * combines), int32(tiles, 4), int32(items, 12), int32(bit_tiles, 2 * q_tile)
    wide = torch.nn.functional.pad(table, (0, 3), value=True)  # what lies between the rows is not the table's
    how = planes, wide.shape[3], q_len, kv_len, block, q_tile, chunk, copies, slots
    capacity = [ctypes.c_int64(n) for n in capacity]
    done = call(emulated.build_together, wide, *how, *lists, *capacity, *layout, torch.tensor(room))
    return (lists, layout) if done & 1 else None


def assert_equals_the_way_over_the_lists(emulated, table, sizes, q_tile, chunk, copies):
    """Bit for bit, wherever the contents are defined."""
    block, q_len, kv_len = sizes
    mask = SparseMask.from_blocks(table, block, q_len, kv_len)
    n, n_bits = mask.counts[:2].tolist()
    (ptr, col, items, bits), _ = build_layout(emulated, mask, q_tile, chunk, copies, slots=12)
    header = ptr[:8].tolist()
    room = header[2], header[3], header[0], header[4]
    lists, layout = build_together(emulated, table, sizes, q_tile, chunk, copies, room, (n, n_bits))
    assert_same(lists, mask)
    assert layout[0][:8].tolist() == header
    for mine, theirs in zip(layout, (ptr, col, items, bits), strict=True):
        assert torch.equal(mine, theirs[: mine.shape[0]])
    return room, (n, n_bits)


@pytest.mark.parametrize(("block", "q_len", "kv_len", "q_tile", "chunk"), TOGETHER)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_lists_and_layout_together(emulated, block, q_len, kv_len, q_tile, chunk, share):
    table = torch.rand(2, 3, -(-q_len // block), -(-kv_len // block)) < share
    assert_equals_the_way_over_the_lists(emulated, table, (block, q_len, kv_len), q_tile, chunk, 3)


@pytest.mark.parametrize("kv_len", [1280, 1250])
def test_top_k_rows_together(emulated, kv_len):
    # Every row keeps as many, as top-k gives them: with and without a key tile that is cut.
    chosen = torch.rand(1, 5, 9, 20).topk(4).indices
    table = torch.zeros(1, 5, 9, 20, dtype=torch.bool).scatter_(-1, chosen, True)
    for q_len in (9 * 64, 9 * 64 - 40):
        assert_equals_the_way_over_the_lists(emulated, table, (64, q_len, kv_len), 64, -1, 1)


@pytest.mark.parametrize("chunk", [0, 3])
def test_more_query_tiles_than_a_round_together(emulated, chunk):
    # Two blocks a multiprocessor of three: several rounds of 16 query tiles for each.
    table = torch.rand(1, 3, 70, 11) < torch.rand(1, 3, 70, 1)
    assert_equals_the_way_over_the_lists(emulated, table, (64, 70 * 64 - 10, 11 * 64), 64, chunk, 1)


@pytest.mark.parametrize("short", range(6))
def test_what_does_not_fit_together_says_so(emulated, short):
    table, sizes = torch.rand(1, 2, 5, 9) < 0.6, (64, 300, 550)
    table[..., -1] = True
    room, capacity = assert_equals_the_way_over_the_lists(emulated, table, sizes, 64, 2, 1)
    used = [*room, *capacity]
    used[short] -= 1
    lists, layout = build_together(emulated, table, sizes, 64, 2, 1, tuple(used[:4]), tuple(used[4:]))
    assert (layout[0][6], lists[4][3]) == (1, 1)
    assert lists[4][:2].tolist() == list(capacity)
    assert int(lists[0].max()) <= used[4]


@pytest.mark.parametrize(("block", "q_tile"), [(16, 64), (96, 64), (64, 128), (192, 128)])
def test_other_blocks_take_the_way_over_the_lists(emulated, block, q_tile):
    table = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    assert build_together(emulated, table, (block, 2 * block, 2 * block), q_tile, 0, 1, (9, 9, 9, 9), (9, 9)) is None
