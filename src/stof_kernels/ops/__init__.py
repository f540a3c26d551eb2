"""Operators: the public calls, and the reference that specifies them."""

from . import reference
from .sparse_attention import plan, sparse_attention

__all__ = ["plan", "reference", "sparse_attention"]
