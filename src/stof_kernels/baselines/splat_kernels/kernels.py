"""R-SDDMM, R-softmax and R-SpMM over ACSR in Triton: three kernels, scores and probabilities in memory between them [C].

Flags, fixed per mask, for which the code is specialised: MAPPED, positions go through a row map; STRIDED, columns may lie more
than one apart; FROM_ZERO, every row begins at column 0, so that columns are slots; GROUPED, values are stored by position, not
by row; PIECES, progressions per row. The last two belong to unions of ACSRs, which are ours.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes do not change the code, so masks that differ in them alone share it.
_SIZES = ["size", "positions", "stored", "pitch8", "blocks"]


@triton.jit(do_not_specialize=_SIZES)
def sddmm(
    q_ptr, k_ptr, values_ptr, tiles_ptr, map_ptr, stride_ptr, offset_ptr, count_ptr, base_ptr,
    scale, size, positions, stored, pitch8,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr, MAPPED: tl.constexpr,
    STRIDED: tl.constexpr, FROM_ZERO: tl.constexpr, GROUPED: tl.constexpr, PIECES: tl.constexpr, SIMT: tl.constexpr,
):  # fmt: skip
    """One tile of BM rows x BN columns of scale * q k^T, scattered to its slots. Grid (tiles, batch * heads) [C].

    q and k (B, H, size, D); values (B, H, stored, 8 * pitch8). K is read where it lies: the transposed copy that the port is
    given [C] is not needed. The scale is applied to the float32 accumulator, not to Q beforehand [I].
    """
    tile, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pitch = pitch8 * 8
    position = tl.load(tiles_ptr + 4 * tile) + tl.arange(0, BM)
    column = tl.multiple_of(tl.load(tiles_ptr + 4 * tile + 1), ALIGN)
    step = tl.load(tiles_ptr + 4 * tile + 2) if STRIDED else 1
    piece = tl.load(tiles_ptr + 4 * tile + 3) if PIECES > 1 else 0
    inside = position < positions
    row = position
    if MAPPED:
        row = tl.load(map_ptr + position, mask=inside, other=-1)
        inside = row >= 0
    nth = tl.arange(0, BN)
    columns = column + nth * step

    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.static_range(0, D, BD):
        d = start + tl.arange(0, BD)
        q = tl.load(
            q_ptr + plane * size * D + row[:, None] * D + d[None, :], inside[:, None] & (d[None, :] < D), other=0.0
        )
        k = tl.load(
            k_ptr + plane * size * D + columns[None, :] * D + d[:, None],
            (columns[None, :] < size) & (d[:, None] < D),
            other=0.0,
        )
        if SIMT:
            acc = tl.dot(q.to(tl.float32), k.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(q, k, acc, input_precision="ieee")
    scores = (acc * scale).to(values_ptr.dtype.element_ty)

    start = (position if GROUPED else row) * pitch
    values_ptr += plane * stored * pitch
    if FROM_ZERO:
        # A slot is its column. What lands behind a row's last slot is never read, so that whole vectors can be stored.
        slots = column + nth
        tl.store(values_ptr + start[:, None] + slots[None, :], scores, inside[:, None] & (slots < pitch)[None, :])
    else:
        entry = piece * size + row
        offset = tl.load(offset_ptr + entry, inside, other=0)
        count = tl.load(count_ptr + entry, inside, other=0)
        first = column - offset
        if STRIDED:
            # A tile may reach rows of another stride or remainder: it holds no slot of theirs.
            stride = tl.load(stride_ptr + entry, inside, other=1)
            count = tl.where(((stride == step) | (count <= 1)) & (first % step == 0), count, 0)
            first = first // step
        # One comparison for 0 <= slot < count: negative slots are large as unsigned numbers.
        kept = (first[:, None] + nth[None, :]).to(tl.uint32) < count.to(tl.uint32)[:, None]
        start += first
        if PIECES > 1:
            start += tl.load(base_ptr + entry, inside, other=0)
        tl.store(values_ptr + start[:, None] + nth[None, :], scores, kept)


@triton.jit(do_not_specialize=_SIZES)
def softmax(
    scores_ptr, probs_ptr, total_ptr, map_ptr, stored, pitch8,
    BM: tl.constexpr, BN: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Softmax of BM rows of at most BN slots, to a second array of values [C]. Grid (ceil(stored / BM), batch * heads).

    Rows are read and written in whole 16-byte vectors: up to seven slots behind a row's last one become 0.
    """
    plane, place = tl.program_id(1).to(tl.int64), tl.program_id(0) * BM + tl.arange(0, BM)
    pitch = pitch8 * 8
    inside = place < stored
    row = tl.load(map_ptr + place, inside, other=0) if GROUPED else place
    count = tl.load(total_ptr + row, inside, other=0)
    slots = tl.arange(0, BN)
    whole = slots[None, :] < ((count + 7) // 8 * 8)[:, None]
    kept = slots[None, :] < count[:, None]
    at = place[:, None] * pitch + slots[None, :]
    x = tl.load(scores_ptr + plane * stored * pitch + at, whole, other=0.0).to(tl.float32)
    x = tl.where(kept, x, -float("inf"))
    largest = tl.maximum(tl.max(x, 1), -1.0e30)  # a row without slots has none
    p = tl.exp(x - largest[:, None])
    p = p * (1.0 / tl.maximum(tl.sum(p, 1), 1.0e-30))[:, None]
    tl.store(probs_ptr + plane * stored * pitch + at, p.to(probs_ptr.dtype.element_ty), whole)


@triton.jit(do_not_specialize=_SIZES)
def spmm(
    probs_ptr, v_ptr, out_ptr, start_ptr, end_ptr, step_ptr, map_ptr, offset_ptr, count_ptr, base_ptr,
    size, positions, stored, pitch8, blocks,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, MAPPED: tl.constexpr, STRIDED: tl.constexpr,
    FROM_ZERO: tl.constexpr, GROUPED: tl.constexpr, PIECES: tl.constexpr, SIMT: tl.constexpr,
):  # fmt: skip
    """BM rows x BD columns of P V, over the columns that the row block spans and no others (span specialisation [C]).

    Grid (ceil(D / BD), row blocks, batch * heads). P is gathered through the inverse map, zeros elsewhere; out (B, H, size, D).
    """
    block = (
        blocks - 1 - tl.program_id(1)
    )  # causal masks have their longest rows last: those first, so that no block ends late
    plane = tl.program_id(2).to(tl.int64)
    pitch = pitch8 * 8
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    position = block * BM + tl.arange(0, BM)
    inside = position < positions
    row = position
    if MAPPED:
        row = tl.load(map_ptr + position, mask=inside, other=-1)
        inside = row >= 0
    place = (position if GROUPED else row) * pitch
    probs_ptr += plane * stored * pitch
    v_ptr += plane * size * D
    nth = tl.arange(0, BK)
    acc = tl.zeros((BM, BD), tl.float32)
    for piece in tl.static_range(PIECES):
        start, end = tl.load(start_ptr + piece * blocks + block), tl.load(end_ptr + piece * blocks + block)
        step = tl.load(step_ptr + block) if STRIDED else 1
        if not STRIDED:
            start = start // BK * BK  # the loop walks a fixed grid of columns [C]
        entry = piece * size + row
        count = tl.load(count_ptr + entry, inside, other=0)
        if not FROM_ZERO:
            # The inverse map, once per block: all of its rows have one stride and remainder (transformation alignment).
            first = (start - tl.load(offset_ptr + entry, inside, other=0)) // step
            begin = place + first
            if PIECES > 1:
                begin += tl.load(base_ptr + entry, inside, other=0)
        for done in range(0, (end - start + step - 1) // step, BK):
            columns = start + (done + nth) * step
            if FROM_ZERO:
                whole = inside[:, None] & (columns < pitch)[None, :]
                p = tl.load(probs_ptr + place[:, None] + columns[None, :], whole, other=0.0)
                p = tl.where(columns[None, :] < count[:, None], p, 0.0)
            else:
                kept = (first[:, None] + (done + nth)[None, :]).to(tl.uint32) < count.to(tl.uint32)[:, None]
                p = tl.load(probs_ptr + begin[:, None] + (done + nth)[None, :], kept, other=0.0)
            v = tl.load(
                v_ptr + columns[:, None] * D + d[None, :],
                (columns[:, None] < size) & (d[None, :] < D),
                other=0.0,
            )
            if SIMT:
                acc = tl.dot(p.to(tl.float32), v.to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    tl.store(
        out_ptr + plane * size * D + row[:, None] * D + d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        inside[:, None] & (d[None, :] < D),
    )
