"""What a model is called with, as a flat list of tensors: the calling convention of everything below `optimize`.

A mask travels as the six tensors that its planned kernel reads. They are planned here, outside the graph, so that another mask
of the same lengths replays the same graph whatever it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..formats import SparseMask
from ..formats.layout import Layout

_MASK_TENSORS = 6  # ptr, col, slot, bits, counts, plan
Problem = tuple[Tensor, Tensor]
"""q and k on the meta device: what a mask's plan depends on besides the mask."""


class Mismatch(ValueError):
    """A call does not fit what was captured; the message says what differs."""


@dataclass
class Signature:
    """The structure of one call: where tensors and masks stand, and what everything else is.

    ``problems`` has one entry per mask, in order: the attention that `example_problems` saw it used in.
    """

    spec: pytree.TreeSpec
    leaves: tuple[object, ...]
    problems: list[Problem | None] = field(default_factory=list)

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> Signature:
        """The structure of an example call."""
        leaves, spec = _flatten(args, kwargs)
        described = tuple(_describe(leaf) for leaf in leaves)
        return cls(spec, described, [None] * sum(isinstance(leaf, SparseMask) for leaf in leaves))

    def tensors(self, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        """The flat tensors of a call. Raises `Mismatch` if it differs from the captured call in more than values."""
        leaves, spec = _flatten(args, kwargs)
        if spec != self.spec:
            raise Mismatch("the arguments have another structure than the captured ones")
        flat: list[Tensor] = []
        masks = iter(self.problems)
        for leaf, known in zip(leaves, self.leaves, strict=True):
            if not _same(_describe(leaf), known):
                raise Mismatch(f"an argument is {_describe(leaf)}, captured was {known}")
            if isinstance(leaf, SparseMask):
                flat += _mask_tensors(leaf, next(masks))
            elif isinstance(leaf, Tensor):
                flat.append(leaf)
        return flat

    @property
    def mask_positions(self) -> list[int]:
        """Positions of the masks' tensors among the flat ones."""
        at, found = 0, []
        for known in self.leaves:
            if isinstance(known, _MaskLeaf):
                found += range(at, at + _MASK_TENSORS)
                at += _MASK_TENSORS
            elif isinstance(known, _TensorLeaf):
                at += 1
        return found

    def plan_masks(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Choose kernels for the call's masks anew, as for masks never seen: what planning costs a first call."""
        masks = [leaf for leaf in _flatten(args, kwargs)[0] if isinstance(leaf, SparseMask)]
        for mask, problem in zip(masks, self.problems, strict=True):
            if problem is not None:
                replace(mask).layout_for(*problem)

    def arguments(self, flat: list[Tensor] | tuple[Tensor, ...]) -> tuple[tuple, dict[str, Any]]:
        """The call that flat tensors stand for, with masks put together again."""
        rest, leaves = iter(flat), []
        for known in self.leaves:
            if isinstance(known, _MaskLeaf):
                leaves.append(known.rebuild([next(rest) for _ in range(_MASK_TENSORS)]))
            else:
                leaves.append(next(rest) if isinstance(known, _TensorLeaf) else known)
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class _TensorLeaf:
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"a tensor {self.shape} of {self.dtype} on {self.device}"


@dataclass(frozen=True)
class _MaskLeaf:
    q_len: int
    kv_len: int
    batch: int
    heads: int
    device: torch.device

    def __str__(self) -> str:
        return f"a mask of {self.q_len} x {self.kv_len} for {self.batch} x {self.heads} planes on {self.device}"

    def rebuild(self, tensors: list[Tensor]) -> SparseMask:
        """A mask that only a traced call may use: its lists are the layout that the planned kernel reads."""
        ptr, col, slot, bits, counts, plan = tensors
        layout = Layout(ptr, col, slot, bits, plan)
        return SparseMask(ptr, col, slot, bits, counts, self.q_len, self.kv_len, self.batch, self.heads, layout=layout)


def _flatten(args: tuple, kwargs: dict[str, Any]) -> tuple[list[object], pytree.TreeSpec]:
    return pytree.tree_flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, SparseMask))


def _describe(leaf: object) -> object:
    if isinstance(leaf, SparseMask):
        return _MaskLeaf(leaf.q_len, leaf.kv_len, leaf.batch, leaf.heads, leaf.device)
    if isinstance(leaf, Tensor):
        return _TensorLeaf(tuple(leaf.shape), leaf.dtype, leaf.device)
    return leaf


def _same(a: object, b: object) -> bool:
    """Equality that says no where it is not defined, as for arrays."""
    try:
        return a is b or (type(a) is type(b) and bool(a == b))
    except Exception:
        return False


def _mask_tensors(mask: SparseMask, problem: Problem | None) -> list[Tensor]:
    if problem is None:
        plan = torch.full((4,), -1, dtype=torch.int64)
        return [mask.strip_ptr, mask.cell_col, mask.cell_slot, mask.cell_bits, mask.counts, plan]
    ptr, col, slot, bits, plan = mask.layout_for(*problem).tensors
    return [ptr, col, slot, bits, mask.counts, plan]


class _WatchAttention(TorchDispatchMode):
    """Notes which q and k each mask meets, recognising the mask by its counts tensor."""

    def __init__(self, masks: list[SparseMask]):
        super().__init__()
        self._index = {id(mask.counts): i for i, mask in enumerate(masks)}
        self.problems: list[Problem | None] = [None] * len(masks)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.stof.sparse_attention.default:
            index = self._index.get(id(args[8]))
            if index is not None:
                self.problems[index] = tuple(torch.empty_like(t, device="meta") for t in args[:2])
        return func(*args, **(kwargs or {}))


def example_problems(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Problem | None]:
    """The attention problem of each mask among the arguments, from one eager call of the model."""
    from ..kernels import raw

    masks = [leaf for leaf in _flatten(args, kwargs)[0] if isinstance(leaf, SparseMask)]
    if not masks:
        return []
    raw.load()
    with _WatchAttention(masks) as watch, torch.no_grad():
        model(*args, **kwargs)
    # The same mask object may stand in several places: all of them meet what the last one met.
    known = {id(mask): problem for mask, problem in zip(masks, watch.problems, strict=True) if problem is not None}
    return [known.get(id(mask)) for mask in masks]
