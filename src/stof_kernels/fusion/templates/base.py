"""What a template is: a way to run a segment as (ideally) one kernel, with parameters to choose from."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import torch

from ..segments import Run, Segment

Setting = tuple[tuple[str, int], ...]
"""A template's parameters by name, sorted; hashable, and one JSON object in the cache."""
Program = TypeVar("Program")


class Unsupported(Exception):
    """A template cannot run a segment; the text is the reason."""


class Template(ABC):
    """One way to run segments. The reference of every template is the segment's own module."""

    name: ClassVar[str]

    def supports(self, segment: Segment) -> str | None:
        """Why it cannot run this segment, or None: then there are settings for it."""
        try:
            self.check(segment)
            self.settings(segment)
        except Unsupported as reason:
            return str(reason)
        return None

    @abstractmethod
    def check(self, segment: Segment) -> None:
        """Raises `Unsupported` with the reason if it cannot run this segment."""

    def promising(self, segment: Segment) -> bool:
        """Whether a search of seconds should try it on a segment that it supports: no where it was seen to lose by far."""
        return True

    def settings(self, segment: Segment) -> list[Setting]:
        """Parameters worth trying, the default first. Raises `Unsupported` where none fits."""
        return [()]

    @abstractmethod
    def build(self, segment: Segment, setting: Setting) -> Run:
        """A callable that runs any segment of this key."""


class TritonTemplate(Template, Generic[Program]):
    """A template whose Triton kernels are generated from what it reads out of a segment: the segment's program."""

    @abstractmethod
    def analyse(self, segment: Segment) -> Program:
        """What a kernel of this template has to compute. Raises `Unsupported` with the reason if it cannot."""

    def program(self, segment: Segment) -> Program:
        """The same, found once for a segment: its settings and all of its kernels start from it, none changes it."""
        if self.name not in segment.programs:
            segment.programs[self.name] = self.analyse(segment)
        return segment.programs[self.name]

    def check(self, segment: Segment) -> None:
        """Raises `Unsupported` where Triton cannot run or the segment has no program."""
        require_triton(segment)
        self.program(segment)


def setting(**values: int) -> Setting:
    """Parameters as a `Setting`."""
    return tuple(sorted(values.items()))


def compiles_for(device: torch.device) -> bool:
    """Whether Triton compiles kernels for a device; elsewhere they are interpreted."""
    import triton

    return device.type == "cuda" and not triton.knobs.runtime.interpret


def require_triton(segment: Segment) -> None:
    """Raises `Unsupported` unless Triton can run kernels for the segment; its interpreter runs them on the CPU."""
    if importlib.util.find_spec("triton") is None:
        raise Unsupported("triton is not installed")
    import triton

    interpreted = triton.knobs.runtime.interpret
    if segment.device.type != "cuda" and not interpreted:
        raise Unsupported(f"triton needs a CUDA device, the segment is on {segment.device.type}")
    if interpreted and any(node.meta["val"].dtype == torch.bfloat16 for node in segment.placeholders):
        raise Unsupported("triton's interpreter rounds bfloat16 wrongly")
