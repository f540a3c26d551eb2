"""Generated kernels: each text is a file in the cache folder, each launch knows its compiled form before it happens.

On a GPU a kernel is compiled for stated argument types, so that other processes can do it ahead (`compiler`); elsewhere
Triton's interpreter runs it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from ... import settings
from . import compile_worker
from .base import compiles_for
from .rows import HELPERS

_IMPORTS = "import triton\nimport triton.language as tl\nfrom triton.language.extra import cuda\n"
# The functions that kernels share are a file of their own, parsed once per process.
_HEAD = """import importlib.util
import os
import sys

if "{name}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{name}", os.path.join(os.path.dirname(__file__), "{name}.py"))
    sys.modules["{name}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{name}"])
from {name} import *
"""
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
OVERLAP_FROM = 90
"""Compute capability from which a kernel may start while the one before it ends (programmatic dependent launch)."""


def path_of(source: str) -> str:
    """The file of a generated kernel."""
    return _path_in(settings.cache_dir() / "triton", source)


@lru_cache(maxsize=4096)
def _path_in(folder: Path, source: str) -> str:
    helpers = f"{_IMPORTS}{HELPERS}\n"
    name = f"stof_helpers_{_digest(helpers)}"
    _write(folder / f"{name}.py", helpers)
    text = f"{_IMPORTS}{_HEAD.format(name=name)}\n{source}\n"
    return str(_write(folder / f"k_{_digest(text)}.py", text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _write(path: Path, text: str) -> Path:
    """Write a file once and whole at once, so that writers cannot disturb readers."""
    folder = path.parent
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    return path


def load(source: str) -> ModuleType:
    """The module of a generated kernel."""
    return compile_worker.module_at(path_of(source))


@lru_cache(maxsize=16)
def arch_of(device: torch.device) -> int:
    """Compute capability as in 90; 0 where kernels are interpreted."""
    if not compiles_for(device):
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class Map:
    """A tensor map as a kernel's argument: tiles of ``block`` (rows, columns) of a contiguous matrix of this type."""

    dtype: torch.dtype
    block: tuple[int, int]

    def of(self, matrix: Tensor) -> Any:
        """The argument for a matrix (rows, columns), which is copied where its memory does not start at 16 bytes."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        matrix = matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()
        return TensorDescriptor.from_tensor(matrix, list(self.block))

    @property
    def kind(self) -> tuple[str, bool]:
        """Triton's type of the argument."""
        return f"tensordesc<{_TYPES[self.dtype][1:]}{list(self.block)}>", False


class Launch:
    """One kernel with its constants, ready to be compiled ahead and launched with tensors and integers.

    ``arguments`` describe what it will be launched with: nodes of a graph, tensors or dtypes for pointers, maps, integers.
    """

    def __init__(
        self,
        source: str,
        device: torch.device,
        arguments: Sequence[fx.Node | Tensor | torch.dtype | Map | int],
        constants: dict[str, int],
        warps: int,
        stages: int = 3,
    ):
        self._path, self._arch = path_of(source), arch_of(device)
        overlap = self._arch >= OVERLAP_FROM
        self._constants = {**constants, "OVERLAP": int(overlap)}
        self._options = {"warps": warps, "stages": stages, "overlap": overlap, "arch": self._arch}
        self._ready: dict[tuple, Any] = {}
        self._expected = tuple(_expected(a) for a in arguments)

    @property
    def task(self) -> dict[str, Any]:
        """What `compile_worker` has to compile for the arguments that are expected."""
        return self._task(self._expected)

    def _task(self, kinds: tuple[tuple[str, bool], ...]) -> dict[str, Any]:
        names = compile_worker.module_at(self._path).kernel.arg_names
        values = {name: self._constants[name] for name in names if name in self._constants}
        rest = iter(kinds)
        signature = [(name, "constexpr" if name in values else next(rest)[0]) for name in names]
        return {
            "path": self._path,
            "signature": signature,
            "constants": sorted(values.items()),
            "aligned": [i for i, (_, aligned) in enumerate(kinds) if aligned],
            **self._options,
        }

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Run it on the current stream."""
        if not self._arch:
            self._interpret(grid, arguments)
            return
        kinds = tuple(_kind(a) for a in arguments)
        kernel = self._ready.get(kinds)
        if kernel is None:
            kernel = self._ready[kinds] = compile_worker.compiled(self._task(kinds))
        constants = tuple(self._constants[name] for name in kernel.src.fn.arg_names[len(arguments) :])
        kernel[(*grid, 1, 1)[:3]](*arguments, *constants)

    def _interpret(self, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        kernel = compile_worker.module_at(self._path).kernel
        constants = {name: self._constants[name] for name in kernel.arg_names if name in self._constants}
        kernel[grid](*arguments, **constants)


def _kind(argument: Any) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is a multiple of 16."""
    if isinstance(argument, Tensor):
        return _TYPES[argument.dtype], argument.data_ptr() % 16 == 0
    if not isinstance(argument, int):
        return Map(argument.base.dtype, tuple(argument.block_shape)).kind
    return ("i32" if -(2**31) <= argument < 2**31 else "i64"), argument % 16 == 0


def _expected(argument: fx.Node | Tensor | torch.dtype | Map | int) -> tuple[str, bool]:
    """The same before there is a tensor: those that PyTorch allocates are aligned."""
    if isinstance(argument, Map):
        return argument.kind
    if isinstance(argument, fx.Node):
        argument = argument.meta["val"].dtype
    if isinstance(argument, Tensor):
        argument = argument.dtype
    return (_TYPES[argument], True) if isinstance(argument, torch.dtype) else _kind(argument)
