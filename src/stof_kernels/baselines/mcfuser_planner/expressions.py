"""Tiling expressions: how the cross-tile loops m, n, k, h are nested. [paper]

A string reads from the outermost loop to the innermost; parentheses hold loops that follow one another. Two products have 24
deep expressions (all nested) and 2 flat ones (k and h side by side under n): 26.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .chain import LOOPS


@dataclass(frozen=True)
class Expression:
    """``nest``: loops inside each other; ``flat``: loops in sequence inside the innermost of them."""

    nest: str
    flat: str = ""

    def __post_init__(self) -> None:
        if sorted(self.nest + self.flat) != sorted(LOOPS) or self.flat not in ("", "kh"):
            raise ValueError(f"expression {self}: allowed: every order of {LOOPS}, or m and n and then (k,h)")

    def __str__(self) -> str:
        return f"{self.nest}({','.join(self.flat)})" if self.flat else self.nest

    @property
    def order(self) -> str:
        """All loops, the flat ones in their sequence."""
        return self.nest + self.flat


def all_expressions() -> tuple[Expression, ...]:
    """The 26 expressions of a chain of two products, deep ones first."""
    deep = [Expression("".join(order)) for order in itertools.permutations(LOOPS)]
    return (*deep, Expression("mn", "kh"), Expression("nm", "kh"))


def parse(text: str) -> Expression:
    """The expression that `str` wrote; ValueError for anything else."""
    nest, _, flat = text.partition("(")
    if "(" in text and not flat.endswith(")"):
        raise ValueError(f"expression {text!r}: allowed: such as mhnk or mn(k,h)")
    return Expression(nest, flat.rstrip(")").replace(",", ""))
