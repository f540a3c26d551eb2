"""Formats: HOW a mask is stored and built."""

from . import tree  # noqa: F401  (registers SparseMask as a pytree)
from .cells import CELL
from .layout import Layout
from .sparse_mask import SparseMask

__all__ = ["CELL", "Layout", "SparseMask"]
