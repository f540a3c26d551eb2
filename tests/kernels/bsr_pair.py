"""Attention over square blocks of 64 (BSR) as three plain Triton kernels, what SPLAT is compared with off their grid."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64


@triton.jit
def _sddmm(q_ptr, k_ptr, values_ptr, lo_ptr, scale, size, most, reach, D: tl.constexpr, T: tl.constexpr):
    row, nth, plane = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, t, d = row * T + tl.arange(0, T), tl.arange(0, T), tl.arange(0, D)
    j = (tl.load(lo_ptr + row) + nth) * T + t
    q = tl.load(q_ptr + plane * size * D + i[:, None] * D + d[None, :])
    k = tl.load(k_ptr + plane * size * D + j[None, :] * D + d[:, None], (j < size)[None, :], other=0.0)
    kept = (j[None, :] - i[:, None] <= reach) & (i[:, None] - j[None, :] <= reach) & (j < size)[None, :]
    scores = tl.where(kept, tl.dot(q, k) * scale, -float("inf")).to(tl.float16)
    tl.store(
        values_ptr + ((plane * tl.num_programs(0) + row) * most + nth) * T * T + t[:, None] * T + t[None, :], scores
    )


@triton.jit
def _softmax(values_ptr, blocks, most, T: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    row, part, plane = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, slot = part * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    at = (slot // T * T * T + slot % T)[None, :] + i[:, None] * T
    base = values_ptr + (plane * blocks + row) * most * T * T
    x = tl.load(base + at, (slot < most * T)[None, :], other=-float("inf")).to(tl.float32)
    p = tl.exp(x - tl.max(x, 1)[:, None])
    tl.store(base + at, (p / tl.sum(p, 1)[:, None]).to(tl.float16), (slot < most * T)[None, :])


@triton.jit
def _spmm(values_ptr, v_ptr, out_ptr, lo_ptr, size, blocks, most, D: tl.constexpr, T: tl.constexpr):
    row, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, d = tl.arange(0, T), tl.arange(0, D)
    first = tl.load(lo_ptr + row) * T
    base = values_ptr + (plane * blocks + row) * most * T * T
    acc = tl.zeros((T, D), tl.float32)
    for nth in range(0, most):
        p = tl.load(base + nth * T * T + t[:, None] * T + t[None, :])
        j = first + nth * T + t
        v = tl.load(v_ptr + plane * size * D + j[:, None] * D + d[None, :], (j < size)[:, None], other=0.0)
        acc = tl.dot(p, v, acc)
    i = row * T + t
    tl.store(out_ptr + plane * size * D + i[:, None] * D + d[None, :], acc.to(tl.float16))


def windowed(q: Tensor, k: Tensor, v: Tensor, reach: int, scale: float):
    """Call for ``abs(q - kv) <= reach``; q, k, v fp16 (B, H, S, D) on CUDA, S a multiple of 64, D a power of two."""
    planes, (size, d) = q.shape[0] * q.shape[1], q.shape[2:]
    blocks = size // BLOCK
    starts = torch.arange(blocks, device=q.device) * BLOCK
    lo = ((starts - reach).clamp(min=0) // BLOCK).int()
    most = int(((starts + BLOCK - 1 + reach).clamp(max=size - 1) // BLOCK - lo + 1).max())
    values = torch.empty(planes, blocks, most, BLOCK, BLOCK, dtype=q.dtype, device=q.device)
    wide = triton.next_power_of_2(most * BLOCK)

    def run() -> Tensor:
        out = torch.empty_like(q)
        _sddmm[(blocks, most, planes)](q, k, values, lo, scale, size, most, reach, D=d, T=BLOCK, num_warps=2)
        _softmax[(blocks, 16, planes)](values, blocks, most, T=BLOCK, WIDE=wide, ROWS=4, num_warps=4)
        _spmm[(blocks, planes)](values, v, out, lo, size, blocks, most, D=d, T=BLOCK, num_warps=2)
        return out

    return run
