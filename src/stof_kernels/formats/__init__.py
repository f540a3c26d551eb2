"""Formats: HOW a mask is stored and built."""

from .cells import CELL
from .sparse_mask import SparseMask

__all__ = ["CELL", "SparseMask"]
