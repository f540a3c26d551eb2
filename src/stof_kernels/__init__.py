"""Exact attention with arbitrary masks, and the workflow that reproduces STOF (PPoPP '26) around it.

Names are loaded on first use, so that the parts which plan and plot never wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import masks, ops, planner
    from .formats import SparseMask
    from .fusion import optimize
    from .ops import plan, sparse_attention

_LAZY = {
    "SparseMask": "formats",
    "sparse_attention": "ops",
    "plan": "ops",
    "optimize": "fusion",
    "masks": None,
    "planner": None,
    "ops": None,
    "kernels": None,
    "formats": None,
    "fusion": None,
    "integrations": None,
}

__all__ = ["SparseMask", "__version__", "masks", "ops", "optimize", "plan", "planner", "sparse_attention"]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _LAZY[name]
    if module is None:
        return importlib.import_module(f".{name}", __name__)
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
