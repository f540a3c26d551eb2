"""Formats: HOW a mask is stored and built."""

from .cells import CELL
from .layout import Layout
from .sparse_mask import SparseMask

__all__ = ["CELL", "Layout", "SparseMask"]
