"""What Bolt's profiler is asked: one product, or two in a row. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from .templates import EPILOGUES


@dataclass(frozen=True, order=True)
class Gemm:
    """``batch`` products (m, k) x (n, k) transposed -> (m, n) in fp16; ``batch`` 0 is a plain one, ``epilogue`` a name."""

    m: int
    n: int
    k: int
    batch: int = 0
    epilogue: str = "linear"

    @property
    def number(self) -> int:
        """The epilogue as the kernels count it."""
        return EPILOGUES.index(self.epilogue)

    @property
    def flop(self) -> int:
        """Floating-point operations of the products."""
        return 2 * max(self.batch, 1) * self.m * self.n * self.k

    def __str__(self) -> str:
        times = f"{self.batch} x " if self.batch else ""
        return f"{times}({self.m}, {self.n}, {self.k}) {self.epilogue}"


@dataclass(frozen=True, order=True)
class Pair:
    """Two products in a row: the second's k is the first's n."""

    first: Gemm
    second: Gemm

    def __str__(self) -> str:
        return f"{self.first} then {self.second}"
