"""Compiles CUDA sources, as plain C++ with simt/simt.h in place of CUDA's headers, into a library of the CPU."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from stof_kernels import settings
from stof_kernels.kernels.instances import HopperSplitTile, HopperTile
from stof_kernels.provenance import PACKAGE_ROOT

SIMT = Path(__file__).parent / "simt"
_CUDA = PACKAGE_ROOT / "kernels/csrc/attention/cuda"
_PROBE = "#include <ucontext.h>\nint main() { _Float16 x = 1; ucontext_t c; return getcontext(&c) + int(x) - 1; }\n"


def emulated_library(folder: Path, units: list[Path], includes: list[Path], level: str = "-O2") -> ctypes.CDLL:
    """The library of ``units``; skips the test where the compiler lacks what the emulator needs."""
    compiler = shlex.split(settings.cxx())
    probe = folder / "probe.cpp"
    probe.write_text(_PROBE)
    if subprocess.run([*compiler, "-std=c++17", str(probe), "-o", str(folder / "probe")], check=False).returncode:
        pytest.skip("the emulator needs a C++ compiler with _Float16 and ucontext")
    made = folder / "emulated.so"
    # A library's inline variables are its own: GNU compilers would let all that are loaded share the first one's.
    own = ["-fno-gnu-unique"]
    if subprocess.run([*compiler, *own, "-fsyntax-only", str(probe)], capture_output=True, check=False).returncode:
        own = []
    command = [*compiler, "-std=c++17", level, *own, "-fPIC", "-shared", "-w", *(f"-I{i}" for i in (SIMT, *includes))]
    run = subprocess.run([*command, *map(str, units), "-o", str(made)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(made))


def hopper_sources(folder: Path, headers: Iterable[str], tiles: Iterable[HopperTile | HopperSplitTile]) -> None:
    """Puts a Hopper kernel's ``headers`` into the folder, and kernels.inc: EMULATED(number, template arguments) a tile."""
    for name in headers:
        text = (_CUDA / name).read_text(encoding="utf-8")
        text = text.replace("extern __shared__ unsigned char raw[];", "unsigned char* const raw = shared_memory;")
        (folder / name).write_text(text.replace("#ifdef __CUDACC__", "#if 1"))
    lines = [f"EMULATED({i}, {', '.join(map(str, tile.arguments))})" for i, tile in enumerate(tiles)]
    (folder / "kernels.inc").write_text("\n".join(lines) + "\n")
