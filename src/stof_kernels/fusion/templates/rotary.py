"""Rotary embedding of queries and keys in one launch (Triton): ``x * cos + rotate_half(x) * sin``, reading any strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..segments import Run, Segment
from .base import Setting, TritonTemplate, Unsupported, setting
from .library import Launch
from .rowwise import indent
from .tiles import power_of_two

aten = torch.ops.aten

_KERNEL = """
@triton.jit
def kernel({pointers}, cos_ptr, sin_ptr, ROWS: tl.constexpr, HEADS: tl.constexpr, LENGTH: tl.constexpr,
           HALF: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    half = tl.arange(0, BH)
    inside = (at[:, None] < ROWS) & (half[None, :] < HALF)
    # Rows in the order of memory: heads of one token side by side.
    h, l, b = at % HEADS, at // HEADS % LENGTH, (at // HEADS // LENGTH).to(tl.int64)
    table = (b * {cb} + l * {cl})[:, None] + half[None, :]
    cos_low = tl.load(cos_ptr + table, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + table + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + table, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + table + HALF, mask=inside, other=0.0).to(tl.float32)
{body}
"""

_ROTATION = """
source = x{i}_ptr + (b * {sb} + h * {sh} + l * {sl})[:, None] + half[None, :]
low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
target = o{i}_ptr + (b * {ob} + h * {oh} + l * {ol})[:, None] + half[None, :]
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


class Rotary(TritonTemplate[list[Rotation]]):
    """Rotations of (B, H, L, D) tensors by tables that broadcast over heads."""

    name: ClassVar[str] = "rotary"

    def analyse(self, segment: Segment) -> list[Rotation]:
        """Its rotations. Raises `Unsupported` unless every operator is one, of channels that lie side by side."""
        if any(op.name != "rope" for op in segment.ops):
            raise Unsupported("only rotary embeddings, this segment has other operators")
        found = [rotation_of(node) for node in segment.computing if node.target is aten.cat.default]
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
        return [setting(BM=m, warps=w) for m, w in ((32, 4), (16, 4), (64, 4), (16, 2), (64, 8))]

    def build(self, segment: Segment, setting: Setting) -> Run:
        """One launch per rotated tensor."""
        values, places, outputs = dict(setting), segment.placeholders, segment.outputs
        rotations = {r.result: r for r in self.program(segment)}
        groups: dict[tuple, list[Rotation]] = {}
        for r in rotations.values():
            groups.setdefault((tuple(r.x.meta["val"].shape), r.cos, r.sin), []).append(r)
        launches = [(_launch(group, segment, values), group) for group in groups.values()]

        def run(*inputs: Tensor) -> list[Tensor]:
            known = dict(zip(places, inputs, strict=True))
            results = {}
            for (launch, grid), group in launches:
                sources = [value_of(r.x, known) for r in group]
                made = [_empty_like(r.result.meta["val"]) for r in group]
                launch(grid, *sources, *made, *(value_of(t, known) for t in (group[0].cos, group[0].sin)))
                results.update(zip((r.result for r in group), made, strict=True))
            return [results[node] for node in outputs]

        run.launches = tuple(launch for (launch, _), _ in launches)
        return run


def _empty_like(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _launch(group: list[Rotation], segment: Segment, values: dict[str, int]) -> tuple[Launch, tuple[int]]:
    """The launch that rotates tensors of one shape by the same tables, and its grid."""
    x, cos = group[0].x.meta["val"], group[0].cos.meta["val"]
    batch, heads, length, dim = x.shape
    body = []
    for i, r in enumerate(group):
        (sb, sh, sl), (ob, oh, ol) = r.x.meta["val"].stride()[:3], r.result.meta["val"].stride()[:3]
        body += _ROTATION.format(i=i, sb=sb, sh=sh, sl=sl, ob=ob, oh=oh, ol=ol).strip().splitlines()
    pointers = [f"{side}{i}_ptr" for side in "xo" for i in range(len(group))]
    table = {"cb": cos.stride(0) if cos.shape[0] > 1 else 0, "cl": cos.stride(2)}
    text = _KERNEL.format(pointers=", ".join(pointers), body=indent(body), **table)
    rows = batch * heads * length
    constants = {"ROWS": rows, "HEADS": heads, "LENGTH": length, "HALF": dim // 2, "BM": values["BM"]}
    constants["BH"] = power_of_two(dim // 2)
    described = [r.x for r in group] + [r.result for r in group] + [group[0].cos, group[0].sin]
    return Launch(text, segment.device, described, constants, values["warps"]), (-(-rows // values["BM"]),)


def rotation_of(cat: fx.Node) -> Rotation:
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


def value_of(node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor:
    """The tensor of an input or of a view of one."""
    if node not in known:
        known[node] = node.target(*fx.map_arg(node.args, lambda n: value_of(n, known)), **node.kwargs)
    return known[node]
