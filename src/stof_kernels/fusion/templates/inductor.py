"""A segment compiled by Inductor, without Dynamo's guards in front: shapes and dtypes are fixed by the capture."""

from __future__ import annotations

import copy

import torch

from ..graph import Kind
from ..segments import Run, Segment, example_inputs
from .base import Setting, Template, Unsupported


class Inductor(Template):
    """torch.compile's own back end on one segment."""

    name = "inductor"

    def check(self, segment: Segment) -> None:
        """Anything that has something to fuse; attention is one kernel already and matrix products alone are left to eager."""
        if Kind.ATTENTION in segment.kinds:
            raise Unsupported("an attention is one kernel already")
        if all(kind is Kind.COMPUTE for kind in segment.kinds) and len(segment.ops) == 1:
            raise Unsupported("a matrix product alone has nothing to fuse")

    def build(self, segment: Segment, setting: Setting) -> Run:
        """Compiles now, for the shapes, dtypes and strides of the segment's inputs."""
        from torch._inductor.compile_fx import compile_fx

        # The compiler edits the graph it is given.
        module = copy.deepcopy(segment.module)
        with torch.no_grad():
            return compile_fx(module, example_inputs(segment))
