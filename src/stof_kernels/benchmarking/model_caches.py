"""What tuning must not find ready: caches of compilers on disk and in the process. What it may: a process that is warm."""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def warm_up(device: str) -> None:
    """Load what the first compilation in a process loads: the compiler's modules and workers, the libraries' handles."""
    x = torch.randn(64, 64, device=device)
    with empty_caches():
        torch.compile(lambda t: (t @ t).relu().sum(dim=-1), dynamic=False)(x)
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.synchronize()


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
