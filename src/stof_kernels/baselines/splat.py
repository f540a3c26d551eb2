"""SPLAT (OOPSLA 2025, arXiv 2407.16847): attention over regular sparse masks in the affine-compressed format ACSR.

Rebuilt from its description and the author's public generators and Triton port. A call is three kernels, R-SDDMM, R-softmax and
R-SpMM, with scores and probabilities in memory between them; tiles at poset anchors, span specialisation, transformation
alignment. ACSR holds one arithmetic progression of columns per row and one mask for all heads; anything else is `unsupported`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .registry import Prepared, Problem, Tensors, Unsupported, method

if TYPE_CHECKING:
    from .splat_kernels.stages import Stored

_COMMON = {"depends": ("baselines/splat_kernels",), "devices": ("cuda",), "reimplemented": True}


def _require(problem: Problem) -> None:
    """Raises `Unsupported`, with the original's reason, for problems that no mask makes possible."""
    if problem.q_len != problem.kv_len:
        raise Unsupported("SPLAT's masks are square; here queries and keys differ in number")
    if problem.grouped:
        raise Unsupported("SPLAT's kernels have one key head per query head; no grouped queries")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise Unsupported("needs Triton, which torch's CUDA builds bring") from None


def _prepare(problem: Problem, tensors: Tensors, store: Callable[[], list[Stored]], simt: bool = False, note: str = ""):
    """``store()`` once for the calls, with configurations tuned on these tensors; again, planned alike, to time the build."""
    from .splat_kernels.attention import Attention, Plan

    attention = Attention(store(), tensors.q, tensors.k, tensors.v, problem.scale, simt)
    choices = [plan.choice for plan in attention.plans]
    notes = [note, *map(str, attention.plans)]
    return Prepared(
        attention.run,
        problem.pattern,
        note="; ".join(filter(None, notes)),
        mask_build=lambda: [Plan(mask, choice) for mask, choice in zip(store(), choices, strict=True)],
    )


@method("splat", label="SPLAT (reimpl.)", experiments=("mha",), rank=61, **_COMMON)
def splat(problem: Problem, tensors: Tensors, simt: bool = False) -> Prepared:
    """One ACSR, Tensor Core products as in the author's Triton port."""
    _require(problem)
    from .splat_kernels.build import acsr_of
    from .splat_kernels.stages import Stored

    return _prepare(problem, tensors, lambda: [Stored([acsr_of(problem)], problem.device)], simt)


@method("splat_simt", label="SPLAT (reimpl., no Tensor Cores)", experiments=(), rank=62, **_COMMON)
def splat_simt(problem: Problem, tensors: Tensors) -> Prepared:
    """The same with float32 FMA on CUDA cores, as STOF's authors describe the SPLAT that they rebuilt. For `duel`."""
    return splat(problem, tensors, simt=True)


@method("splat_pieces", label="SPLAT (reimpl.) + unions", experiments=("mha",), rank=63, **_COMMON)
def splat_pieces(problem: Problem, tensors: Tensors) -> Prepared:
    """Our extension, not SPLAT's: rows of several runs, such as Longformer's, as a union of ACSRs in the same three kernels."""
    _require(problem)
    from .splat_kernels.attention import store_union
    from .splat_kernels.build import is_one_acsr, pieces_of

    if is_one_acsr(problem):
        raise Unsupported("one ACSR holds this mask: measured as splat")
    note = f"our extension: union of {len(pieces_of(problem))} ACSRs"
    return _prepare(problem, tensors, lambda: store_union(pieces_of(problem), problem.device), note=note)
