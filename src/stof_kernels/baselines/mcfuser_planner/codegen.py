"""A candidate as the text of one Triton kernel: loops and loads stand where its program has them.

Shapes and strides are written into the text as numbers, as the original compiles for static shapes. Loops over which several
tiles stay on chip are written out, because Triton has no arrays of registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .chain import INDICES, Chain
from .program import Loop, Statement
from .pruning import Candidate

Strides = tuple[int, int, int, int]
"""Steps in elements of (batch entry, head, the tensor's first loop, its second loop)."""

NAME = "mcfuser_kernel"
_LOG2E = math.log2(math.e)
_LEAST = "-1.0e30"  # start of a row's maximum: finite, so that a row whose scores are all -inf stays free of nan
_GELU = "0.5 * {c} * (1.0 + tl.erf({c} * 0.7071067811865476))"


@dataclass(frozen=True)
class Layout:
    """Where the tensors lie: strides of A, B, D, E and the mask M, ``heads`` per batch entry, ``group`` of them per key head.

    ``exact``: operands are float32, whose products must not be rounded to TensorFloat-32. ``scale`` multiplies C.
    ``mask_columns``: columns of the mask's tensor, where it is wider than n and -inf beyond it.
    """

    strides: tuple[tuple[str, Strides], ...]
    heads: int = 1
    group: int = 1
    scale: float = 1.0
    exact: bool = False
    mask_columns: int = 0

    def of(self, tensor: str) -> Strides:
        """The strides of a tensor."""
        return dict(self.strides)[tensor]


def source(candidate: Candidate, layout: Layout) -> str:
    """Text of the kernel."""
    return _Writer(candidate, layout).text()


def grid(candidate: Candidate) -> tuple[int, int]:
    """Blocks of the launch: those of one chain, chains."""
    return candidate.program.blocks, candidate.chain.batch


@dataclass
class _Writer:
    candidate: Candidate
    layout: Layout
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    at: dict[str, int] = field(default_factory=dict)
    """Which repetition of a loop that is written out the text is in."""

    def __post_init__(self) -> None:
        self.chain: Chain = self.candidate.chain
        self.program = self.candidate.program
        self.tiles = self.candidate.tiles
        self.several = {x: self.program.partial_tiles(x) for x in "CE"}
        self.written_out = {loop for loops in self.several.values() for loop in loops}
        self.wide = {tensor for tensor, strides in self.layout.strides if self._reach(tensor, strides) >= 2**31}

    def _reach(self, tensor: str, strides: Strides) -> int:
        """Largest offset inside one chain: 32 bits do for most tensors, not for the mask of a long sequence."""
        return sum(s * (self.chain.length(i) - 1) for s, i in zip(strides[2:], INDICES[tensor], strict=True))

    def text(self) -> str:
        pointers = ", ".join(f"{_variable(tensor)}_ptr" for tensor, _ in self.layout.strides)
        self._head()
        self._block(self.program.body)
        return "\n".join(["@triton.jit", f"def {NAME}({pointers}):", *self.lines])

    def _write(self, line: str) -> None:
        self.lines.append("    " * self.depth + line)

    def _head(self) -> None:
        """Which chain and which tile of its output a block works on."""
        heads, group = self.layout.heads, self.layout.group
        self._write(f"entry = (tl.program_id(1) // {heads}).to(tl.int64)")
        self._write(f"head = (tl.program_id(1) % {heads}).to(tl.int64)")
        for tensor, strides in self.layout.strides:
            shared = group > 1 and tensor in "BD"
            head = f"(head // {group})" if shared else "head"
            steps = [f"{name} * {step}" for name, step in (("entry", strides[0]), (head, strides[1])) if step]
            if steps:
                self._write(f"{_variable(tensor)}_ptr += {' + '.join(steps)}")
        rest = "tl.program_id(0)"
        extents = self.program.extents
        # The last loop of the grid varies fastest.
        for loop in reversed(self.program.grid):
            index = f"({rest} % {extents[loop]})"
            self._write(f"{loop} = {index} * {self.tiles.size(loop)} + tl.arange(0, {self.tiles.size(loop)})")
            rest = f"({rest} // {extents[loop]})"
        for loop in "mnkh":
            if extents[loop] == 1:
                self._write(f"{loop} = tl.arange(0, {self.tiles.size(loop)})")

    # ---- loops -------------------------------------------------------------------------------------------------------

    def _block(self, body: tuple[Loop | Statement, ...]) -> None:
        for item in body:
            if isinstance(item, Statement):
                self._statement(item)
            else:
                self._loop(item)

    def _loop(self, loop: Loop) -> None:
        self._initial(loop)
        base, tile = loop.base, self.tiles.size(loop.base)
        if base in self.written_out:
            for step in range(self.program.extents[base]):
                self.at[base] = step
                self._write(f"{base} = {step * tile} + tl.arange(0, {tile})")
                self._block(loop.body)
            del self.at[base]
            return
        self._write(f"for {base}_at in range(0, {self.program.extents[base] * tile}, {tile}):")
        self.depth += 1
        self._write(f"{base} = {base}_at + tl.arange(0, {tile})")
        self._block(loop.body)
        self.depth -= 1

    def _initial(self, loop: Loop) -> None:
        """Sums that this loop accumulates start at zero in front of it."""
        if loop.base == "k":
            self._zeros("C", loop)
        if loop.base == "n" and self.program.statement("C", "E").scope.count(loop.name):
            self._zeros("E", loop)
            if self.chain.softmax:
                for suffix in self._suffixes(self.program.statement("P", "C"), loop):
                    if self.chain.step == "softmax":
                        self._write(f"top{suffix} = tl.full(({self.tiles.m},), {_LEAST}, tl.float32)")
                    self._write(f"total{suffix} = tl.zeros(({self.tiles.m},), tl.float32)")

    def _zeros(self, tensor: str, loop: Loop) -> None:
        statement = self.program.statement("C", tensor)
        rows, columns = (self.tiles.size(i) for i in INDICES[tensor])
        for suffix in self._suffixes(statement, loop):
            self._write(f"{tensor.lower()}{suffix} = tl.zeros(({rows}, {columns}), tl.float32)")

    def _suffixes(self, statement: Statement, loop: Loop) -> list[str]:
        """Names of the tiles that a statement makes inside ``loop``: one per repetition of a loop that is written out."""
        inside = statement.scope[statement.scope.index(loop.name) + 1 :]
        repeated = [name[0] for name in inside if name[0] in self.written_out and self._keeps(statement, name[0])]
        if repeated:
            return [str(i) for i in range(self.program.extents[repeated[0]])]
        return [self._suffix(statement)]

    def _suffix(self, statement: Statement) -> str:
        """Name of the tile at this place of the text."""
        kept = [base for base in self.at if self._keeps(statement, base)]
        return "".join(str(self.at[base]) for base in kept)

    def _keeps(self, statement: Statement, base: str) -> bool:
        """Whether a statement's result is another one in each repetition of a loop that is written out."""
        if statement.kind == "P":  # a row's maximum and sum belong to each h that computes C anew
            return base == "h" and base in {name[0] for name in statement.scope}
        return base in self.several[statement.tensor]

    # ---- statements --------------------------------------------------------------------------------------------------

    def _statement(self, statement: Statement) -> None:
        if statement.kind == "L":
            self._load(statement.tensor)
        elif statement.kind == "S":
            self._store()
        elif statement.kind == "P":
            self._step()
        elif statement.tensor == "C":
            self._first_product()
        else:
            self._second_product()

    def _load(self, tensor: str) -> None:
        # What lies beyond a dimension adds nothing: zero in a product, -inf in front of a softmax.
        other = 'float("-inf")' if tensor == "M" else "0.0"
        guard = self._guard(tensor)
        extra = f", mask={guard}, other={other}" if guard else ""
        self._write(f"{_variable(tensor)} = tl.load({self._address(tensor)}{extra})")

    def _address(self, tensor: str) -> str:
        steps = zip(INDICES[tensor], ("[:, None]", "[None, :]"), self.layout.of(tensor)[2:], strict=True)
        cast = ".to(tl.int64)" if tensor in self.wide else ""
        terms = [f"{loop}{axis}{cast}" + (f" * {step}" if step != 1 else "") for loop, axis, step in steps]
        return f"{_variable(tensor)}_ptr + ({' + '.join(terms)})"

    def _guard(self, tensor: str) -> str:
        """Condition for a tile to lie inside its tensor, empty where tiles divide the dimensions."""
        terms = []
        for loop, axis in zip(INDICES[tensor], ("[:, None]", "[None, :]"), strict=True):
            length = self.chain.length(loop)
            if tensor == "M" and loop == "n":
                length = max(length, self.layout.mask_columns)
            if self.program.extents[loop] * self.tiles.size(loop) > length:
                terms.append(f"({loop}{axis} < {length})")
        return " & ".join(terms)

    def _first_product(self) -> None:
        c = f"c{self._suffix(self.program.statement('C', 'C'))}"
        summed = f", {c}" if self.program.extents["k"] > 1 else ""
        self._write(f"{c} = tl.dot(a, b{summed}{self._precision()})")

    def _second_product(self) -> None:
        e = f"e{self._suffix(self.program.statement('C', 'E'))}"
        c = f"c{self._suffix(self.program.statement('C', 'C'))}"
        left = f"{'p' if self.chain.step != 'none' else c}.to(d.dtype)"
        if self.program.extents["n"] == 1:
            self._write(f"{e} = tl.dot({left}, d{self._precision()})")
            return
        sum_ = f"{e} * shrink[:, None]" if self.chain.step == "softmax" else e
        self._write(f"{e} = tl.dot({left}, d, {sum_}{self._precision()})")

    def _precision(self) -> str:
        return ', input_precision="ieee"' if self.layout.exact else ""

    def _step(self) -> None:
        """The step between the products, on the float32 tile of C; result in p."""
        c = f"c{self._suffix(self.program.statement('C', 'C'))}"
        if self.chain.softmax:
            self._softmax(c, self._suffix(self.program.statement("P", "C")))
        elif self.chain.step == "relu":
            self._write(f"p = tl.maximum({c}, 0.0)")
        else:
            self._write(f"p = {_GELU.format(c=c)}")

    def _softmax(self, c: str, suffix: str) -> None:
        """Scores in units of log 2, exponentials, and the row's running sum (and maximum, unless ``softmax_exp``)."""
        self._write(f"x = {c} * {self.layout.scale * _LOG2E!r}")
        if self.chain.mask:
            self._write(f"x += mask.to(tl.float32) * {_LOG2E!r}")
        elif self.program.extents["n"] * self.tiles.n > self.chain.n:
            self._write(f'x = tl.where(n[None, :] < {self.chain.n}, x, float("-inf"))')
        top, total, alone = f"top{suffix}", f"total{suffix}", self.program.extents["n"] == 1
        if self.chain.step == "softmax":
            self._write(f"new = tl.maximum({_LEAST if alone else top}, tl.max(x, 1))")
            self._write("p = tl.exp2(x - new[:, None])")
            if not alone:
                self._write(f"shrink = tl.exp2({top} - new)")
                self._write(f"{total} = {total} * shrink + tl.sum(p, 1)")
                self._write(f"{top} = new")
                return
        else:
            self._write("p = tl.exp2(x)")
        self._write(f"{total} = tl.sum(p, 1)" if alone else f"{total} += tl.sum(p, 1)")

    def _store(self) -> None:
        e = f"e{self._suffix(self.program.statement('C', 'E'))}"
        if self.chain.softmax:
            # A row that keeps nothing has the sum 0 and gives 0.
            total = f"total{self._suffix(self.program.statement('P', 'C'))}"
            self._write(f"{e} = {e} / tl.where({total} == 0.0, 1.0, {total})[:, None]")
        guard = self._guard("E")
        self._write(
            f"tl.store({self._address('E')}, {e}.to(e_ptr.dtype.element_ty){f', mask={guard}' if guard else ''})"
        )


def _variable(tensor: str) -> str:
    """Name of a tensor in the text; ``m`` is the loop."""
    return "mask" if tensor == "M" else tensor.lower()
