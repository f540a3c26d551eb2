"""SPLAT's attention: a mask is stored, planned and tuned once; a call is three launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .acsr import Acsr
from .stages import Job, Sddmm, SddmmStage, Softmax, SoftmaxStage, Spmm, SpmmStage, Stored, power_of_two

# Tiles up to 64 x 64 and inner steps up to 128; (16, 16, 2) and (16, 128, 2) are the author's [C]. Blocks of 64 rows have two
# warps: with four, Triton would use Hopper's own matrix instructions, which SPLAT never had.
SDDMM = (Sddmm(64, 64, 2), Sddmm(32, 64, 4), Sddmm(32, 32, 2), Sddmm(64, 32, 2), Sddmm(16, 64, 2), Sddmm(16, 16, 2))
SPMM = (Spmm(64, 64, 2), Spmm(64, 32, 2), Spmm(32, 64, 2), Spmm(32, 64, 4), Spmm(32, 128, 4), Spmm(16, 64, 2),
        Spmm(16, 128, 2))  # fmt: skip
_MOST_SLOTS = 16384  # of a softmax program with several rows
_GRAPH_US = 200.0  # a timed graph lasts about this long


def softmax_candidates(width: int) -> list[Softmax]:
    """One row per program, or several where rows are short (both are the author's [C]), at 8 or 32 slots per lane."""
    span = power_of_two(width)
    rows = [r for r in (1, 4, 16) if r == 1 or r * span <= _MOST_SLOTS]
    return list(dict.fromkeys(Softmax(r, min(16, max(1, r * span // 32 // share))) for r in rows for share in (8, 32)))


class Choice(NamedTuple):
    """Configurations of the three kernels."""

    sddmm: Sddmm
    softmax: Softmax
    spmm: Spmm


def first_choice(mask: Stored) -> Choice:
    """Each kernel's first candidate."""
    return Choice(SDDMM[0], softmax_candidates(mask.width)[0], SPMM[0])


class Plan:
    """A stored mask with its three stages."""

    def __init__(self, mask: Stored, choice: Choice):
        self.mask, self.choice = mask, choice
        self.sddmm, self.softmax = SddmmStage(mask, choice.sddmm), SoftmaxStage(mask, choice.softmax)
        self.spmm = SpmmStage(mask, choice.spmm)

    def launch(self, job: Job, out: Tensor) -> None:
        """Three kernels; writes this mask's rows of ``out``."""
        self.sddmm.launch(job)
        self.softmax.launch(job)
        self.spmm.launch(job, out)

    def __str__(self) -> str:
        return f"W {self.mask.width}; {self.sddmm}; {self.softmax}; {self.spmm}"


def tune(mask: Stored, job: Job) -> Choice:
    """Time the candidates of each kernel on this mask and these tensors and take the fastest; off the GPU the first."""
    if mask.device == "cpu":
        return first_choice(mask)
    out = torch.empty_like(job.q)
    sddmm, spmm = SDDMM, SPMM
    if job.simt or job.q.dtype == torch.float32:
        # Products on CUDA cores keep their operands in registers: more warps, each with less.
        sddmm, spmm = ([c._replace(warps=min(8, 4 * c.warps)) for c in some] for some in (sddmm, spmm))
    return Choice(
        _fastest(sddmm, lambda c: SddmmStage(mask, c).launch, job),
        _fastest(softmax_candidates(mask.width), lambda c: SoftmaxStage(mask, c).launch, job),
        _fastest(spmm, lambda c: SpmmStage(mask, c).launch, job, out),
    )


_Config = TypeVar("_Config", Sddmm, Softmax, Spmm)


def _fastest(candidates: Iterable[_Config], stage: Callable[[_Config], Callable], *arguments: object) -> _Config:
    from triton.runtime.errors import OutOfResources

    times: dict[_Config, float] = {}
    refused: Exception | None = None
    for config in candidates:
        launch = stage(config)
        try:
            times[config] = _microseconds(lambda launch=launch: launch(*arguments))
        except OutOfResources as error:
            refused = error
    if not times:
        raise refused or ValueError("no candidates")
    return min(times, key=times.__getitem__)


def _microseconds(call: Callable[[], object]) -> float:
    """Device time of one call inside a CUDA graph, after a call that compiles; the best of three replays."""
    call()
    calls = max(1, min(20, math.ceil(_GRAPH_US / max(1.0, _between_events(call)))))
    graph, side, main = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        graph.capture_begin()  # torch.cuda.graph would collect garbage first, which takes longer than all that is timed here
        for _ in range(calls):
            call()
        graph.capture_end()
    main.wait_stream(side)
    graph.replay()
    return min(_between_events(graph.replay) for _ in range(3)) / calls


def _between_events(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


class Attention:
    """Attention of one mask for fixed q, k and v: ``run()`` launches three kernels for each of its stored masks.

    ``masks``: one stored mask, or several that hold different rows (ours). ``choices``: tuned where not given.
    """

    def __init__(self, masks: list[Stored], q: Tensor, k: Tensor, v: Tensor, scale: float, simt: bool = False,
                 choices: list[Choice] | None = None):  # fmt: skip
        planes = q.shape[0] * q.shape[1]
        values = [[mask.empty_values(planes, q.dtype) for _ in range(2)] for mask in masks]
        self.jobs = [Job(q, k, v, scores, probs, scale, simt) for scores, probs in values]
        choices = choices or [tune(mask, job) for mask, job in zip(masks, self.jobs, strict=True)]
        self.plans = [Plan(mask, choice) for mask, choice in zip(masks, choices, strict=True)]

    def run(self) -> Tensor:
        """The output (B, H, S, D), a fresh tensor."""
        out = torch.empty_like(self.jobs[0].q)
        for plan, job in zip(self.plans, self.jobs, strict=True):
            plan.launch(job, out)
        return out


def store_union(pieces: list[Acsr], device: str) -> list[Stored]:
    """A union as one stored mask, or two where that stores at least a quarter less: long rows would set W for all (ours)."""
    totals = np.sum([piece.count for piece in pieces], axis=0)
    order = np.sort(totals)
    widest, below = int(order[-1]), np.arange(1, len(order) + 1)
    cells = below * order + (len(order) - below) * widest  # with the rows up to the i-th stored apart
    best = int(cells.argmin())
    if not widest or cells[best] > 0.75 * len(order) * widest:
        return [Stored(pieces, device)]
    short = totals <= order[best]
    return [Stored(_used(pieces, rows), device, np.flatnonzero(rows)) for rows in (short, ~short)]


def _used(pieces: list[Acsr], rows: np.ndarray) -> list[Acsr]:
    """Pieces of which the rows have something."""
    return [piece for piece in pieces if piece.count[rows].any()] or pieces[:1]
