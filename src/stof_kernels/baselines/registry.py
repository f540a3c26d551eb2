"""Every method that can be measured, behind one decorator per kind of problem; a method is one file.

What computes attention alone registers here and is a file of this folder; ways to run whole models are files of ``models/``,
ways to run a pair of operators are in ``pairs.py``. An id may stand in several kinds: it is the same system with one label.

This module and the discovery import no torch: Snakemake reads ids, labels and dependencies while it parses. A method's
module imports torch inside its function.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stof_kernels.masks import Pattern

if TYPE_CHECKING:
    from torch import Tensor

DEVICES = ("cpu", "cuda")
ATTENTION = "attention"
"""The kind of problem that ``@method`` prepares."""

# What every measured number depends on besides its own module: who times it, which inputs it gets, and what the masks are.
_COMMON = ("benchmarking/timing.py", "baselines/inputs.py", "masks")


class Unsupported(Exception):
    """Raised by a method's ``prepare`` for a problem that it cannot run; the text is the reason in the row's note."""


@dataclass(frozen=True)
class Problem:
    """One attention problem: q (batch, heads, q_len, head_dim), k and v (batch, kv_heads, kv_len, head_dim), and the mask.

    ``dtype`` is a torch dtype's name (``float32``), ``device`` ``cpu`` or ``cuda``; ``seed`` draws the tensors.
    """

    pattern: Pattern
    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str
    seed: int = 0

    @property
    def scale(self) -> float:
        """Factor on q.k, 1/sqrt(head_dim) for all methods."""
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key head."""
        return self.heads != self.kv_heads

    def columns(self) -> dict[str, object]:
        """What a row of measurement says about this problem."""
        return {
            "mask": self.pattern.family,
            "mask_params": mask_params(self.pattern),
            "batch": self.batch,
            "seq_len": self.q_len,
            "kv_len": self.kv_len,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden": self.heads * self.head_dim,
            "dtype": self.dtype,
        }


def mask_params(pattern: Pattern) -> str:
    """``w=32;g=32``: the pattern's parameters as a row carries them."""
    text = str(pattern)
    inside = text[text.index("(") + 1 : -1] if "(" in text else ""
    return inside.replace(", ", ";")


@dataclass(frozen=True)
class Tensors:
    """Inputs that all methods get for one problem: q (B, H, Lq, D), k and v (B, Hkv, Lk, D), contiguous, unit normal."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Prepared:
    """A method ready to be timed on one problem.

    ``run()`` returns the output (B, H, Lq, D) and holds nothing that belongs outside the timed call. ``applied`` is the mask
    that it really applies, and ``exact`` whether that is the problem's. ``mask_build()``, where a method needs a mask in a form
    of its own, builds it again from the pattern and is timed apart.
    """

    run: Callable[[], Tensor]
    applied: Pattern
    exact: bool = True
    note: str = ""
    mask_build: Callable[[], object] | None = None


Prepare = Callable[[Problem, Tensors], Prepared]


@dataclass(frozen=True)
class MethodSpec:
    """What is known about a method without running it.

    ``kind`` says what problems ``prepare`` takes; ``tuned`` that it compiles or searches first, and how long that takes counts.
    """

    id: str
    label: str
    experiments: tuple[str, ...]
    prepare: Callable[..., object] | None
    depends: tuple[str, ...]
    devices: tuple[str, ...] = DEVICES
    kind: str = ATTENTION
    tuned: bool = False
    reimplemented: bool = False
    exact_by_design: bool = True
    rank: int = 100
    absent: str = ""
    not_in: dict[str, str] = field(default_factory=dict)
    on_device: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def depends_on(self, device: str) -> tuple[str, ...]:
        """Package-relative names that numbers from ``device`` depend on: ``depends``, less what only another device runs."""
        others = {name for kind, names in self.on_device.items() if kind != device for name in names}
        return tuple(name for name in self.depends if name not in others - set(self.on_device.get(device, ())))

    def why_not(self, experiment: str, device: str) -> str:
        """Reason why this method cannot run there at all, known without importing torch; empty if it may run."""
        if self.absent:
            return self.absent
        if experiment in self.not_in:
            return self.not_in[experiment]
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        return ""


_METHODS: dict[tuple[str, str], MethodSpec] = {}  # by kind and id


def method(
    id: str,
    *,
    label: str,
    experiments: Iterable[str],
    depends: Iterable[str] = (),
    devices: Iterable[str] = DEVICES,
    reimplemented: bool = False,
    exact_by_design: bool = True,
    rank: int = 100,
    not_in: dict[str, str] | None = None,
    on_device: dict[str, tuple[str, ...]] | None = None,
) -> Callable[[Prepare], Prepare]:
    """Register ``prepare(problem, tensors) -> Prepared`` as the method ``id``.

    ``depends``: package-relative files or folders that its numbers depend on, besides its own module, the timer, the inputs and
    the masks. ``exact_by_design``: it applies any mask. ``rank``: place in tables and legends. ``not_in``: experiments that
    list the method with a reason instead of a number. ``on_device``: dependencies of the numbers of one kind of device only.
    """
    on_device = on_device or {}

    def register(prepare: Prepare) -> Prepare:
        folder, _, module = prepare.__module__.rpartition(".")
        own = (f"baselines/{module}.py",) if folder == __package__ else ()
        add(
            MethodSpec(
                id=id,
                label=label,
                experiments=tuple(experiments),
                prepare=prepare,
                depends=tuple(
                    dict.fromkeys((*own, *_COMMON, *depends, *(n for names in on_device.values() for n in names)))
                ),
                devices=tuple(devices),
                reimplemented=reimplemented,
                exact_by_design=exact_by_design,
                rank=rank,
                not_in=dict(not_in or {}),
                on_device=dict(on_device),
            )
        )
        return prepare

    return register


def absent_method(id: str, *, label: str, experiments: Iterable[str], reason: str, rank: int = 100) -> None:
    """Register a method that this reproduction does not have: its cells are rows with status unsupported and ``reason``."""
    depends = (f"baselines/{id}.py",)
    add(MethodSpec(id, label, tuple(experiments), None, depends, devices=(), rank=rank, absent=reason))


def add(spec: MethodSpec) -> None:
    """Register a method of any kind; ValueError for an id that its kind has already."""
    if (spec.kind, spec.id) in _METHODS:
        other = _METHODS[spec.kind, spec.id]
        raise ValueError(f"method {spec.id!r} is registered twice, by {other.depends[0]} and {spec.depends[0]}")
    _METHODS[spec.kind, spec.id] = spec


def discover(kinds: bool = True) -> None:
    """Import every module of this folder and of ``models/``, so that the decorators run; a new file needs no entry anywhere.

    ``kinds`` False leaves it at this folder's: the methods for attention, which the others take labels from.
    """
    package = importlib.import_module(__package__)
    for found in pkgutil.iter_modules(package.__path__):
        if not found.ispkg:  # folders hold what a method runs, which may import torch
            importlib.import_module(f"{__package__}.{found.name}")
    if kinds:
        models = importlib.import_module(f"{__package__}.models")
        for found in pkgutil.iter_modules(models.__path__):
            importlib.import_module(f"{models.__name__}.{found.name}")


def all_methods(kind: str = ATTENTION) -> list[MethodSpec]:
    """Every method of a kind, in the order of tables and legends; an empty kind means all kinds."""
    discover()
    found = [spec for (own, _), spec in _METHODS.items() if kind in ("", own)]
    return sorted(found, key=lambda spec: (spec.rank, spec.id))


def methods_for(experiment: str) -> list[MethodSpec]:
    """Methods of any kind that have rows in ``experiment``, in the order of tables and legends."""
    return [spec for spec in all_methods("") if experiment in spec.experiments]


def find(id: str, kind: str = ATTENTION) -> MethodSpec | None:
    """The method of that id among those registered so far; None if there is none."""
    return _METHODS.get((kind, id))


def get(id: str, kind: str = ATTENTION) -> MethodSpec:
    """The method of that id as it runs problems of ``kind``; ValueError for an unknown one."""
    discover()
    if (kind, id) not in _METHODS:
        raise ValueError(f"method {id!r} is unknown, allowed: {', '.join(spec.id for spec in all_methods(kind))}")
    return _METHODS[kind, id]
