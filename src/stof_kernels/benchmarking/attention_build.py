"""The experiment ``mask_build``: how long each method takes to bring a mask into its own form, and the memory it takes.

A cell gives one ``mask_build_time`` row per form (named in ``operator``): wall time of a call, read-backs included, warm. Forms
that never touch the host also have a ``device_time``, from replays of a CUDA graph. ``peak_memory``, on CUDA, is what a build
held for a while and gave back: temporaries, without the mask itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from stof_kernels.baselines import Problem

from .attention_masks import HeadBlocks
from .attention_memory import peak_of
from .cell import Measured, failure, kept_of, numbers_of, rows_or_reason, shared_tensors
from .experiments import Cell
from .measurement import Measurement
from .timing import Timing, device_arm, interleave, time_alone

if TYPE_CHECKING:
    from torch import Tensor

_LOOKED_AT = 1 << 26
"""Positions up to which a mask that was built is compared one by one; above, the number of kept ones is."""


@dataclass(frozen=True)
class Form:
    """One way to build: ``build()`` returns the mask, ``right(mask)`` whether it is the one asked for.

    ``on_device``: nothing is read back, so that a CUDA graph can hold it.
    """

    name: str
    build: Callable[[], Any]
    right: Callable[[Any], bool]
    on_device: bool = False


def measure_cell(cell: Cell, job: Measured) -> list[Measurement]:
    """Rows of one cell; a form that fails gives one row with its status and does not spoil the others."""
    return rows_or_reason(cell.problem, job, _measure)


def _measure(problem: Problem, job: Measured) -> list[Measurement]:
    forms = _FORMS[job.method.id](problem)
    kept, rows = kept_of(problem), []
    for name, make in forms.items():
        try:
            rows += _rows(problem, job, make(name), kept)
        except Exception as error:
            status, note = failure(error)
            rows.append(job.row(problem, "mask_build_time", operator=name, status=status, note=note, kept=kept))
    return rows


def _rows(problem: Problem, job: Measured, form: Form, kept: float) -> Iterator[Measurement]:
    place = {"operator": form.name, "kept": kept}
    if not form.right(form.build()):
        yield job.row(problem, "mask_build_time", **place, status="wrong_result", note="it keeps other positions")
        return
    built = time_alone(form.build, problem.device, job.budget.max_samples, job.budget.budget_s)
    yield job.row(problem, "mask_build_time", **numbers_of(built), **place, exact=True)
    if problem.device == "cpu":
        return  # torch counts the memory of its CUDA allocator only
    if form.on_device:
        arm = device_arm(form.build, problem.device, job.budget)
        times = [t for turn in interleave([arm], job.budget)[0] for t in turn]
        yield job.row(problem, "device_time", **numbers_of(Timing.of(times)), **place, exact=True, note=arm.note)
    yield job.row(problem, "peak_memory", median=peak_of(form.build).temporary, **place)


Forms = dict[str, Callable[[str], Form]]


def _stof(problem: Problem) -> Forms:
    """From the rule, from a dense tensor, into buffers of fixed capacity, and up to the point where a kernel can start."""
    from stof_kernels import SparseMask

    size, pattern, device = (problem.q_len, problem.kv_len), problem.pattern, problem.device
    dense = _dense_of(problem)

    def right(mask: SparseMask) -> bool:
        return _same_positions(problem, mask.check(), dense)

    def from_rule(name: str) -> Form:
        if isinstance(pattern, HeadBlocks):
            table = pattern.table(*size, device)[None]
            return Form(name, lambda: SparseMask.from_blocks(table, pattern.block, *size), right)
        return Form(name, lambda: SparseMask.from_pattern(pattern, *size, device=device), right)

    def from_dense(name: str) -> Form:
        keep = dense()
        return Form(name, lambda: SparseMask.from_dense(keep), right)

    def prepared(name: str) -> Form:
        keep, tensors = dense(), shared_tensors(problem)
        return Form(name, lambda: SparseMask.from_dense(keep).prepare(tensors.q, tensors.k), right)

    def fixed(name: str) -> Form:
        keep = dense()
        return Form(name, lambda: SparseMask.from_dense(keep, capacity="max"), right, on_device=True)

    def update(name: str) -> Form:
        keep, tensors = dense(), shared_tensors(problem)
        mask = SparseMask.from_dense(~keep, capacity="max").prepare(tensors.q, tensors.k)
        return Form(name, lambda: mask.update_(keep), right, on_device=True)

    return {
        "from_blocks" if isinstance(pattern, HeadBlocks) else "from_pattern": from_rule,
        "from_dense": from_dense,
        "from_dense_prepared": prepared,
        "from_dense_fixed": fixed,
        "update": update,
    }


def _sdpa(problem: Problem) -> Forms:
    """The two dense forms that scaled_dot_product_attention takes: bool, and additive in the inputs' dtype."""
    from stof_kernels.baselines.inputs import additive_mask, dense_keep

    return {
        "dense_bool": lambda name: Form(name, lambda: dense_keep(problem), lambda keep: keep.dtype.itemsize == 1),
        "dense_additive": lambda name: Form(
            name, lambda: additive_mask(problem), lambda mask: mask.is_floating_point()
        ),
    }


def _flex(problem: Problem) -> Forms:
    """The block mask of 128 x 128 tiles from the mask's own rule, made as FlexAttention's documentation does."""
    from torch.nn.attention.flex_attention import create_block_mask

    rule = problem.pattern.bind(problem.q_len, problem.kv_len, problem.device)
    heads = problem.heads if problem.pattern.per_head else None
    dense = _dense_of(problem)

    def build() -> Any:
        return create_block_mask(rule, None, heads, problem.q_len, problem.kv_len, device=problem.device)

    return {"create_block_mask": lambda name: Form(name, build, lambda mask: _same_tiles(problem, mask, dense))}


_FORMS: dict[str, Callable[[Problem], Forms]] = {"stof": _stof, "sdpa": _sdpa, "flex_attention": _flex}


def _dense_of(problem: Problem) -> Callable[[], Tensor]:
    """The mask as a bool tensor, made when it is first asked for and then kept."""
    from stof_kernels.baselines.inputs import dense_keep

    return cache(lambda: dense_keep(problem))


def _same_positions(problem: Problem, mask: Any, dense: Callable[[], Tensor]) -> bool:
    """Whether a SparseMask keeps what the rule keeps."""
    if problem.q_len * problem.kv_len > _LOOKED_AT:
        return abs(mask.kept - kept_of(problem)) * mask.batch * mask.heads * problem.q_len * problem.kv_len < 0.5
    return bool((mask.to_dense() == dense()).all())


def _same_tiles(problem: Problem, mask: Any, dense: Callable[[], Tensor]) -> bool:
    """Whether a block mask lists exactly the tiles in which the rule keeps something."""
    import torch.nn.functional as F

    if problem.q_len * problem.kv_len > _LOOKED_AT:
        return True
    rows, cols = mask.BLOCK_SIZE
    kept = F.max_pool2d(dense().float(), (rows, cols), ceil_mode=True) > 0
    return bool((mask.to_dense().bool() == kept).all())
