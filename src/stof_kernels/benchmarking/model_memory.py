"""Peak memory of a call: device memory that the process holds meanwhile, or on the CPU its resident memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_MIB = 1 << 20


def peak_mib(run: Callable[[], object], device: str) -> float | None:
    """Peak during one call, in MiB, weights included; None where this machine does not tell.

    On CUDA it is what the allocator has reserved, so that buffers which a CUDA graph keeps between calls count. On the CPU
    it is the resident memory of the whole process, interpreter and libraries included.
    """
    give_back(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved() / _MIB
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
        run()
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):
        return None
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)


def give_back(device: str) -> None:
    """Free what nothing refers to, and give it back to the device.

    cuBLAS keeps a workspace that it may have got out of a far larger block of an earlier cell: that block could not go back.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
