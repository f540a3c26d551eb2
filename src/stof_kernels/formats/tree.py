"""`SparseMask` as a pytree: torch.compile and torch.export take a mask as an input, and other masks of its shapes after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, MappingKey, register_pytree_node

from .layout import Layout
from .sparse_mask import TENSORS, SparseMask

_LAYOUT = tuple(f"layout.{name}" for name in ("ptr", "col", "slot", "bits", "plan"))
# What a graph may depend on. The name is not among it: another rule of the same shapes must not compile anew.
_STATIC = ("q_len", "kv_len", "batch", "heads", "fixed", "block")


def _flatten(mask: SparseMask) -> tuple[list[Tensor], tuple]:
    tensors = [getattr(mask, name) for name in TENSORS]
    static = tuple(getattr(mask, name) for name in _STATIC)
    return [*tensors, *(mask.layout.tensors if mask.layout else ())], static


def _flatten_with_keys(mask: SparseMask) -> tuple[list[tuple[Any, Tensor]], tuple]:
    leaves, static = _flatten(mask)
    keys = [GetAttrKey(name) for name in TENSORS] + [MappingKey(name) for name in _LAYOUT]
    return list(zip(keys, leaves, strict=False)), static


def _unflatten(tensors: list[Tensor], static: tuple) -> SparseMask:
    n = len(TENSORS)
    layout = Layout(*tensors[n:]) if len(tensors) > n else None
    return SparseMask(*tensors[:n], **dict(zip(_STATIC, static, strict=True)), layout=layout)


register_pytree_node(
    SparseMask,
    _flatten,
    _unflatten,
    serialized_type_name="stof_kernels.SparseMask",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_with_keys,
)
# Exported models are saved with their example inputs; loading them trusts nothing that is not named here.
torch.serialization.add_safe_globals([SparseMask])
