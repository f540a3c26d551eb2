"""Masks built on the device: lists against the CPU builder, the block-wise layout against the mask, capacities, graphs."""

from __future__ import annotations

import math

import pytest
import torch
from mask_lists import list_lengths, unpack_layout

from stof_kernels.kernels import raw

pytestmark = pytest.mark.gpu


def random_mask(*shape, share=0.2, seed=0):
    keep = torch.rand(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)) < share
    keep[..., : shape[2] // 3, : shape[3] // 2] = True  # full cells, and rows of them
    keep[..., shape[2] // 2 : shape[2] // 2 + 40, :] = False
    return keep


def buffers(keep, cells, bits):
    strips = keep.shape[0] * keep.shape[1] * -(-keep.shape[2] // 16)
    sizes = ((strips + 1,), (cells,), (cells,))
    lists = [torch.full(size, -7, dtype=torch.int32, device="cuda") for size in sizes]
    return (
        *lists,
        torch.zeros(bits, 16, dtype=torch.int16, device="cuda"),
        torch.zeros(4, dtype=torch.int64, device="cuda"),
    )


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 64, 64), (1, 1, 1, 1), (2, 3, 200, 333), (1, 1, 47, 4096), (1, 2, 33, 5000), (1, 1, 0, 9), (1, 1, 9, 0)],
)
def test_lists_equal_the_cpu_builder(shape):
    keep = random_mask(*shape)
    for view in (keep, keep.transpose(2, 3).contiguous().transpose(2, 3), keep[:, :1].expand(shape)):
        for mine, theirs in zip(raw.build_cells(view), raw.build_cells(view.cpu()), strict=True):
            assert torch.equal(mine.cpu(), theirs)


def test_given_buffers_hold_the_same_lists():
    keep = random_mask(2, 2, 100, 260)
    want = raw.build_cells(keep)
    got = buffers(keep, 5000, 5000)
    raw.build_cells_out(keep, *got)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[4], want[4])
    for mine, theirs in zip(got[1:4], want[1:4], strict=True):
        assert torch.equal(mine[: len(theirs)], theirs)


@pytest.mark.parametrize("q_tile", [64, 128])
@pytest.mark.parametrize("chunk", [0, 2, -1])
@pytest.mark.parametrize(("shape", "seed"), [((1, 1, 300, 500), 0), ((2, 2, 130, 200), 0), ((2, 2, 130, 200), 1)])
def test_layout_holds_the_mask(shape, seed, chunk, q_tile):
    keep = random_mask(*shape, seed=seed)
    cells = raw.build_cells(keep)
    layout = raw.build_layout(*cells, *shape[2:], shape[0] * shape[1], q_tile, chunk, 3)
    dense, lengths = unpack_layout(layout, keep.shape, q_tile)
    assert torch.equal(dense, keep.cpu())
    # The parts of a list have its longest part's place: 3 tiles cut in two are 2 and 1 among other twos.
    order = list_lengths(layout)
    assert order == sorted(order, reverse=True)
    assert chunk != 0 or lengths == order
    assert chunk < 1 or max(lengths) <= chunk
    header = layout[0][:8].tolist()
    assert layout[4].tolist() == [1, q_tile, chunk, 0, *header[:3], header[5]]
    again = raw.build_layout(*cells, *shape[2:], shape[0] * shape[1], q_tile, chunk, 3)
    assert torch.equal(again[2][: header[0]], layout[2][: header[0]])


@pytest.mark.parametrize("q_tile", [64, 128])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 200, 333), (1, 2, 33, 5000)])
def test_sizes_are_those_of_the_layout(shape, q_tile):
    cells = raw.build_cells(random_mask(*shape))
    request = (*shape[2:], shape[0] * shape[1], q_tile)
    header = raw.build_layout(*cells, *request, 0, 1)[0][:8]
    assert torch.equal(raw.layout_sizes(*cells, *request), header)


def test_layout_of_the_longest_rows():
    # Their bitmaps need more shared memory than a kernel gets without asking.
    columns = torch.tensor([0, 5, 31, 32, 40_000, 65_534], dtype=torch.int32, device="cuda")
    lists = (
        torch.arange(9, dtype=torch.int32, device="cuda") * 6,
        columns.repeat(8),
        torch.full((48,), -1, dtype=torch.int32, device="cuda"),
        torch.zeros(1, 16, dtype=torch.int16, device="cuda"),
        torch.tensor([48, 0, 48 * 256, 0], device="cuda"),
    )
    ptr, col, *_ = raw.build_layout(*lists, 128, 1 << 20, 1, 128, 0, 1)
    assert ptr[:6].tolist() == [1, 0, 0, 2, 1, 2]
    assert col[:2].flatten().tolist() == [*columns.tolist(), -1, -1]


def test_lists_that_ascend_in_jumps():
    keep = torch.zeros(1, 1, 70, 20_000, dtype=torch.bool, device="cuda")
    for row in range(70):
        keep[0, 0, row, torch.randint(0, 20_000, (row % 4,))] = True
    layout = raw.build_layout(*raw.build_cells(keep), 70, 20_000, 1, 64, 3, 1)
    assert torch.equal(unpack_layout(layout, keep.shape, 64)[0], keep.cpu())


def attend(q, k, v, keep, lists, counts, plan):
    planes = keep.shape[:2]
    return raw.sparse_attention(q, k, v, None, *lists, counts, plan, *keep.shape[2:], *planes, 0.125, True)


def test_capacity_graph_replay_and_overflow():
    q, k, v = (torch.randn(2, 4, 300, 64, device="cuda").half() for _ in range(3))
    first, second = random_mask(1, 1, 300, 300), random_mask(1, 1, 300, 300, share=0.01, seed=1)
    keep = first.clone()
    cells = buffers(keep, 400, 400)
    request = (300, 300, 1, 64, -1, 8)
    layout = raw.empty_layout(cells[0], 300, 1, 64, -1, 8, 100)
    plan = torch.tensor([1, 64, -1, 0])

    def step():
        raw.build_cells_out(keep, *cells)
        raw.build_layout_out(*cells, *request, *layout)
        return attend(q, k, v, keep, layout, cells[4], plan), attend(q, k, v, keep, cells[:4], cells[4], plan * 0)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for mask in (first, second, torch.ones_like(keep), torch.zeros_like(keep)):
        keep.copy_(mask)
        graph.replay()
        scores = (q.double() @ k.double().mT * 0.125).masked_fill(~mask, -math.inf)
        want = scores.softmax(-1).nan_to_num(0.0) @ v.double()
        for out, lse in results:
            assert (out.double() - want).norm() <= 7e-4 * want.norm() + 1e-9
            assert torch.equal(lse.isneginf(), ~mask.any(-1).expand_as(lse))


def test_cut_lists_of_fixed_capacity_are_joined_by_blocks_that_take_several():
    q = torch.randn(4, 32, 128, 64, device="cuda").half()
    k, v = (torch.randn(4, 32, 4096, 64, device="cuda").half() for _ in range(2))
    keep = torch.rand(1, 1, 128, 4096, device="cuda") < 0.1
    cells = buffers(keep, 8 * 256, 8 * 256)
    layout = raw.empty_layout(cells[0], 128, 1, 64, 40, 128, 128)
    raw.build_cells_out(keep, *cells)
    raw.build_layout_out(*cells, 128, 4096, 1, 64, 40, 128, *layout)
    assert layout[0][2] == 2  # lists that are cut, of 128 heads each: twice as many as blocks look for
    out, lse = attend(q, k, v, keep, layout, cells[4], torch.tensor([1, 64, 40, 0]))
    scores = (q.float() @ k.float().mT * 0.125).masked_fill(~keep, -math.inf)
    want = scores.softmax(-1) @ v.float()
    assert (out.float() - want).norm() <= 7e-4 * want.norm()
    assert torch.allclose(lse, scores.logsumexp(-1), atol=2e-3)


@pytest.mark.parametrize(("cells", "bits", "tiles"), [(20, 400, 100), (400, 10, 100), (400, 400, 9)])
def test_overflow_writes_nan_everywhere(cells, bits, tiles):
    q, k, v = (torch.randn(1, 4, 300, 64, device="cuda").half() for _ in range(3))
    keep = random_mask(1, 1, 300, 300)
    lists = buffers(keep, cells, bits)
    raw.build_cells_out(keep, *lists)
    layout = raw.empty_layout(lists[0], 300, 1, 64, -1, 4, tiles)
    raw.build_layout_out(*lists, 300, 300, 1, 64, -1, 4, *layout)
    plan = torch.tensor([1, 64, -1, 0])
    for out, lse in [attend(q, k, v, keep, layout, lists[4], plan)] + (
        [attend(q, k, v, keep, lists[:4], lists[4], plan * 0)] if tiles == 100 else []
    ):
        assert out.isnan().all()
        assert lse.isnan().all()
    assert layout[0][6] == 1
    assert lists[4][3] == 1


def test_scan_of_more_strips_than_one_round():
    keep = torch.rand(3, 4, 16 * 1000, 16, device="cuda") < 0.05
    for mine, theirs in zip(raw.build_cells(keep), raw.build_cells(keep.cpu()), strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize(
    ("block", "q_len", "kv_len", "q_tile"),
    [(64, 512, 512, 64), (64, 330, 590, 64), (128, 700, 1090, 128), (192, 1000, 777, 64), (64, 3000, 40_000, 64),
     (96, 500, 500, 64), (64, 500, 500, 128)],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [0, 3, -1])
@pytest.mark.parametrize("rows", ["alike", "mixed", "empty"])
def test_blocks_together_equal_the_way_over_the_lists(block, q_len, kv_len, q_tile, chunk, rows):
    table = torch.rand(2, 3, -(-q_len // block), -(-kv_len // block), device="cuda")
    share = torch.rand(*table.shape[:3], 1, device="cuda") ** 2
    table = table < share if rows == "mixed" else table < table.sort(-1).values[..., 3 * (rows == "alike"), None]
    cells = int(table.sum()) * (block // 16) ** 2 + 1
    room = (6, q_tile, chunk, 2, cells, 4096)
    results = []
    for together in (False, True):
        lists = buffers(torch.empty(2, 3, q_len, kv_len, dtype=torch.bool, device="meta"), cells, 6 * (q_len // 16 + 1))
        layout = raw.empty_layout(lists[0], q_len, *room)
        for buffer in layout:
            buffer.fill_(-7)
        if together:
            raw.build_blocks_layout_out(table, block, q_len, kv_len, *lists, q_tile, chunk, 2, *layout)
        else:
            raw.build_blocks_out(table, block, q_len, kv_len, *lists)
            raw.build_layout_out(*lists, q_len, kv_len, 6, q_tile, chunk, 2, *layout)
        results.append((*lists, *layout))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)
    assert results[1][4][3] == 0


def test_blocks_together_in_a_graph_with_tables_that_differ():
    table, q_len = torch.zeros(1, 8, 40, 40, dtype=torch.bool, device="cuda"), 40 * 64
    lists = buffers(torch.empty(1, 8, q_len, q_len, dtype=torch.bool, device="meta"), 8 * 40 * 40 * 16, 1)
    layout = raw.empty_layout(lists[0], q_len, 8, 64, -1, 1, 8 * 40 * 40, 1)
    call = lambda: raw.build_blocks_layout_out(table, 64, q_len, q_len, *lists, 64, -1, 1, *layout)  # noqa: E731
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # each may begin while the one before it ends
            call()
    for share in (0.5, 0.1, 1.0, 0.0, 0.3):
        table.copy_(torch.rand(table.shape, device="cuda") < share)
        graph.replay()
        dense = table.repeat_interleave(64, 2).repeat_interleave(64, 3)
        assert torch.equal(unpack_layout(layout, dense.shape, 64)[0], dense.cpu())
        assert lists[4].tolist() == [int(table.sum()) * 16, 0, int(dense.sum()), 0]
