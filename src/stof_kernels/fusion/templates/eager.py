"""Operators one by one, as captured: supports everything and is what any other template has to beat."""

from __future__ import annotations

from ..segments import Run, Segment
from .base import Setting, Template


class Eager(Template):
    """PyTorch's own kernels (cuBLASLt and oneDNN among them), one call per operator."""

    name = "eager"

    def check(self, segment: Segment) -> None:
        """Everything that was captured runs."""

    def build(self, segment: Segment, setting: Setting) -> Run:
        """The segment's module."""
        return segment.module
