"""The planner's DeviceSpec of a torch device."""

from __future__ import annotations

import platform
from functools import lru_cache

import torch

from ..planner import DeviceSpec, cpu_spec, cuda_spec


def device_spec(device: torch.device) -> DeviceSpec:
    """DeviceSpec of the CPU with torch's current thread count, or of a CUDA device by its properties."""
    if device.type == "cuda":
        return _cuda(device.index if device.index is not None else torch.cuda.current_device())
    return _cpu(torch.get_num_threads())


@lru_cache(maxsize=8)
def _cpu(threads: int) -> DeviceSpec:
    return cpu_spec(threads, platform.machine())


@lru_cache(maxsize=16)
def _cuda(index: int) -> DeviceSpec:
    p = torch.cuda.get_device_properties(index)
    return cuda_spec(
        p.name,
        (p.major, p.minor),
        p.multi_processor_count,
        p.shared_memory_per_multiprocessor,
        p.max_threads_per_multi_processor // 32,
    )
