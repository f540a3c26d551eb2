"""FlexAttention: the mask as a function, compiled into torch's template, with a block mask made beforehand."""

from __future__ import annotations

from functools import cache

from .registry import Prepared, Problem, Tensors, method
from .sdpa import EXPERIMENTS


@cache
def _compiled():
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def prepare_flex(problem: Problem, tensors: Tensors, kernel_options: dict | None = None) -> Prepared:
    """Compiled call with the block mask of the problem's own predicate; compiled at the first run."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    # Each mask is a new function to Dynamo, which keeps a limited number of graphs and then refuses.
    torch._dynamo.reset()
    rule = problem.pattern.bind(problem.q_len, problem.kv_len, problem.device)

    def build():
        return create_block_mask(rule, None, None, problem.q_len, problem.kv_len, device=problem.device)

    block_mask, run = build(), _compiled()
    q, k, v = tensors.q, tensors.k, tensors.v

    def call():
        return run(
            q,
            k,
            v,
            block_mask=block_mask,
            scale=problem.scale,
            enable_gqa=problem.grouped,
            kernel_options=kernel_options,
        )

    return Prepared(call, problem.pattern, mask_build=build)


@method("flex_attention", label="FlexAttention", experiments=EXPERIMENTS, rank=50)
def flex_attention(problem: Problem, tensors: Tensors) -> Prepared:
    """torch's own template: Triton on CUDA, C++ on the CPU."""
    return prepare_flex(problem, tensors)
