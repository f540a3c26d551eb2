"""Bolt's white-box side: the list of templates, which of them fit a device, alignment and padding, residence of two products.

The list is the one of TVM's CUTLASS back end, where Bolt's search went: 7 templates of sm_75 and 18 of sm_80, tried together on
every newer card. Residence follows CUTLASS's example of back-to-back products. No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass

EPILOGUES = ("linear", "bias", "bias_relu", "bias_gelu")
"""What happens to a sum before it is stored, by number; GELU is the exact one, by erf."""
ALIGNMENTS = (8, 4, 2)
"""Elements of one access to memory, the first that divides the sizes; where it is not the largest, sizes are padded to that."""
PADDING = ALIGNMENTS[0]


@dataclass(frozen=True)
class Template:
    """A block of threads computes ``block`` = m x n in steps of k with a pipeline of ``stages``; ``warps`` along m, n and k."""

    block: tuple[int, int, int]
    stages: int
    warps: tuple[int, int, int]
    instruction: tuple[int, int, int] = (16, 8, 16)

    @property
    def family(self) -> str:
        """The architecture whose list it is from."""
        return "sm_75" if self.instruction[2] == 8 else "sm_80"

    def __str__(self) -> str:
        """As CUTLASS names it, with its family: rows x columns _ k x stages."""
        m, n, k = self.block
        return f"{self.family} {m}x{n}_{k}x{self.stages}"


def _templates() -> tuple[Template, ...]:
    turing = (
        *(((256, 128, 32), (4, 2, 1)), ((128, 256, 32), (2, 4, 1)), ((128, 128, 32), (2, 2, 1))),
        *(
            ((64, 128, 32), (2, 2, 1)),
            ((128, 64, 32), (2, 2, 1)),
            ((64, 64, 32), (2, 2, 1)),
            ((64, 128, 64), (1, 2, 2)),
        ),
    )
    wide = (((256, 128), (4, 2, 1)), ((128, 256), (2, 4, 1)), ((256, 64), (4, 1, 1)), ((64, 256), (1, 4, 1)))
    square = ((128, 128), (128, 64), (64, 128), (64, 64))
    stages = {
        32: ((3, 3, 4, 4), ((3, 4, 5), (6,), (6,), (10,))),
        64: ((3, 3, 4, 4), ((4,), (3,), (3,), (5,))),
    }
    found = [Template(block, 2, warps, (16, 8, 8)) for block, warps in turing]
    for k, (of_wide, of_square) in stages.items():
        found += [Template((*mn, k), s, warps) for (mn, warps), s in zip(wide, of_wide, strict=True)]
        found += [
            Template((*mn, k), s, (2, 2, 1)) for mn, several in zip(square, of_square, strict=True) for s in several
        ]
    return tuple(found)


TEMPLATES = _templates()
"""Every candidate; its number is its place here and in ``csrc/bolt/list.h``."""


def shared_bytes(template: Template) -> int:
    """Shared memory of a block: the pipeline, or the result on its way out, or sums of warps along k, whichever is larger."""
    m, n, k = template.block
    return max(2 * template.stages * (m + n) * k, 2 * m * (n + 8), 4 * (template.warps[2] - 1) * m * n)


def feasible(limit: int) -> list[int]:
    """Numbers of the templates whose blocks fit ``limit`` bytes of shared memory."""
    return [number for number, template in enumerate(TEMPLATES) if shared_bytes(template) <= limit]


def default_template(limit: int) -> int:
    """The fixed template that runs where nothing may be measured: the first of sm_80 with 128 x 128 x 32 that fits."""
    return next(n for n in feasible(limit) if TEMPLATES[n].block == (128, 128, 32) and TEMPLATES[n].family == "sm_80")


def alignment(*sizes: int) -> int:
    """Elements of one access: the first of `ALIGNMENTS` that divides all sizes; 1 where none does."""
    return next((a for a in ALIGNMENTS if all(size % a == 0 for size in sizes)), 1)


def padded(size: int) -> int:
    """The next multiple of 8, to which inner sizes are filled up with zeros."""
    return -(-size // PADDING) * PADDING


# ---- two products in one kernel --------------------------------------------------------------------------------------

PERSISTENT_ROWS, PERSISTENT_K, PERSISTENT_STAGES, PERSISTENT_WARPS = 64, 32, 3, 4
MOST_SUMS = 128  # registers of a thread for the sums of both products, of at most 255 for everything


@dataclass(frozen=True)
class PersistentKernel:
    """Computes two products with the first ``n0`` and the second ``n1`` wide, the first kept in ``residence``."""

    n0: int
    n1: int
    residence: str

    @property
    def shared_bytes(self) -> int:
        """Tiles of one loop at a time, and the first product where it is kept in shared memory."""
        first = PERSISTENT_STAGES * (PERSISTENT_ROWS + self.n0) * PERSISTENT_K
        second = PERSISTENT_STAGES * PERSISTENT_K * self.n1
        kept = PERSISTENT_ROWS * (self.n0 + 8) if self.residence == "shared memory" else 0
        return 2 * (max(first, second, PERSISTENT_ROWS * (self.n1 + 8)) + kept)

    def __str__(self) -> str:
        return f"{self.n0} then {self.n1} in {self.residence}"


PERSISTENT = (
    *(PersistentKernel(n0, n1, "registers") for n0, n1 in ((64, 64), (64, 128), (128, 64), (128, 128))),
    *(
        PersistentKernel(n0, n1, "shared memory")
        for n0, n1 in ((64, 256), (128, 256), (256, 64), (256, 128), (256, 256))
    ),
)
"""The persistent kernels that are compiled; a number is a place here and in ``csrc/bolt/list.h``."""
LARGEST_TILE_N = max(template.block[1] for template in TEMPLATES)


@dataclass(frozen=True)
class Residence:
    """Whether two products can share a kernel: the kernels that can, or the ``refusal`` as one line.

    ``registers`` says why a legal pair cannot keep the first product there.
    """

    kernels: tuple[PersistentKernel, ...] = ()
    refusal: str = ""
    registers: str = ""


def residence(m: int, n0: int, k0: int, n1: int, k1: int, second_m: int | None = None) -> Residence:
    """The threadblock residence test for (m, n0, k0) and then (m, n1, k1).

    Both products need the same rows, the second sums over the first's columns, and a block's tile must be as wide as either
    product, so that it holds all of the first one that it needs.
    """
    if second_m is not None and second_m != m:
        return Residence(refusal=f"rows differ: M = {m} then {second_m}, both products need the same rows")
    if k1 != n0:
        return Residence(refusal=f"not a chain: K1 = {k1} is not N0 = {n0}")
    for name, size in (("N0", n0), ("N1", n1)):
        if size > LARGEST_TILE_N:
            return Residence(
                refusal=f"no threadblock residence: {name} = {size} is above the widest tile, {LARGEST_TILE_N}"
            )
    found = tuple(kernel for kernel in PERSISTENT if (kernel.n0, kernel.n1) == (n0, n1))
    if k0 % PADDING:
        return Residence(refusal=f"K0 = {k0} is not a multiple of {PADDING}")
    if not found:
        return Residence(refusal=f"no threadblock residence: no tile is N0 = {n0} and then N1 = {n1} wide")
    # Warps stand along the rows only, so a thread holds its share of 16 rows of both products, in fp32.
    sums = PERSISTENT_ROWS // PERSISTENT_WARPS * (n0 + n1) // 32
    why = f"not in registers: sums of N0 = {n0} and N1 = {n1} take {sums} a thread, at most {MOST_SUMS}"
    return Residence(found, registers=why if sums > MOST_SUMS else "")
