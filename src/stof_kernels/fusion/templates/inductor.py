"""A segment compiled by Inductor, without Dynamo's guards in front: shapes and dtypes are fixed by the capture."""

from __future__ import annotations

import copy

import torch

from ..graph import Kind
from ..segments import Run, Segment, example_inputs
from .base import Setting, Template, Unsupported, setting


class Inductor(Template):
    """torch.compile's own back end on one segment."""

    name = "inductor"

    def check(self, segment: Segment) -> None:
        """Anything that has something to fuse; attention is one kernel already and matrix products alone are left to eager."""
        if Kind.ATTENTION in segment.kinds:
            raise Unsupported("an attention is one kernel already")
        if all(kind is Kind.COMPUTE for kind in segment.kinds) and len(segment.ops) == 1:
            raise Unsupported("a matrix product alone has nothing to fuse")

    def settings(self, segment: Segment) -> list[Setting]:
        """Inductor's own defaults; on the CPU also other sizes of a thread's share and of a vector."""
        if segment.device.type == "cuda":
            return [()]
        return [setting(chunk=c, simd=s) for s in (0, 256) for c in (512, 64, 4096)]

    def build(self, segment: Segment, setting: Setting) -> Run:
        """Compiles now, for the shapes, dtypes and strides of the segment's inputs."""
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        # The compiler edits the graph it is given.
        module = copy.deepcopy(segment.module)
        with torch.no_grad(), config.patch(_options(dict(setting))):
            return compile_fx(module, example_inputs(segment))


def _options(values: dict[str, int]) -> dict[str, object]:
    """Inductor's configuration for a setting."""
    options: dict[str, object] = {}
    if "chunk" in values:
        options["cpp.min_chunk_size"] = values["chunk"]
    if values.get("simd"):
        options["cpp.simdlen"] = values["simd"]
    return options
