"""What tuning must not find ready: caches of compilers on disk and in the process. What it may: a process that is warm."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch


@cache
def warm_up(device: str) -> None:
    """Load what the first compilation in a process loads: the compiler's modules and workers, the libraries' handles."""
    one_assembler()
    x = torch.randn(64, 64, device=device)
    with empty_caches():
        torch.compile(lambda t: (t @ t).relu().sum(dim=-1), dynamic=False)(x)
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.synchronize()


def one_assembler() -> None:
    """Let this process and Inductor's workers take the same ptxas: torch's own, as the workers do; a set path is kept.

    Its version is part of Triton's key of a compiled kernel. A process that asks Triton for it before the path is set keeps
    that of Triton's ptxas, so under torch 2.11 it finds nothing of what the workers compiled: max-autotune compiles each
    candidate again, one after the other, while the device falls idle (on an H200 105 s instead of 29, and a slower pick).
    """
    ptxas = Path(torch.__file__).parent / "bin" / "ptxas"
    if os.access(ptxas, os.X_OK):
        os.environ.setdefault("TRITON_PTXAS_PATH", str(ptxas))


@contextmanager
def empty_caches() -> Iterator[None]:
    """Inductor's and Triton's caches in a new folder that is gone afterwards, and none of their compiled code in memory."""
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    _forget_triton()
    with tempfile.TemporaryDirectory(prefix="stof_tuning_", ignore_cleanup_errors=True) as folder:
        with fresh_cache(dir=folder, delete=False):
            yield
        torch._dynamo.reset()


def _forget_triton() -> None:
    """Drop the kernels that Triton has compiled in this process: each keeps its own by specialisation."""
    jit = sys.modules.get("triton.runtime.jit")
    if jit is None:
        return
    for found in gc.get_objects():
        if type(found) is jit.JITFunction and hasattr(found, "device_caches"):
            found.device_caches.clear()
