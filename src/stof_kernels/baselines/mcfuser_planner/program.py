"""The program of one thread block: a DAG of loops and statements, placed by scope and order edges. [paper]

Statements are loads (L), computations (C) and stores (S). A scope edge puts a statement inside loops that index its tensor, an
order edge puts a producer before its consumer. Then: a loop that runs once is dead; a load moves out of every inner loop that
does not index its tensor; what consumes a sum stands behind the loop that completes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from .chain import INDICES, LOOPS
from .expressions import Expression

LIVE = dict.fromkeys(LOOPS, 2)
"""Extents of a program in general: no loop is dead."""

REDUCTION = {"C": "k", "E": "n"}


@dataclass(frozen=True)
class Statement:
    """``kind`` is ``L``, ``C``, ``S`` or ``P`` (the step on C between the products); ``scope`` its loops, outermost first.

    A loop that is opened once more behind the nest where it stood carries a number: ``h``, ``h1``, ``h2``.
    """

    kind: str
    tensor: str
    scope: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}_{self.tensor}"


@dataclass(frozen=True)
class Loop:
    """A loop inside the block and what it holds."""

    name: str
    body: tuple[Loop | Statement, ...]

    @property
    def base(self) -> str:
        """Which of the four loops it is."""
        return self.name[0]

    def __str__(self) -> str:
        return f"{self.base}{{{' '.join(map(str, self.body))}}}"


@dataclass(frozen=True)
class Program:
    """``grid``: loops bound to block indices; ``statements`` in order of execution; ``extents`` of the four loops."""

    grid: str
    statements: tuple[Statement, ...]
    extents: Mapping[str, int]

    def __str__(self) -> str:
        return f"[{self.grid}] {' '.join(map(str, self.body))}"

    @cached_property
    def body(self) -> tuple[Loop | Statement, ...]:
        """The statements as nested loops."""
        return _nest(self.statements, 0)

    def statement(self, kind: str, tensor: str) -> Statement | None:
        """The statement of that kind and tensor, if the program has it."""
        return next((s for s in self.statements if (s.kind, s.tensor) == (kind, tensor)), None)

    def repeats(self, statement: Statement) -> int:
        """How often a statement runs in all blocks of one chain."""
        return self.blocks * math.prod(self.extents[loop[0]] for loop in statement.scope)

    @property
    def blocks(self) -> int:
        """Thread blocks per chain."""
        return math.prod(self.extents[loop] for loop in self.grid)

    @cached_property
    def steps(self) -> int:
        """Statements that one chain executes, in all of its blocks."""
        return sum(self.repeats(statement) for statement in self.statements)

    def partial_tiles(self, tensor: str) -> tuple[str, ...]:
        """Loops over which several partial tiles of C or E stay on chip: they index it and run inside its reduction."""
        scope = self.statement("C", tensor).scope
        inside = _behind(scope, REDUCTION[tensor])
        return tuple(loop[0] for loop in inside if loop[0] in INDICES[tensor])

    def tiles_on_chip(self, tensor: str) -> int:
        """How many tiles of C or E a block holds at once."""
        return math.prod(self.extents[loop] for loop in self.partial_tiles(tensor))


def build(expression: Expression, extents: Mapping[str, int] = LIVE, step: bool = False, mask: bool = False) -> Program:
    """The program of an expression whose loops run ``extents`` times; ``step``: with a step between the products.

    The output's spatial loops are bound to blocks: m always, h where no reduction encloses it and the expression is deep.
    """
    live = [loop for loop in expression.order if extents[loop] > 1]
    grid = [loop for loop in live if loop == "m"]
    order = [loop for loop in live if loop != "m"]
    if not expression.flat and order[:1] == ["h"]:
        grid.append(order.pop(0))
    return Program("".join(grid), _place(tuple(order), step, mask), dict(extents))


@cache
def _place(order: tuple[str, ...], step: bool, mask: bool) -> tuple[Statement, ...]:
    """Every statement with its scope for the loops inside a block, outermost first."""
    first = _scope_of_first_product(order)
    outside = _before(first, "k")  # what still encloses C when its sum is complete
    second = _reopen(outside, "nh", order, 1)
    behind = _reopen(_before(second, "n"), "h", order, 2) if "n" in _bases(second) else second
    between = _reopen(outside, "n", order, 1)
    found = [Statement("L", "A", _hoist(first, "A")), Statement("L", "B", _hoist(first, "B"))]
    found.append(Statement("C", "C", first))
    if mask:
        found.append(Statement("L", "M", _hoist(between, "M")))
    if step:
        found.append(Statement("P", "C", between))
    found += [Statement("L", "D", _hoist(second, "D")), Statement("C", "E", second), Statement("S", "E", behind)]
    return tuple(_loads_before_use(found))


def _scope_of_first_product(order: tuple[str, ...]) -> tuple[str, ...]:
    """Loops around C += A B: up to the innermost that indexes it.

    h inside the reduction is left out: its consumer is pushed behind k, and nothing that it indexes remains there.
    """
    last = max((i for i, loop in enumerate(order) if loop in "nk"), default=-1)
    scope = order[: last + 1]
    inner = scope[scope.index("k") + 1 :] if "k" in scope else ()
    return tuple(loop for loop in scope if loop != "h" or loop not in inner)


def _reopen(outside: tuple[str, ...], wanted: str, order: tuple[str, ...], phase: int) -> tuple[str, ...]:
    """``outside`` and, inside it, those of the wanted live loops that it lacks, opened anew."""
    have = _bases(outside)
    return (*outside, *(f"{loop}{phase}" for loop in wanted if loop in order and loop not in have))


def _hoist(scope: tuple[str, ...], tensor: str) -> tuple[str, ...]:
    """The scope without the inner loops that do not index the tensor."""
    while scope and scope[-1][0] not in INDICES[tensor]:
        scope = scope[:-1]
    return scope


def _loads_before_use(statements: list[Statement]) -> Iterator[Statement]:
    """The same statements with each hoisted load before the loop that holds its use, and not between its parts."""
    placed: list[Statement] = []
    for statement in statements:
        at = len(placed)
        if statement.kind == "L":
            # The use follows directly; the loop it is in may have been opened by statements that stand before the load.
            use = next(s for s in statements[statements.index(statement) :] if s.kind != "L")
            inner = use.scope[: len(statement.scope) + 1]
            if len(inner) > len(statement.scope):
                while at and placed[at - 1].scope[: len(inner)] == inner:
                    at -= 1
        placed.insert(at, statement)
    yield from placed


def _nest(statements: tuple[Statement, ...], depth: int) -> tuple[Loop | Statement, ...]:
    found: list[Loop | Statement] = []
    i = 0
    while i < len(statements):
        scope = statements[i].scope
        if len(scope) == depth:
            found.append(statements[i])
            i += 1
            continue
        end = i
        while end < len(statements) and statements[end].scope[: depth + 1] == scope[: depth + 1]:
            end += 1
        found.append(Loop(scope[depth], _nest(statements[i:end], depth + 1)))
        i = end
    return tuple(found)


def _bases(scope: tuple[str, ...]) -> set[str]:
    return {loop[0] for loop in scope}


def _before(scope: tuple[str, ...], loop: str) -> tuple[str, ...]:
    """Loops outside the named one; the whole scope if it is not there."""
    bases = [name[0] for name in scope]
    return scope[: bases.index(loop)] if loop in bases else scope


def _behind(scope: tuple[str, ...], loop: str) -> tuple[str, ...]:
    bases = [name[0] for name in scope]
    return scope[bases.index(loop) + 1 :] if loop in bases else ()
