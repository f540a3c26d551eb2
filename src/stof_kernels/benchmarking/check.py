"""Whether a method's output is right: its distance from a reference of the mask that it applied, over every element."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from stof_kernels.baselines.inputs import keep_rows

if TYPE_CHECKING:
    from torch import Tensor

    from stof_kernels.baselines import Problem, Tensors
    from stof_kernels.masks import Pattern

TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}
"""Largest relative error of a right result per input dtype; a method above it gets status wrong_result and no time."""

_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


def relative_error(problem: Problem, tensors: Tensors, applied: Pattern, out: Tensor) -> float:
    """||out - ref|| / ||ref|| over all batches, heads and positions; nan if the output holds nan.

    The reference is float64 on the CPU and float32 on CUDA, computed in strips of queries so that any cell fits in memory.
    ValueError if ``out`` has another shape than q.
    """
    return relative_errors(problem, tensors, applied, [out])[0]


def relative_errors(problem: Problem, tensors: Tensors, applied: Pattern, outs: Sequence[Tensor]) -> list[float]:
    """`relative_error` of each output of the same mask, with one reference for all."""
    import torch

    from stof_kernels.ops import reference

    for out in outs:
        if out.shape != tensors.q.shape:
            raise ValueError(f"output has shape {tuple(out.shape)}, allowed: {tuple(tensors.q.shape)}")
    dtype = torch.float64 if problem.device == "cpu" else torch.float32
    q, k, v = (t.to(dtype) for t in (tensors.q, tensors.k, tensors.v))
    difference = torch.zeros(len(outs), dtype=torch.float64, device=problem.device)
    norm = torch.zeros_like(difference)
    step = _strip(problem, dtype.itemsize)
    for start in range(0, problem.q_len, step):
        stop = min(start + step, problem.q_len)
        keep = keep_rows(problem, applied, start, stop)
        ref, _ = reference.attention(q[:, :, start:stop], k, v, keep, scale=problem.scale, dtype=dtype)
        for i, out in enumerate(outs):
            difference[i] += (out[:, :, start:stop].to(dtype) - ref).double().square().sum()
        norm += ref.double().square().sum()
    return (difference / norm).sqrt().tolist()


def _strip(problem: Problem, item_bytes: int) -> int:
    """Queries per strip such that the scores of all batches and heads fit the chunk."""
    row = problem.batch * problem.heads * problem.kv_len * item_bytes
    return max(1, min(problem.q_len, _CHUNK_BYTES[problem.device] // row))


def same_output(first: Tensor, last: Tensor, tolerance: float) -> bool:
    """Whether the output after timing is still the checked one: a race or a stale buffer shows here."""
    return float((last.double() - first.double()).norm()) <= tolerance * float(first.double().norm())


@lru_cache(maxsize=64)
def kept_share(pattern: Pattern, q_len: int, kv_len: int, heads: int = 1, device: str = "cpu") -> float:
    """Share of (query, key) pairs that the pattern keeps, counted position by position in strips, over ``heads`` planes."""
    import torch

    rule, kept, step = pattern.bind(q_len, kv_len, device), 0, max(1, (16 << 20) // kv_len)
    kv = torch.arange(kv_len, device=device)[None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    for head in range(heads):
        for start in range(0, q_len, step):
            q = torch.arange(start, min(start + step, q_len), device=device)[:, None]
            kept += int(rule(zero, zero + head, q, kv).expand(len(q), kv_len).sum())
    return kept / (heads * q_len * kv_len)
