"""T5's position bias in rows of keys, for compilers that read it where it lies.

transformers looks it up as (queries, keys, heads) and hands out a transposed view, of which every layer's attention reads
one element in twelve of a line. A compiler that lays a transpose out anew, as TVM does, never sees that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_TABLE = "relative_attention_bias"


@torch.library.custom_op("stof_kernels::in_rows", mutates_args=())
def in_rows(x: Tensor) -> Tensor:
    """A contiguous copy of any tensor. Compilers do not look into it, so none reads the tensor behind it instead."""
    return x.clone(memory_format=torch.contiguous_format)


@in_rows.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def keep_bias_in_rows(model: nn.Module) -> None:
    """From now on the model's tables of relative positions give the same values with the heads outermost in memory.

    A model without such a table (all but T5) is left alone; calling it again does no harm. It stays: a model compiled
    with it would be compiled again without it.
    """
    for name, table in model.named_modules():
        if name.rpartition(".")[2] == _TABLE and _heads_outermost not in table._forward_hooks.values():
            table.register_forward_hook(_heads_outermost)


def _heads_outermost(table: nn.Module, given: tuple[Tensor, ...], values: Tensor) -> Tensor:
    """Values (queries, keys, heads), in memory (heads, queries, keys)."""
    return in_rows(values.permute(2, 0, 1)).permute(1, 2, 0)
