"""Rotary embedding of queries and keys in one pass (Triton): ``x * cos + rotate_half(x) * sin``, reading any strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..segments import Run, Segment
from .base import Setting, Template, Unsupported, require_triton, setting
from .library import load

aten = torch.ops.aten

_KERNEL = """
@triton.jit
def kernel(x_ptr, cos_ptr, sin_ptr, o_ptr, rows_total, heads, length, sb, sh, sl, cb, cl, ob, oh, ol, HALF: tl.constexpr,
           BH: tl.constexpr, BM: tl.constexpr):
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    half = tl.arange(0, BH)
    inside = (at[:, None] < rows_total) & (half[None, :] < HALF)
    l, h, b = at % length, at // length % heads, (at // length // heads).to(tl.int64)
    source = x_ptr + (b * sb + h * sh + l * sl)[:, None] + half[None, :]
    table = (b * cb + l * cl)[:, None] + half[None, :]
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    cos_low = tl.load(cos_ptr + table, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + table + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + table, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + table + HALF, mask=inside, other=0.0).to(tl.float32)
    target = o_ptr + (b * ob + h * oh + l * ol)[:, None] + half[None, :]
    tl.store(target, low * cos_low - high * sin_low, mask=inside)
    tl.store(target + HALF, high * cos_high + low * sin_high, mask=inside)
"""


@dataclass(frozen=True)
class Rotation:
    """One rotated tensor: what is rotated, its tables and its result."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    result: fx.Node


class Rotary(Template):
    """Rotations of (B, H, L, D) tensors by tables that broadcast over heads."""

    name: ClassVar[str] = "rotary"

    def check(self, segment: Segment) -> None:
        """Raises `Unsupported` unless every operator is a rotation whose channels lie side by side."""
        require_triton(segment)
        self.rotations(segment)

    def rotations(self, segment: Segment) -> list[Rotation]:
        """The rotations of a segment."""
        if any(op.name != "rope" for op in segment.ops):
            raise Unsupported("only rotary embeddings, this segment has other operators")
        found = [_rotation(node) for node in segment.computing if node.target is aten.cat.default]
        if {r.result for r in found} != set(segment.outputs):
            raise Unsupported("its results are not the rotations themselves")
        for r in found:
            x, out = r.x.meta["val"], r.result.meta["val"]
            if x.dim() != 4 or x.stride(-1) != 1 or out.stride(-1) != 1 or x.shape[-1] % 2:
                raise Unsupported(
                    f"a rotation of {tuple(x.shape)} with strides {x.stride()}, allowed: (B, H, L, even D), last 1"
                )
            for table in (r.cos.meta["val"], r.sin.meta["val"]):
                if table.dim() != 4 or table.shape[1] != 1 or table.shape[-2:] != x.shape[-2:] or table.stride(-1) != 1:
                    raise Unsupported(f"a table {tuple(table.shape)}, allowed: (1 or B, 1, L, D)")
            if r.cos.meta["val"].stride() != r.sin.meta["val"].stride():
                raise Unsupported("tables of different strides")
        return found

    def settings(self, segment: Segment) -> list[Setting]:
        """Rows of a block and warps."""
        return [setting(BM=m, warps=w) for m in (16, 4, 64) for w in (4, 1, 8)]

    def build(self, segment: Segment, setting: Setting) -> Run:
        """One launch per rotated tensor."""
        values, kernel = dict(setting), load(_KERNEL).kernel
        places, outputs = segment.placeholders, segment.outputs
        rotations = {r.result: r for r in self.rotations(segment)}
        block = max(16, 1 << (next(iter(rotations.values())).x.meta["val"].shape[-1] // 2 - 1).bit_length())

        def run(*inputs: Tensor) -> list[Tensor]:
            known = dict(zip(places, inputs, strict=True))
            results = []
            for node in outputs:
                r = rotations[node]
                x, cos, sin = (_value(n, known) for n in (r.x, r.cos, r.sin))
                meta = r.result.meta["val"]
                out = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=x.device)
                batch, heads, length, dim = x.shape
                total = batch * heads * length
                table = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(2))
                kernel[(-(-total // values["BM"]),)](
                    x,
                    cos,
                    sin,
                    out,
                    total,
                    heads,
                    length,
                    *x.stride()[:3],
                    *table,
                    *out.stride()[:3],
                    HALF=dim // 2,
                    BH=block,
                    BM=values["BM"],
                    num_warps=values["warps"],
                )
                results.append(out)
            return results

        return run


def _rotation(cat: fx.Node) -> Rotation:
    """The rotation around ``cat(-x[half:], x[:half])``, as `patterns` matched it."""
    (turned,) = cat.users
    (result,) = turned.users
    sin = next(a for a in turned.args if a is not cat)
    straight = next(a for a in result.args if a is not turned)
    x = cat.args[0][1].args[0]
    lower, upper = cat.args[0][1], cat.args[0][0].args[0]
    half = x.meta["val"].shape[-1] // 2
    if list(lower.args[1:]) not in ([3, 0, half], [-1, 0, half]) or upper.args[2] != half:
        raise Unsupported("a rotation that does not swap halves")
    return Rotation(x, next(a for a in straight.args if a is not x), sin, result)


def _value(node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor:
    """The tensor of an input or of a view of one."""
    if node not in known:
        known[node] = node.target(*fx.map_arg(node.args, lambda n: _value(n, known)), **node.kwargs)
    return known[node]
