"""The inputs that all methods share, and the forms of a mask that torch's own operators take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry import Problem, Tensors

if TYPE_CHECKING:
    from torch import Tensor


def torch_dtype(name: str):
    """torch dtype of that name; ValueError if torch has no floating type called so."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {name!r}, allowed: float32, bfloat16, float16")
    return dtype


def make_tensors(problem: Problem) -> Tensors:
    """q, k, v of ``problem``, unit normal, drawn on the CPU so that every device and method gets the same numbers."""
    import torch

    generator = torch.Generator().manual_seed(problem.seed)
    dtype = torch_dtype(problem.dtype)

    def draw(heads: int, length: int) -> Tensor:
        shape = (problem.batch, heads, length, problem.head_dim)
        return torch.randn(shape, generator=generator).to(device=problem.device, dtype=dtype)

    q = draw(problem.heads, problem.q_len)
    return Tensors(q, draw(problem.kv_heads, problem.kv_len), draw(problem.kv_heads, problem.kv_len))


def keep_rows(problem: Problem, pattern, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of ``pattern`` as bool (batch | 1, heads | 1, stop - start, kv_len) on the problem's device."""
    import torch

    device = problem.device
    rule = pattern.bind(problem.q_len, problem.kv_len, device)
    b = torch.arange(problem.batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(problem.heads, device=device).view(1, -1, 1, 1)
    q = torch.arange(start, stop, device=device).view(1, 1, -1, 1)
    kv = torch.arange(problem.kv_len, device=device).view(1, 1, 1, -1)
    keep = rule(b, h, q, kv)
    return keep.expand(*keep.shape[:2], stop - start, problem.kv_len)


def dense_keep(problem: Problem) -> Tensor:
    """The problem's whole mask as contiguous bool (batch | 1, heads | 1, q_len, kv_len), True = attend."""
    return keep_rows(problem, problem.pattern, 0, problem.q_len).contiguous()


def additive_mask(problem: Problem) -> Tensor:
    """The problem's mask as 0 and -inf in the inputs' dtype, the form that torch's kernels read without converting."""
    import torch

    keep = dense_keep(problem)
    mask = torch.zeros(keep.shape, dtype=torch_dtype(problem.dtype), device=problem.device)
    return mask.masked_fill_(~keep, float("-inf"))


def is_top_left_causal(problem: Problem) -> bool:
    """Whether the mask is the causal one that torch's ``is_causal=True`` means."""
    return problem.pattern.family == "causal" and not problem.pattern.params["offset"]
