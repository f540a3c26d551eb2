"""FusionScheme: which neighbouring operators share a kernel, as STOF's run-length bit code of any length.

One bit per operator, first operator first; a maximal run of equal bits is one segment, so that bits carry no other meaning
than where they change (STOF, PPoPP '26, doi 10.1145/3774934.3786434). The paper's words have 15 operators.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .graph import Kind

MAX_COMPUTE = 2
"""Most compute-intensive operators in one segment."""


@dataclass(frozen=True)
class FusionScheme:
    """Segments by their lengths, in order. ValueError unless each length is an integer >= 1."""

    lengths: tuple[int, ...]

    def __post_init__(self):
        for n in self.lengths:
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise ValueError(f"fusion scheme: a segment of length {n!r}, allowed: an integer >= 1")

    @classmethod
    def unfused(cls, operators: int) -> FusionScheme:
        """Every operator by itself."""
        return cls((1,) * operators)

    @classmethod
    def decode(cls, word: int, operators: int) -> FusionScheme:
        """The scheme of a code word for so many operators; a word and its complement are the same scheme.

        ValueError for a word that does not fit in ``operators`` bits.
        """
        if not 0 <= word < 1 << operators:
            raise ValueError(
                f"fusion scheme: word {word} for {operators} operators, allowed: 0 to {(1 << operators) - 1}"
            )
        bits = [word >> i & 1 for i in reversed(range(operators))]
        return cls(tuple(len(list(run)) for _, run in itertools.groupby(bits)))

    def encode(self) -> int:
        """The code word whose first bit is 0; `decode` inverts it."""
        word = 0
        for i, n in enumerate(self.lengths):
            word = word << n | ((1 << n) - 1) * (i % 2)
        return word

    @property
    def operators(self) -> int:
        """Number of operators."""
        return sum(self.lengths)

    @cached_property
    def segments(self) -> tuple[range, ...]:
        """Operator indices of each segment."""
        ends = list(itertools.accumulate(self.lengths, initial=0))
        return tuple(range(a, b) for a, b in itertools.pairwise(ends))

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Operators (from 1 on) that start a segment."""
        return tuple(s.start for s in self.segments[1:])

    @classmethod
    def from_boundaries(cls, boundaries: Sequence[int], operators: int) -> FusionScheme:
        """The scheme whose segments start at operator 0 and at each boundary."""
        ends = [0, *sorted(set(boundaries)), operators] if operators else [0]
        return cls(tuple(b - a for a, b in itertools.pairwise(ends)))

    def illegal(self, kinds: Sequence[Kind]) -> str | None:
        """Why these operators cannot be cut like this, or None.

        An attention (one operator, or a run of them if spelt out) is a segment by itself, and a segment has at most two
        compute-intensive operators. ValueError if the scheme has another number of operators.
        """
        if len(kinds) != self.operators:
            raise ValueError(f"fusion scheme: {self.operators} operators, got {len(kinds)} kinds")
        for segment in self.segments:
            inside = [kinds[i] for i in segment]
            if Kind.ATTENTION in inside:
                if set(inside) != {Kind.ATTENTION}:
                    return f"segment {_name(segment)} mixes attention with other operators"
                neighbours = [kinds[i] for i in (segment.start - 1, segment.stop) if 0 <= i < len(kinds)]
                if Kind.ATTENTION in neighbours:
                    return f"segment {_name(segment)} is a part of an attention"
            if inside.count(Kind.COMPUTE) > MAX_COMPUTE:
                count = inside.count(Kind.COMPUTE)
                return f"segment {_name(segment)} has {count} compute-intensive operators, allowed: {MAX_COMPUTE}"
        return None

    def __str__(self) -> str:
        return " ".join(_name(segment) for segment in self.segments)


def _name(segment: range) -> str:
    """``[3-7]`` or ``[8]``, counting operators from 1 as the paper does."""
    first, last = segment.start + 1, segment.stop
    return f"[{first}]" if first == last else f"[{first}-{last}]"
