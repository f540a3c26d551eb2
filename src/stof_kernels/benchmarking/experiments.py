"""The experiments: which cells each measures, from its section of the config. Standard library and masks only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stof_kernels import masks
from stof_kernels.baselines import Problem, methods_for


class SettingsError(ValueError):
    """A config section that an experiment cannot read. The message is one line: where, what it is, what is allowed."""


@dataclass(frozen=True)
class Cell:
    """One problem of an experiment under the name that the journal, the progress lines and ``duel`` use."""

    key: str
    problem: Problem


@dataclass(frozen=True)
class Experiment:
    """``cells(settings, device)`` lists what to measure; None where nothing measures this experiment yet.

    ``measure`` names the function that turns a cell into rows, ``module:function`` of this package: what times the calls
    imports torch, and this module does not.
    """

    id: str
    statement: str
    cells: Callable[[dict[str, Any], str], list[Cell]] | None = None
    measure: str = "cell:measure_cell"

    @property
    def measure_cell(self) -> Callable[[Cell, Any], list[Any]]:
        """The function that measures one cell of this experiment."""
        module, _, function = self.measure.partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), function)

    @property
    def methods(self) -> tuple[str, ...]:
        """Ids of the methods that have rows in it, in the order of tables and legends."""
        return tuple(spec.id for spec in methods_for(self.id))


def cell_key(family: str, batch: int, seq_len: int) -> str:
    """``causal:1x2048``: mask, batch and length."""
    return f"{family}:{batch}x{seq_len}"


def attention_cells(settings: dict[str, Any], device: str) -> list[Cell]:
    """Masks x sizes. Sizes vary slowest, so that what a method compiles for a size serves all its masks."""
    shared = _shared(settings)
    return [
        _cell(family, batch, seq_len, shared, device)
        for batch, lengths in _sizes(settings)
        for seq_len in lengths
        for family in _masks(settings)
    ]


def attention_cell(name: str, settings: dict[str, Any], device: str) -> Cell:
    """The cell called ``causal:1x2048`` with the settings' heads, head_dim, dtype and seed."""
    family, _, size = name.partition(":")
    batch, _, seq_len = size.partition("x")
    if family not in masks.FAMILIES or not (batch.isdigit() and seq_len.isdigit() and int(batch) and int(seq_len)):
        families = ", ".join(masks.FAMILIES)
        raise SettingsError(f"cell {name!r}: allowed: MASK:BATCHxLENGTH such as causal:1x2048, masks {families}")
    return _cell(family, int(batch), int(seq_len), _shared(settings), device)


def _cell(family: str, batch: int, seq_len: int, shared: dict[str, Any], device: str) -> Cell:
    pattern = masks.get(family, seq_len)
    problem = Problem(pattern=pattern, batch=batch, q_len=seq_len, kv_len=seq_len, device=device, **shared)
    return Cell(cell_key(family, batch, seq_len), problem)


def planner_cells(settings: dict[str, Any], device: str) -> list[Cell]:
    """Masks x sizes, and for each size random blocks from single positions to large squares (``scatter``)."""
    cells = attention_cells(settings, device)
    shared = _shared(settings)
    for batch, lengths in _sizes(settings):
        for seq_len in lengths:
            for pattern in _scatter(settings):
                problem = Problem(pattern, batch, seq_len, seq_len, device=device, **shared)
                cells.append(Cell(f"scatter_{pattern.block}_{pattern.fill:g}:{batch}x{seq_len}", problem))
    return cells


def _scatter(settings: dict[str, Any]) -> list[Any]:
    found = settings.get("scatter", [])
    try:
        return [masks.random_blocks(entry["block"], fill) for entry in found for fill in entry["fill"]]
    except (TypeError, KeyError, ValueError) as error:
        allowed = "a list of {block: integer >= 1, fill: list of shares}"
        raise SettingsError(f"settings: scatter is {found!r} ({error}), allowed: {allowed}") from None


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    heads = _positive(settings, "heads")
    kv_heads = _positive(settings, "kv_heads") if "kv_heads" in settings else heads
    if heads % kv_heads:
        raise SettingsError(f"settings: kv_heads is {kv_heads}, allowed: a divisor of heads ({heads})")
    dtype, seed = settings.get("dtype"), settings.get("seed", 0)
    if dtype not in ("float32", "float16", "bfloat16"):
        raise SettingsError(f"settings: dtype is {dtype!r}, allowed: float32, float16, bfloat16")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise SettingsError(f"settings: seed is {seed!r}, allowed: an integer")
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": _positive(settings, "head_dim"),
        "dtype": dtype,
        "seed": seed,
    }


def _positive(settings: dict[str, Any], name: str) -> int:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"settings: {name} is {value!r}, allowed: an integer >= 1")
    return value


def _masks(settings: dict[str, Any]) -> list[str]:
    families = settings.get("masks")
    if not isinstance(families, (list, tuple)) or not families:
        raise SettingsError(f"settings: masks is {families!r}, allowed: a list of {', '.join(masks.FAMILIES)}")
    for family in families:
        if family not in masks.FAMILIES:
            raise SettingsError(f"settings: mask {family!r} is unknown, allowed: {', '.join(masks.FAMILIES)}")
    return list(families)


def _sizes(settings: dict[str, Any]) -> list[tuple[int, list[int]]]:
    sizes = settings.get("sizes")
    allowed = "allowed: a list of {batch: integer >= 1, seq_len: list of integers >= 1}"
    if not isinstance(sizes, (list, tuple)) or not sizes:
        raise SettingsError(f"settings: sizes is {sizes!r}, {allowed}")
    groups = []
    for size in sizes:
        lengths = size.get("seq_len") if isinstance(size, dict) else None
        if not isinstance(lengths, (list, tuple)) or not all(type(n) is int and n >= 1 for n in lengths):
            raise SettingsError(f"settings: sizes has {size!r}, {allowed}")
        groups.append((_positive(size, "batch"), list(lengths)))
    return groups


_ALL = (
    Experiment("mha", "attention alone, the paper's four masks (Figures 9 and 10)", attention_cells),
    Experiment("mha_artifact", "attention alone, the masks that the authors' artifact generates", attention_cells),
    Experiment("mha_long", "attention alone at lengths of 8k to 64k"),
    Experiment("mha_bf16", "attention alone in bfloat16"),
    Experiment("mask_build", "time to build a mask in each method's own form"),
    Experiment(
        "planner",
        "regret of the planner's and of the paper's choice against trying every candidate",
        planner_cells,
        measure="candidates:measure_candidates",
    ),
    Experiment("scaling", "time and memory over sequence length"),
    Experiment("dynamic_mask", "attention whose mask changes from call to call"),
    Experiment("end_to_end", "whole models, BigBird mask (Figure 11)"),
    Experiment("ablation", "attention alone, fusion alone, both (Figure 12)"),
    Experiment("overhead", "parts of the tuner's own work (Figure 13)"),
    Experiment("tuning_cost", "wall time of tuning (Table 4)"),
    Experiment("motivation", "fused against detached operators and their tuning (Figures 3 and 4)"),
)

EXPERIMENTS: dict[str, Experiment] = {experiment.id: experiment for experiment in _ALL}
"""Every experiment by id; those without ``cells`` are known names that only recorded rows can have today."""


def get(id: str) -> Experiment:
    """The experiment of that id; ValueError for an unknown one."""
    if id not in EXPERIMENTS:
        raise ValueError(f"experiment {id!r} is unknown, allowed: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[id]
