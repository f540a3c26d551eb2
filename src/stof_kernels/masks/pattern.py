"""The base of every mask: a predicate over (batch, head, query, key) positions that names itself.

A pattern says WHAT attends to what and nothing about storage, tiles or devices. `Pattern.bind` gives the predicate for one
pair of lengths; `Pattern.bounds` gives a conservative answer for whole rectangles, so that a builder need not look at every
position. Tests hold the two equal for every pattern.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MaskMod = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]
"""``(b, h, q, kv) -> bool``, elementwise over broadcastable integer tensors; also a valid FlexAttention ``mask_mod``."""

Bounds = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], tuple["Tensor", "Tensor"]]
"""``(q_lo, q_hi, kv_lo, kv_hi) -> (maybe, full)`` over inclusive ranges, elementwise over broadcastable integer tensors.

``maybe`` False: no position of the rectangle is kept. ``full`` True: every position is. Anything else promises nothing.
"""


class Pattern(ABC):
    """A mask as a rule. Subclasses are frozen dataclasses whose fields are the rule's parameters."""

    family: ClassVar[str]
    per_head: ClassVar[bool] = False
    """Whether the rule looks at its ``b`` and ``h`` arguments; if not, one plane serves every batch entry and head."""

    @abstractmethod
    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Predicate for ``q_len`` queries and ``kv_len`` keys; tables it needs are made on ``device``."""

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Conservative rectangle test for the same lengths. The default knows nothing: maybe everywhere, full nowhere."""
        return _know_nothing

    @property
    def params(self) -> dict[str, object]:
        """The rule's parameters by name, in declaration order."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.family}({', '.join(f'{k}={_short(v)}' for k, v in self.params.items())})"

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection(self, _as_pattern(other))

    def __or__(self, other: Pattern) -> Pattern:
        return Union(self, _as_pattern(other))

    def __invert__(self) -> Pattern:
        return Complement(self)


def _know_nothing(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
    maybe = (q_lo <= q_hi) & (kv_lo <= kv_hi)
    return maybe, ~maybe


def _short(value: object) -> str:
    """Parameter as text; a long tuple keeps its first entries and its length."""
    if isinstance(value, tuple):
        head = "+".join(str(v) for v in value[:6])
        return head if len(value) <= 6 else f"{head}+..({len(value)})"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _as_pattern(value: object) -> Pattern:
    if isinstance(value, Pattern):
        return value
    if callable(value):
        return predicate(value)
    raise TypeError(f"mask pattern: got {type(value).__name__}, allowed: a Pattern or a callable (b, h, q, kv) -> bool")


@dataclass(frozen=True)
class Intersection(Pattern):
    """Kept where both patterns keep: ``a & b``."""

    family: ClassVar[str] = "and"
    left: Pattern
    right: Pattern

    @property
    def per_head(self) -> bool:
        """Whether either part is."""
        return self.left.per_head or self.right.per_head

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Predicate of both."""
        left, right = self.left.bind(q_len, kv_len, device), self.right.bind(q_len, kv_len, device)
        return lambda b, h, q, kv: left(b, h, q, kv) & right(b, h, q, kv)

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Rectangle test of both."""
        left, right = self.left.bounds(q_len, kv_len, device), self.right.bounds(q_len, kv_len, device)

        def both(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            (maybe_l, full_l), (maybe_r, full_r) = (f(q_lo, q_hi, kv_lo, kv_hi) for f in (left, right))
            return maybe_l & maybe_r, full_l & full_r

        return both

    def __str__(self) -> str:
        return f"({self.left} & {self.right})"


@dataclass(frozen=True)
class Union(Pattern):
    """Kept where either pattern keeps: ``a | b``."""

    family: ClassVar[str] = "or"
    left: Pattern
    right: Pattern

    @property
    def per_head(self) -> bool:
        """Whether either part is."""
        return self.left.per_head or self.right.per_head

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Predicate of either."""
        left, right = self.left.bind(q_len, kv_len, device), self.right.bind(q_len, kv_len, device)
        return lambda b, h, q, kv: left(b, h, q, kv) | right(b, h, q, kv)

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Rectangle test of either; a rectangle that only both together fill is not called full."""
        left, right = self.left.bounds(q_len, kv_len, device), self.right.bounds(q_len, kv_len, device)

        def either(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            (maybe_l, full_l), (maybe_r, full_r) = (f(q_lo, q_hi, kv_lo, kv_hi) for f in (left, right))
            return maybe_l | maybe_r, full_l | full_r

        return either

    def __str__(self) -> str:
        return f"({self.left} | {self.right})"


@dataclass(frozen=True)
class Complement(Pattern):
    """Kept where the pattern removes: ``~a``."""

    family: ClassVar[str] = "not"
    inner: Pattern

    @property
    def per_head(self) -> bool:
        """Whether the negated pattern is."""
        return self.inner.per_head

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """Negated predicate."""
        inner = self.inner.bind(q_len, kv_len, device)
        return lambda b, h, q, kv: ~inner(b, h, q, kv)

    def bounds(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Bounds:
        """Negated rectangle test: empty and full change places."""
        inner = self.inner.bounds(q_len, kv_len, device)

        def negated(q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            maybe, full = inner(q_lo, q_hi, kv_lo, kv_hi)
            return ~full, ~maybe

        return negated

    def __str__(self) -> str:
        return f"~{self.inner}"


@dataclass(frozen=True)
class Predicate(Pattern):
    """A user's own rule ``fn(b, h, q, kv) -> bool tensor``."""

    family: ClassVar[str] = "predicate"
    per_head: ClassVar[bool] = True  # unknown, so every plane is asked
    fn: MaskMod
    name: str

    def bind(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
        """The function itself."""
        return self.fn

    def __str__(self) -> str:
        return f"predicate({self.name})"


def predicate(fn: MaskMod, name: str | None = None) -> Predicate:
    """Pattern from any elementwise function ``fn(b, h, q, kv) -> bool``, such as a FlexAttention ``mask_mod``.

    ``b, h, q, kv`` arrive as broadcastable int64 tensors on the mask's device; indexing captured tensors with them is fine,
    Python control flow on their values is not.
    """
    if not callable(fn):
        raise TypeError(f"predicate: got {type(fn).__name__}, allowed: a callable (b, h, q, kv) -> bool tensor")
    return Predicate(fn, name or getattr(fn, "__name__", type(fn).__name__))
