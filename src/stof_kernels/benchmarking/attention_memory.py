"""Memory that a call takes while it runs, as torch's CUDA allocator counts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_MIB = 2.0**20


@dataclass(frozen=True)
class Peak:
    """MiB: the most held at any moment above what was held at first, and how much of it was gone when the call had ended."""

    most: float
    temporary: float


def held() -> int:
    """Bytes that tensors hold now."""
    import torch

    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def peak_of(run: Callable[[], object], before: int | None = None) -> Peak:
    """Memory of one call on CUDA; ``before``: bytes to count from, what is held now if not given."""
    import torch

    now = held()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    after, peak = held(), torch.cuda.max_memory_allocated()
    del result
    first = now if before is None else before
    return Peak(max(0, peak - first) / _MIB, max(0, peak - after) / _MIB)
