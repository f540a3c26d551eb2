"""Candidates as callable kernels: the generated text as a module file, compiled by Triton, launched on tensors."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

from torch import Tensor

from stof_kernels import settings

from .codegen import NAME, Layout, grid, source
from .pruning import Candidate

_HEAD = "# Written by stof_kernels.baselines.mcfuser_planner.\nimport triton\nimport triton.language as tl\n\n\n"


@dataclass(frozen=True)
class Launch:
    """How Triton runs a candidate; neither is part of the method's space. Triton 2.1's defaults were 4 and 3."""

    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Kernel:
    """A candidate for tensors of one layout."""

    candidate: Candidate
    layout: Layout
    launch: Launch = Launch()

    def __str__(self) -> str:
        return f"{self.candidate}, {self.launch.warps} warps, {self.launch.stages} stages"

    @cached_property
    def function(self) -> Any:
        """Triton's function of the generated text, made once: the text is not written again for each call."""
        return getattr(load(source(self.candidate, self.layout)), NAME)

    @cached_property
    def _grid(self) -> tuple[int, int]:
        return grid(self.candidate)

    def compile(self, tensors: Sequence[Tensor]) -> Any:
        """Compile without running; a compiler's exception where it cannot."""
        return self.function.warmup(*tensors, grid=self._grid, **self._options)

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Run on A, B, (mask,) D, E in the layout's order; E is written."""
        self.function[self._grid](*tensors, **self._options)

    @cached_property
    def _options(self) -> dict[str, int]:
        return {"num_warps": self.launch.warps, "num_stages": self.launch.stages}


@lru_cache(maxsize=4096)
def load(text: str) -> ModuleType:
    """Module of a kernel's text. Triton reads a kernel's source from its file, so the text lies in the cache folder.

    The file is named by its content and renamed into place when whole: concurrent processes write the same bytes.
    """
    text = f"{_HEAD}{text}\n"
    name = f"mcfuser_{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    path = settings.cache_dir() / "mcfuser" / f"{name}.py"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, path)
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
