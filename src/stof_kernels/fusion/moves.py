"""The moves of the first stage, at the boundaries of one compute-intensive operator's segment (STOF, PPoPP '26)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .graph import Kind
from .scheme import FusionScheme

EXPAND, SEIZE, COMPETE = "expand", "seize", "compete"


def moves(scheme: FusionScheme, kinds: Sequence[Kind], operator: int) -> Iterator[tuple[str, FusionScheme]]:
    """Legal schemes one move away, around the segment of a compute-intensive operator.

    - expand: the segment and a whole neighbour become one, no other segment is broken;
    - seize: the segment takes the nearest operator of a neighbour that has memory-intensive ones only;
    - compete: the segment takes the nearest memory-intensive operator of a neighbour with a product of its own; of two segments
      that want one operator, the one with fewer products may.
    """
    at = next(i for i, s in enumerate(scheme.segments) if operator in s)
    segment = scheme.segments[at]
    cuts = set(scheme.boundaries)
    proposals: list[tuple[str, set[int]]] = []
    for side in (1, -1):
        if not 0 <= at + side < len(scheme.segments):
            continue
        other = scheme.segments[at + side]
        border = segment.stop if side > 0 else segment.start
        proposals.append((EXPAND, cuts - {border}))
        taken = other.start if side > 0 else other.stop - 1
        shifted = (cuts - {border}) | {border + side}
        if len(other) < 2 or kinds[taken] is not Kind.MEMORY:
            continue
        products, own = (sum(kinds[i] is Kind.COMPUTE for i in s) for s in (other, segment))
        if products == 0 and all(kinds[i] is Kind.MEMORY for i in other):
            proposals.append((SEIZE, shifted))
        elif products and own <= products:
            proposals.append((COMPETE, shifted))
    for name, boundaries in proposals:
        proposed = FusionScheme.from_boundaries(sorted(boundaries), scheme.operators)
        if proposed.illegal(kinds) is None:
            yield name, proposed
