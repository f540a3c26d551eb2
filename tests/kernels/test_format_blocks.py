"""Block masks: by table or numbers, into fixed buffers without the host, equal to the dense mask they mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stof_kernels import SparseMask
from stof_kernels.formats.layout import most_tiles

SHAPES = [  # block, q_len, kv_len
    (64, 256, 256),
    (64, 200, 272),
    (16, 33, 48),
    (32, 1, 16),
    (128, 130, 400),
]


def tables(block: int, q_len: int, kv_len: int, batch: int = 2, heads: int = 3, share: float = 0.4) -> torch.Tensor:
    shape = batch, heads, -(-q_len // block), -(-kv_len // block)
    return torch.rand(shape, generator=torch.Generator().manual_seed(q_len)) < share


@pytest.mark.parametrize(("block", "q_len", "kv_len"), [*SHAPES, (64, 100, 90)])
def test_top_k_numbers_name_the_same_blocks(block: int, q_len: int, kv_len: int) -> None:
    table = tables(block, q_len, kv_len)
    cols = table.shape[-1]
    numbers = torch.where(table, torch.arange(cols), -1)
    numbers = torch.cat([numbers, numbers[..., :1], torch.full_like(numbers[..., :1], cols + 7)], -1)  # twice, and none
    for dtype in (torch.int32, torch.int64):
        mask = SparseMask.from_blocks(numbers.to(dtype), block, q_len, kv_len).check()
        assert torch.equal(mask.to_dense(), SparseMask.from_blocks(table, block, q_len, kv_len).to_dense())
        fixed = SparseMask.from_blocks(torch.ones_like(table), block, q_len, kv_len, capacity="max")
        assert torch.equal(fixed.update_blocks_(numbers.to(dtype), block).to_dense(), mask.to_dense())


@pytest.mark.parametrize("capacity", ["max", None])
@pytest.mark.parametrize(("block", "q_len", "kv_len"), [*SHAPES, (64, 100, 90)])
def test_update_blocks_is_update_with_the_dense_mask(block: int, q_len: int, kv_len: int, capacity: str | None) -> None:
    full = torch.ones(2, 3, -(-q_len // block), -(-kv_len // block), dtype=torch.bool)
    mask = SparseMask.from_blocks(full, block, q_len, kv_len, capacity=capacity)
    table = tables(block, q_len, kv_len)
    assert mask.update_blocks_(table, block) is mask
    dense = table.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :q_len, :kv_len]
    assert torch.equal(mask.to_dense(), dense)
    assert mask.kept == pytest.approx(dense.double().mean().item())
    shared = table[:1, :1]
    assert torch.equal(mask.update_blocks_(shared, block).to_dense(), dense[:1, :1].expand(2, 3, -1, -1))


@pytest.mark.parametrize(
    ("table", "block", "message"),
    [
        (torch.ones(4, 4, dtype=torch.bool), 24, "block is 24, allowed: a multiple of 16"),
        (torch.ones(4, 4, dtype=torch.bool), True, "block is True, allowed: a multiple of 16"),
        (torch.ones(3, 4, dtype=torch.bool), 64, r"keep_blocks: shape \(3, 4\)"),
        (torch.ones(2, 1, 4, 4, dtype=torch.bool), 64, r"keep_blocks has shape \(2, 1, 4, 4\), allowed: broadcastable"),
    ],
)
def test_bad_blocks_are_one_clear_line(table: torch.Tensor, block: int, message: str) -> None:
    mask = SparseMask.from_blocks(torch.ones(1, 4, 4, dtype=torch.bool), 64, 256, 256, capacity="max")
    with pytest.raises(ValueError, match=message) as error:
        mask.update_blocks_(table, block)
    assert "\n" not in str(error.value)


def tiles_of(keep: torch.Tensor, q_tile: int) -> tuple[int, int]:
    """Key tiles of packed 16-key columns, and those of them that are not full, by the format's definition."""
    planes, q_len, kv_len = keep.flatten(0, 1).shape
    padded = torch.zeros(planes, -(-q_len // q_tile) * q_tile, -(-kv_len // 16) * 16, dtype=torch.bool)
    padded[:, :q_len, :kv_len] = keep.flatten(0, 1)
    cells = padded.view(planes, -1, q_tile, padded.shape[2] // 16, 16).transpose(2, 3)
    no_query = (torch.arange(padded.shape[1]) >= q_len).view(1, -1, 1, q_tile, 1)
    listed, full = cells.any(-1).any(-1).sum(-1), (cells | no_query).all(-1).all(-1).sum(-1)
    tiles = (listed + 3) // 4
    return int(tiles.sum()), int((tiles - full // 4).sum())


@pytest.mark.parametrize("q_tile", [64, 128])
@pytest.mark.parametrize("block", [16, 48, 64, 128, 192, 256])
@pytest.mark.parametrize(("q_len", "kv_len"), [(512, 512), (300, 528), (65, 1000), (511, 17)])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_buffers_have_room_for_every_table(q_tile: int, block: int, q_len: int, kv_len: int, share: float) -> None:
    table = tables(block, q_len, kv_len, share=share)
    mask = SparseMask.from_blocks(table, block, q_len, kv_len)
    room = replace(mask, cell_col=mask.cell_col[: max(1, int(mask.counts[0]))], fixed=True, block=block)
    tiles, slots = most_tiles(room, q_tile)
    used = tiles_of(mask.to_dense(), q_tile)
    assert used[0] <= tiles
    assert used[1] <= slots
    if block == q_tile == 64 and q_len % 64 == kv_len % 64 == 0:
        assert tiles == int(table.sum())


@pytest.mark.gpu
@pytest.mark.parametrize(("block", "q_len", "kv_len"), [*SHAPES, (64, 100, 90), (192, 1000, 777)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_device_builds_the_lists_of_the_host(block: int, q_len: int, kv_len: int, share: float) -> None:
    table = tables(block, q_len, kv_len, share=share)
    host = SparseMask.from_blocks(table, block, q_len, kv_len)
    n, n_bits = host.counts[:2].tolist()
    for capacity in (None, "max"):
        mask = SparseMask.from_blocks(table.cuda(), block, q_len, kv_len, capacity=capacity).check()
        assert torch.equal(mask.strip_ptr.cpu(), host.strip_ptr)
        assert torch.equal(mask.cell_col[:n].cpu(), host.cell_col[:n])
        assert torch.equal(mask.cell_slot[:n].cpu(), host.cell_slot[:n])
        assert torch.equal(mask.cell_bits[:n_bits].cpu(), host.cell_bits[:n_bits])
        assert torch.equal(mask.counts.cpu(), host.counts)


@pytest.mark.gpu
@pytest.mark.parametrize(("q_len", "kv_len"), [(512, 512), (300, 528)])
def test_a_captured_graph_replays_with_new_blocks(q_len: int, kv_len: int) -> None:
    from stof_kernels import sparse_attention
    from stof_kernels.ops import reference

    block, heads = 64, 4
    q = torch.randn(1, heads, q_len, 64, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(1, heads, kv_len, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    first, second = (tables(block, q_len, kv_len, 1, heads, share).cuda() for share in (0.3, 0.6))
    current = first.clone()
    mask = SparseMask.from_blocks(current, block, q_len, kv_len, capacity="max").prepare(q, k)
    twice = [torch.cat([t, t]) for t in (q, k, v)]  # another problem of the same mask, with a layout of its own
    mask.layout_for(*twice[:2])
    sparse_attention(q, k, v, mask.update_blocks_(current, block))
    sparse_attention(*twice, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_attention(q, k, v, mask.update_blocks_(current, block))
        both = sparse_attention(*twice, mask)
    for table in (first, second, first):
        current.copy_(table)
        graph.replay()
        dense = table.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :q_len, :kv_len]
        expected, _ = reference.attention(q, k, v, dense, dtype=torch.float32)
        assert torch.equal(mask.to_dense(), dense)
        for got in (out, *both):
            assert (got.float() - expected).norm() <= 2e-3 * expected.norm()
