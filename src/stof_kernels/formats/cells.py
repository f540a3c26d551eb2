"""Building the canonical cell lists of a mask, vectorised over cells and never S x S in memory for a rule.

Cells are 16 queries x 16 keys. A strip is a row of cells; each strip lists its non-empty cells in ascending key order. A full
cell needs no more; a partial one points at 16 words of 16 bits, word r bit c for query row r and key c. This two-level form
follows STOF's two-level storage (OuterTiles of 8 x 8 InnerTiles with bitmaps) with one difference: the outer level here is one
row of cells and not a kernel's tile, so that any kernel's tiles can be derived from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..kernels import raw
from ..masks import Bounds, MaskMod, Pattern

CELL = 16
# Positions looked at in one go: a rule's int64 temporaries of 2 Mi of them are 16 MB each.
_CHUNK_POSITIONS = 1 << 21
# Cells whose state, one byte each, is held at once; rectangles that the test is asked about at once.
_CHUNK_CELLS = 1 << 22
_CHUNK_STATES = 1 << 20
# Cells whose places are held at once, 8 bytes each; cells that compiled code looks into at once: it keeps their words, 32 bytes
# each, and no positions.
_CHUNK_OPEN = 1 << 21
_CHUNK_COMPILED = 1 << 18


@dataclass(frozen=True)
class CellLists:
    """Exact-size canonical lists; dtypes and meaning as in `SparseMask`, which pads and owns them."""

    strip_ptr: Tensor
    cell_col: Tensor
    cell_slot: Tensor
    cell_bits: Tensor
    counts: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All five, in the order of the fields."""
        return self.strip_ptr, self.cell_col, self.cell_slot, self.cell_bits, self.counts


def n_strips(q_len: int) -> int:
    """Rows of cells over ``q_len`` queries."""
    return -(-q_len // CELL)


def n_cols(kv_len: int) -> int:
    """Columns of cells over ``kv_len`` keys."""
    return -(-kv_len // CELL)


@dataclass(frozen=True)
class _Piece:
    """Listed cells of a run of consecutive strips: how many each strip lists, and their content in list order."""

    per_strip: Tensor  # int64 (strips,)
    col: Tensor  # int32 (n,)
    full: Tensor  # bool (n,)
    bits: Tensor  # int16 (partial, 16)
    kept: Tensor  # int64 scalar


def _assemble(pieces: list[_Piece], device: torch.device) -> CellLists:
    """Concatenate pieces that follow each other in strip order."""
    per_strip = torch.cat([p.per_strip for p in pieces]) if pieces else torch.zeros(0, dtype=torch.int64, device=device)
    strip_ptr = torch.zeros(per_strip.numel() + 1, dtype=torch.int64, device=device)
    strip_ptr[1:] = per_strip.cumsum(0)
    col = torch.cat([p.col for p in pieces]) if pieces else torch.zeros(0, dtype=torch.int32, device=device)
    if col.numel() >= 2**31:
        raise ValueError(f"mask: {col.numel()} non-empty 16 x 16 cells, allowed: fewer than 2**31; use fewer planes")
    full = torch.cat([p.full for p in pieces]) if pieces else torch.zeros(0, dtype=torch.bool, device=device)
    bits = torch.cat([p.bits for p in pieces]) if pieces else torch.zeros(0, CELL, dtype=torch.int16, device=device)
    slot = torch.where(full, -1, (~full).cumsum(0, dtype=torch.int32) - 1)
    kept = torch.stack([p.kept for p in pieces]).sum() if pieces else torch.zeros((), dtype=torch.int64, device=device)
    sizes = torch.tensor([col.numel(), bits.shape[0]], dtype=torch.int64, device=device)
    counts = torch.cat([sizes, kept.view(1), sizes.new_zeros(1)])
    return CellLists(strip_ptr.to(torch.int32), col, slot, bits, counts)


def _pack(cells: Tensor) -> Tensor:
    """Bool (n, 16, 16) -> int16 (n, 16): bit c of word r is position (r, c)."""
    weights = 1 << torch.arange(CELL, dtype=torch.int32, device=cells.device)
    return (cells * weights).sum(-1, dtype=torch.int32).to(torch.int16)


def unpack(bits: Tensor) -> Tensor:
    """Int16 (n, 16) -> bool (n, 16, 16), the inverse of the packing."""
    shifts = torch.arange(CELL, dtype=torch.int32, device=bits.device)
    return ((bits.to(torch.int32)[..., None] >> shifts) & 1).bool()


def _classify(cells: Tensor, row_valid: Tensor) -> tuple[Tensor, Tensor]:
    """(any, full) per cell of bool (n, 16, 16); rows that are no queries (``row_valid`` False) do not spoil a full one."""
    return cells.any(-1).any(-1), (cells.all(-1) | ~row_valid).all(-1)


def lists_from_dense(keep: Tensor) -> CellLists:
    """Cell lists of a dense bool (Bm, Hm, Lq, Lk) tensor, by plain torch operators on any device.

    This is the specification of the builders written in C++ and CUDA.
    """
    batch, heads, q_len, kv_len = keep.shape
    strips, cols = n_strips(q_len), n_cols(kv_len)
    rows_per_piece = max(1, _CHUNK_POSITIONS // max(1, cols * CELL * CELL))
    pieces = []
    for plane in keep.reshape(batch * heads, q_len, kv_len):
        for first in range(0, strips, rows_per_piece):
            last = min(strips, first + rows_per_piece)
            band = plane[first * CELL : last * CELL]
            valid = torch.zeros((last - first) * CELL, dtype=torch.bool, device=keep.device)
            valid[: band.shape[0]] = True
            padded = torch.nn.functional.pad(band, (0, cols * CELL - kv_len, 0, valid.numel() - band.shape[0]))
            grid = padded.view(last - first, CELL, cols, CELL).permute(0, 2, 1, 3)
            valid = valid.view(-1, 1, CELL).expand(-1, cols, -1)
            pieces.append(_piece_from_grid(grid, valid, band))
    return _assemble(pieces, keep.device)


def _piece_from_grid(grid: Tensor, valid: Tensor, band: Tensor) -> _Piece:
    strips, cols = grid.shape[:2]
    listed, full = (x.view(strips, cols) for x in _classify(grid.reshape(-1, CELL, CELL), valid.reshape(-1, CELL)))
    strip, col = listed.nonzero(as_tuple=True)
    full = full[strip, col]
    partial = grid[strip[~full], col[~full]]
    return _Piece(listed.sum(1), col.to(torch.int32), full, _pack(partial), band.sum())


def lists_from_pattern(
    pattern: Pattern,
    q_len: int,
    kv_len: int,
    batch: int,
    heads: int,
    device: torch.device | str,
    compiled: bool = False,
) -> CellLists:
    """Cell lists of a rule: its rectangle test sorts cells into empty, full and maybe; only the last are looked into.

    ``compiled`` looks with code that torch.compile makes of the rule, and so at more cells at once.
    """
    device = torch.device(device)
    rule, bounds = pattern.bind(q_len, kv_len, device), pattern.bounds(q_len, kv_len, device)
    planes = [(b, h) for b in range(batch) for h in range(heads)] if pattern.per_head else [(0, 0)]
    strips, cols = n_strips(q_len), n_cols(kv_len)
    step = max(1, _CHUNK_CELLS // max(1, cols))
    bands = [(first, min(strips, first + step)) for first in range(0, strips, step)]
    # The rectangle test knows no heads; only where its answer is too large to keep is it asked again for each plane.
    known = states_of(bounds, 0, strips, q_len, kv_len, device) if len(bands) == 1 else None
    pieces = []
    for b, h in planes:
        at = (torch.tensor(b, device=device), torch.tensor(h, device=device))
        for first, last in bands:
            states = states_of(bounds, first, last, q_len, kv_len, device) if known is None else known.clone()
            pieces.append(_piece_from_rule(rule, at, states, first, q_len, kv_len, compiled))
    lists = _assemble(pieces, device)
    return lists if pattern.per_head else repeat_planes(lists, batch * heads)


# What a rectangle of cells is known to be.
_EMPTY, _FULL, _OPEN = 0, 1, 2
# Edge, in cells, of the rectangles that the test is asked about first: only those it leaves open are asked about cell by cell.
# More levels would save work that is smaller than the launches they cost.
_EDGE = 4


def states_of(bounds: Bounds, first: int, last: int, q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """Uint8 (last - first, cols): what the rectangle test knows of each cell of a band of strips."""
    strips, cols = last - first, n_cols(kv_len)
    if strips == 0 or cols == 0:
        return torch.zeros(strips, cols, dtype=torch.uint8, device=device)
    row = torch.arange(-(-strips // _EDGE), device=device)[:, None]
    col = torch.arange(-(-cols // _EDGE), device=device)[None, :]
    coarse = _ask(bounds, row, col, _EDGE, first, q_len, kv_len)
    states = _refined(coarse, _EDGE, lambda row, col: _ask(bounds, row, col, 1, first, q_len, kv_len))
    return states[:strips, :cols].contiguous()


def _refined(states: Tensor, ratio: int, ask: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The states of rectangles ``ratio`` times smaller each way: those that are open are asked about, the others inherit."""
    open_row, open_col = (states == _OPEN).nonzero(as_tuple=True)
    rows, columns = (n * ratio for n in states.shape)
    finer = states[:, None, :, None].expand(-1, ratio, -1, ratio).contiguous().view(rows, columns)
    if open_row.numel() == states.numel():  # nothing is known, as of any callable: the grid needs no list
        row, col = (torch.arange(n, device=states.device) for n in (rows, columns))
        step = max(1, _CHUNK_STATES // columns)
        for at in range(0, rows, step):
            finer[at : at + step] = ask(row[at : at + step, None], col)
        return finer
    inner, step = torch.arange(ratio, device=states.device), max(1, _CHUNK_STATES // ratio**2)
    for at in range(0, open_row.numel(), step):
        row = open_row[at : at + step, None, None] * ratio + inner[:, None]
        col = open_col[at : at + step, None, None] * ratio + inner
        finer[row, col] = ask(row, col)
    return finer


def _ask(bounds: Bounds, row: Tensor, col: Tensor, edge: int, first: int, q_len: int, kv_len: int) -> Tensor:
    """The states of rectangles of ``edge`` x ``edge`` cells, by broadcastable row (from strip ``first``) and column."""
    side = edge * CELL
    q_lo, kv_lo = row * side + first * CELL, col * side
    # What lies past the end is asked for the last position, and cut off or looked into by the caller.
    q, kv = ((lo.clamp(max=n - 1), (lo + side - 1).clamp(max=n - 1)) for lo, n in ((q_lo, q_len), (kv_lo, kv_len)))
    maybe, full = bounds(*q, *kv)
    # A cell that the keys end in is never full: its last keys do not exist.
    full = full & maybe & (kv_lo + side <= kv_len)
    states = maybe.to(torch.uint8) * _OPEN - full.to(torch.uint8)
    return states.expand(torch.broadcast_shapes(row.shape, col.shape))


def _piece_from_rule(
    rule: MaskMod, at: tuple[Tensor, Tensor], states: Tensor, first: int, q_len: int, kv_len: int, compiled: bool
) -> _Piece:
    """Looks into the open cells of a band, writes what they are into ``states`` and lists what is not empty."""
    strips, cols = states.shape
    flat = states.view(-1)
    queries = (q_len - (torch.arange(strips, device=states.device) + first) * CELL).clamp(max=CELL)
    kept = [((states == _FULL).sum(1) * queries).sum() * CELL]
    words = []
    inspect, step = (_inspect_compiled(), _CHUNK_COMPILED) if compiled else (_inspect, _CHUNK_POSITIONS // CELL**2)
    for part in _open_cells(flat, step):
        bits, any_kept, all_kept, n = inspect(rule, *at, part, cols, first, q_len, kv_len)
        partial = any_kept & ~all_kept
        flat[part] = all_kept.to(torch.uint8) * _FULL + partial.to(torch.uint8) * _OPEN
        words.append(bits[partial])
        kept.append(n)
    per_strip = (states != _EMPTY).sum(1)
    listed = flat.nonzero().flatten()
    full = flat[listed] == _FULL
    bits = torch.cat(words) if words else torch.zeros(0, CELL, dtype=torch.int16, device=states.device)
    return _Piece(per_strip, listed.remainder_(max(1, cols)).to(torch.int32), full, bits, torch.stack(kept).sum())


def _open_cells(flat: Tensor, step: int) -> Iterator[Tensor]:
    """Places of the open cells, up to ``step`` at a time."""
    for at in range(0, flat.numel(), _CHUNK_OPEN):
        found = (flat[at : at + _CHUNK_OPEN] == _OPEN).nonzero().flatten()
        if found.numel():
            yield from (found.add_(at) if at else found).split(step)


def _inspect(
    rule: MaskMod, b: Tensor, h: Tensor, place: Tensor, cols: int, first: int, q_len: int, kv_len: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words (n, 16) of the cells at these places of a band, whether anything and whether all of each is kept, and positions."""
    strip = place // cols
    col, strip = place - strip * cols, strip + first
    cells = _look_into(rule, b, h, strip, col, q_len, kv_len)
    words = _pack(cells)
    full = words == -1
    if q_len % CELL:  # rows that are no queries do not spoil a full cell
        full = full | (torch.arange(CELL, device=strip.device) >= q_len - strip[:, None] * CELL)
    return words, (words != 0).any(-1), full.all(-1), cells.sum()


@cache
def _inspect_compiled() -> Callable:
    # Sizes stay symbols: a rule is compiled once, whatever the mask's lengths.
    return torch.compile(_inspect, dynamic=True)


def _look_into(rule: MaskMod, b: Tensor, h: Tensor, strip: Tensor, col: Tensor, q_len: int, kv_len: int) -> Tensor:
    """Every position of the given cells: bool (n, 16, 16), what is kept."""
    inner = torch.arange(CELL, device=strip.device)
    q, kv = (strip[:, None] * CELL + inner)[:, :, None], (col[:, None] * CELL + inner)[:, None]
    # Positions past the end are asked for the last one instead, so that a rule's tables are never read out of bounds.
    ragged = [(x, n) for x, n in ((q, q_len), (kv, kv_len)) if n % CELL]
    if q_len % CELL:
        q = q.clamp(max=q_len - 1)
    if kv_len % CELL:
        kv = kv.clamp(max=kv_len - 1)
    kept = rule(b, h, q, kv)
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
        got = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
        raise TypeError(f"mask predicate: returned {got}, allowed: a bool tensor that broadcasts with q and kv")
    for position, length in ragged:
        kept = kept & (position < length)
    return kept.expand(strip.numel(), CELL, CELL)


def repeat_planes(lists: CellLists, planes: int) -> CellLists:
    """The lists of one plane, listed ``planes`` times; the bit words stay single and are shared."""
    if planes == 1:
        return lists
    n = lists.cell_col.numel()
    if n * planes >= 2**31:
        raise ValueError(f"mask: {n * planes} non-empty 16 x 16 cells, allowed: fewer than 2**31; use batch=1, heads=1")
    starts = torch.arange(planes, device=lists.strip_ptr.device, dtype=torch.int32) * n
    ptr = torch.cat([(lists.strip_ptr[:-1] + starts[:, None]).flatten(), starts.new_full((1,), n * planes)])
    counts = lists.counts * torch.tensor([planes, 1, planes, 1], device=lists.counts.device)
    return CellLists(ptr, lists.cell_col.repeat(planes), lists.cell_slot.repeat(planes), lists.cell_bits, counts)


def lists_from_blocks(keep_blocks: Tensor, block: int, q_len: int, kv_len: int) -> CellLists:
    """Cell lists of bool (Bm, Hm, ceil(Lq/block), ceil(Lk/block)) whole blocks; ``block`` is a multiple of 16.

    Work and memory are those of the listed cells, not of the matrix. On a GPU one small read-back sizes them.
    """
    if keep_blocks.is_cuda:
        return CellLists(*raw.build_blocks(keep_blocks, block, q_len, kv_len))
    device, ratio, cols = keep_blocks.device, block // CELL, n_cols(kv_len)
    table = keep_blocks.flatten(0, 1)
    planes, block_rows, _ = table.shape
    plane, row, kb = table.nonzero(as_tuple=True)
    block_row = plane * block_rows + row
    # Cells of each kept block along the keys; the last block may be cut by the end of the keys.
    width = (cols - kb * ratio).clamp(max=ratio)
    expanded = kb.repeat_interleave(width) * ratio + _ramp(width)
    row_cells = torch.zeros(planes * block_rows, dtype=torch.int64, device=device).index_add_(0, block_row, width)
    row_start = row_cells.cumsum(0) - row_cells
    strip = torch.arange(n_strips(q_len), device=device)
    source = (torch.arange(planes, device=device)[:, None] * block_rows + strip // ratio).flatten()
    per_strip = row_cells[source]
    col = expanded[row_start[source].repeat_interleave(per_strip) + _ramp(per_strip)]
    rows_in = (q_len - strip * CELL).clamp(max=CELL).repeat(planes).repeat_interleave(per_strip)
    ragged = kv_len % CELL
    full = (col < cols - 1) | (ragged == 0) if ragged else torch.ones_like(col, dtype=torch.bool)
    word = (1 << ragged) - 1
    inner = torch.arange(CELL, device=device)
    bits = torch.where(inner < rows_in[~full][:, None], word, 0).to(torch.int16)
    kept = (rows_in * torch.where(full, CELL, ragged)).sum()
    return _assemble([_Piece(per_strip, col.to(torch.int32), full, bits, kept)], device)


def _ramp(lengths: Tensor) -> Tensor:
    """0, 1, .., n-1 for each n of ``lengths``, one after the other."""
    starts = lengths.cumsum(0) - lengths
    total = int(lengths.sum())
    return torch.arange(total, device=lengths.device) - starts.repeat_interleave(lengths)


def dense_from_lists(lists: CellLists, q_len: int, kv_len: int, batch: int, heads: int) -> Tensor:
    """Bool (batch, heads, q_len, kv_len) on the lists' device, the inverse of the builders."""
    strips, cols = n_strips(q_len), n_cols(kv_len)
    per_strip = lists.strip_ptr.diff().to(torch.int64)
    n = int(lists.strip_ptr[-1]) if lists.strip_ptr.numel() else 0
    strip = torch.arange(per_strip.numel(), device=per_strip.device).repeat_interleave(per_strip)
    grid = torch.zeros(per_strip.numel(), cols, CELL, CELL, dtype=torch.bool, device=per_strip.device)
    col, slot = lists.cell_col[:n].to(torch.int64), lists.cell_slot[:n]
    partial = slot >= 0
    grid[strip[~partial], col[~partial]] = True
    grid[strip[partial], col[partial]] = unpack(lists.cell_bits[slot[partial].to(torch.int64)])
    dense = grid.view(batch, heads, strips, cols, CELL, CELL).transpose(3, 4)
    return dense.reshape(batch, heads, strips * CELL, cols * CELL)[:, :, :q_len, :kv_len].contiguous()
