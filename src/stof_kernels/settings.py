"""The one place that reads environment variables and decides where files outside the repository live."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for built libraries and tuning results, created on demand by its users.

    ``STOF_CACHE_DIR`` if set, else ``$XDG_CACHE_HOME/stof_kernels``, else ``~/.cache/stof_kernels``.
    """
    explicit = os.environ.get("STOF_CACHE_DIR")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "stof_kernels"


def shared_device() -> Path | None:
    """Folder through which measuring jobs take turns on one device: ``STOF_SHARED_DEVICE``, or None if it is not set.

    Jobs that are given the same folder prepare whole models side by side and are timed one by one (`benchmarking.turns`).
    """
    folder = os.environ.get("STOF_SHARED_DEVICE")
    return Path(folder).expanduser() if folder else None


def cxx() -> str:
    """C++ compiler command: ``CXX`` if set, else ``c++``."""
    return os.environ.get("CXX") or "c++"


def name_ptxas(path: Path) -> None:
    """Let Triton, here and in processes started from now on, assemble with ``path``; a set ``TRITON_PTXAS_PATH`` is kept."""
    os.environ.setdefault("TRITON_PTXAS_PATH", str(path))


def cuda_home() -> Path | None:
    """CUDA toolkit folder named by ``CUDA_HOME``, or None if it is not set."""
    home = os.environ.get("CUDA_HOME")
    return Path(home) if home else None


def max_build_jobs() -> int:
    """Parallel compiler jobs: ``MAX_JOBS`` if set, else the cores this process may use."""
    jobs = os.environ.get("MAX_JOBS")
    if jobs:
        return max(1, int(jobs))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
