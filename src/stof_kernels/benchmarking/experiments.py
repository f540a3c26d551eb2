"""The experiments: which cells each measures, from its section of the config. Standard library and masks only."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stof_kernels import masks
from stof_kernels.baselines import MethodSpec, Problem, all_methods
from stof_kernels.baselines import get as find_method
from stof_kernels.baselines.models import KIND as MODEL
from stof_kernels.baselines.pairs import KIND as PAIR
from stof_kernels.baselines.registry import ATTENTION

from .attention_masks import FAMILIES, MaskEntry, MaskError, parse_mask
from .model_problems import ProblemError, model_problems, pair_problems


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
    imports torch, and this module does not. ``like``: another experiment whose methods are this one's too, with the same
    reasons where they cannot run; ``only``: those of them that have rows here, all where empty. ``depends``: package-relative
    code that the numbers of every method depend on here, besides what they depend on everywhere. ``kind``: what problems its
    methods prepare (`baselines.registry`). ``metric``: the metric of the row that a cell without numbers has. ``shares``: the
    experiment whose runs of the same method, cell and settings this one takes its rows from. ``against``: the method that every
    other one is measured against here, so that the numbers depend on its code too; it has no rows of its own. ``by_cell``: jobs
    that share a device have it alone while a cell is timed, not from end to end.
    """

    id: str
    statement: str
    cells: Callable[[dict[str, Any], str], list[Cell]] | None = None
    measure: str = "cell:measure_cell"
    like: str = ""
    only: tuple[str, ...] = ()
    depends: tuple[str, ...] = ()
    kind: str = ATTENTION
    metric: str = "device_time"
    shares: str = ""
    against: str = ""
    by_cell: bool = False

    @property
    def measure_cell(self) -> Callable[[Cell, Any], list[Any]]:
        """The function that measures one cell of this experiment."""
        module, _, function = self.measure.partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), function)

    @property
    def specs(self) -> tuple[MethodSpec, ...]:
        """The methods that have rows in it, in the order of tables and legends."""
        names = {self.id, self.like} - {""}
        found = (
            spec for spec in all_methods(self.kind) if names.intersection(spec.experiments) and spec.id != self.against
        )
        return tuple(spec for spec in found if not self.only or spec.id in self.only)

    @property
    def methods(self) -> tuple[str, ...]:
        """Ids of `specs`."""
        return tuple(spec.id for spec in self.specs)

    def spec(self, method: str) -> MethodSpec:
        """The method of that id as this experiment runs it; ValueError for an unknown one."""
        return find_method(method, self.kind)

    def why_not(self, spec: MethodSpec, device: str) -> str:
        """Reason why ``spec`` cannot run here at all, known without importing torch; empty if it may run."""
        reason = spec.why_not(self.id, device) or (spec.why_not(self.like, device) if self.like else "")
        return reason or (find_method(self.against, self.kind).why_not(self.like, device) if self.against else "")

    def depends_of(self, spec: MethodSpec, device: str) -> tuple[str, ...]:
        """Package-relative names that the numbers of ``spec`` on ``device`` depend on in this experiment."""
        other = find_method(self.against, self.kind).depends_on(device) if self.against else ()
        return tuple(dict.fromkeys((*spec.depends_on(device), *self.depends, *other)))


@dataclass(frozen=True)
class Size:
    """One entry of ``sizes``: a batch, its lengths, and what it has instead of the section's own."""

    batch: int
    lengths: tuple[int, ...]
    shape: tuple[tuple[str, int], ...] = ()
    masks: tuple[MaskEntry, ...] = ()

    @property
    def heads_key(self) -> str:
        """``:32/8x128``: query heads, key heads and head dim, where this entry has its own; else empty."""
        own = dict(self.shape)
        return f":{own['heads']}/{own['kv_heads']}x{own['head_dim']}" if own else ""


def cell_key(mask: str, batch: int, seq_len: int) -> str:
    """``causal:1x2048``, ``sliding_window(w=64):1x2048``: mask, batch and length."""
    return f"{mask}:{batch}x{seq_len}"


def attention_cells(settings: dict[str, Any], device: str) -> list[Cell]:
    """Masks x sizes. Sizes vary slowest, so that what a method compiles for a size serves all its masks."""
    shared, section = _shared(settings), _masks(settings)
    return [
        _cell(entry, size.batch, seq_len, shared | dict(size.shape), device, size.heads_key)
        for size in _sizes(settings)
        for seq_len in size.lengths
        for entry in size.masks or section
    ]


_KEY = re.compile(r"(\w+)(?:\(([^()]+)\))?:([1-9]\d*)x([1-9]\d*)(?::([1-9]\d*)/([1-9]\d*)x([1-9]\d*))?")


def attention_cell(name: str, settings: dict[str, Any], device: str) -> Cell:
    """The cell of that key, ``causal:1x2048`` or ``sliding_window(w=64):1x8192:32/8x128``, in or beside the settings' lists.

    Dtype and seed are the settings', and so are heads, kv_heads and head_dim where the key has none of its own.
    """
    found = _KEY.fullmatch(name)
    if not found or found[1] not in FAMILIES:
        allowed = "MASK:BATCHxLENGTH such as causal:1x2048 or sliding_window(w=64):1x8192:32/8x128"
        raise SettingsError(f"cell {name!r}: allowed: {allowed}, masks {', '.join(FAMILIES)}")
    family, given, batch, seq_len, *own = found.groups()
    shape = dict(zip(("heads", "kv_heads", "head_dim"), map(int, own), strict=True)) if all(own) else {}
    cell = _cell(_entry(name, family, given or ""), int(batch), int(seq_len), _shared(settings | shape), device)
    return Cell(name, cell.problem)


def _entry(name: str, family: str, given: str) -> MaskEntry:
    """The mask of a key with ``given`` (``w=64,g=32``) in its parentheses."""
    try:
        pairs = (item.partition("=")[::2] for item in given.split(",") if given)
        return parse_mask({"family": family} | {key: json.loads(value) for key, value in pairs})
    except ValueError as error:
        raise SettingsError(f"cell {name!r}: {error}; allowed: parameters such as w=64 or causal=true") from None


def duel_cells(settings: dict[str, Any], device: str) -> list[Cell]:
    """``cells``: keys behind the name of their experiment; ``shapes``: the heads and dtype that each experiment has."""
    cells, shapes = settings.get("cells"), settings.get("shapes", {})
    if not isinstance(cells, (list, tuple)) or not isinstance(shapes, dict):
        raise SettingsError(f"settings: cells is {cells!r}, allowed: a list such as mha:causal:1x2048")
    found = []
    for name in cells:
        of, _, key = str(name).partition(":")
        if of not in shapes:
            raise SettingsError(f"settings: cell {name!r}: allowed: cells of {', '.join(shapes) or 'no experiment'}")
        found.append(Cell(name, attention_cell(key, shapes[of] | {"seed": settings.get("seed", 0)}, device).problem))
    return found


def _cell(entry: MaskEntry, batch: int, seq_len: int, shared: dict[str, Any], device: str, heads_key: str = "") -> Cell:
    try:
        pattern = entry.at(seq_len, shared["heads"])
    except MaskError as error:
        raise SettingsError(f"settings: {error}") from None
    problem = Problem(pattern=pattern, batch=batch, q_len=seq_len, kv_len=seq_len, device=device, **shared)
    return Cell(cell_key(entry.label, batch, seq_len) + heads_key, problem)


def planner_cells(settings: dict[str, Any], device: str) -> list[Cell]:
    """Masks x sizes, and for each size random blocks from single positions to large squares (``scatter``)."""
    cells = attention_cells(settings, device)
    shared = _shared(settings)
    for size in _sizes(settings):
        for seq_len in size.lengths:
            for pattern in _scatter(settings):
                key = f"scatter_{pattern.block}_{pattern.fill:g}:{size.batch}x{seq_len}{size.heads_key}"
                own = shared | dict(size.shape)
                cells.append(Cell(key, Problem(pattern, size.batch, seq_len, seq_len, device=device, **own)))
    return cells


def _scatter(settings: dict[str, Any]) -> list[Any]:
    found = settings.get("scatter", [])
    try:
        return [masks.random_blocks(entry["block"], fill) for entry in found for fill in entry["fill"]]
    except (TypeError, KeyError, ValueError) as error:
        allowed = "a list of {block: integer >= 1, fill: list of shares}"
        raise SettingsError(f"settings: scatter is {found!r} ({error}), allowed: {allowed}") from None


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    dtype, seed = settings.get("dtype"), settings.get("seed", 0)
    if dtype not in ("float32", "float16", "bfloat16"):
        raise SettingsError(f"settings: dtype is {dtype!r}, allowed: float32, float16, bfloat16")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise SettingsError(f"settings: seed is {seed!r}, allowed: an integer")
    return _shape(settings) | {"dtype": dtype, "seed": seed}


def _shape(settings: dict[str, Any]) -> dict[str, int]:
    """heads, kv_heads (as many where not given) and head_dim."""
    heads = _positive(settings, "heads")
    kv_heads = _positive(settings, "kv_heads") if "kv_heads" in settings else heads
    if heads % kv_heads:
        raise SettingsError(f"settings: kv_heads is {kv_heads}, allowed: a divisor of heads ({heads})")
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": _positive(settings, "head_dim")}


def _positive(settings: dict[str, Any], name: str) -> int:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"settings: {name} is {value!r}, allowed: an integer >= 1")
    return value


def _masks(settings: dict[str, Any]) -> tuple[MaskEntry, ...]:
    found = settings.get("masks")
    if not isinstance(found, (list, tuple)) or not found:
        raise SettingsError(f"settings: masks is {found!r}, allowed: a list of {', '.join(masks.FAMILIES)}")
    try:
        return tuple(map(parse_mask, found))
    except MaskError as error:
        raise SettingsError(f"settings: {error}") from None


def _sizes(settings: dict[str, Any]) -> list[Size]:
    sizes = settings.get("sizes")
    allowed = "allowed: a list of {batch: integer >= 1, seq_len: list of integers >= 1}"
    if not isinstance(sizes, (list, tuple)) or not sizes:
        raise SettingsError(f"settings: sizes is {sizes!r}, {allowed}")
    groups = []
    for size in sizes:
        lengths = size.get("seq_len") if isinstance(size, dict) else None
        if not isinstance(lengths, (list, tuple)) or not all(type(n) is int and n >= 1 for n in lengths):
            raise SettingsError(f"settings: sizes has {size!r}, {allowed}")
        groups.append(Size(_positive(size, "batch"), tuple(lengths), _own_shape(settings, size), _own_masks(size)))
    return groups


def _own_shape(settings: dict[str, Any], size: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """The shape of an entry that names any part of it; a number of heads without kv_heads means as many key heads."""
    own = {name: size[name] for name in ("heads", "kv_heads", "head_dim") if name in size}
    if not own:
        return ()
    shared = {name: settings[name] for name in ("heads", "kv_heads", "head_dim") if name in settings}
    if "heads" in own:
        shared.pop("kv_heads", None)
    return tuple(_shape(shared | own).items())


def _own_masks(size: dict[str, Any]) -> tuple[MaskEntry, ...]:
    return _masks(size) if "masks" in size else ()


def model_cells(settings: dict[str, Any], device: str) -> list[Cell]:
    """Models x sizes."""
    return _cells_of(model_problems, settings, device)


def pair_cells(settings: dict[str, Any], device: str) -> list[Cell]:
    """Pairs of operators x sizes."""
    return _cells_of(pair_problems, settings, device)


def _cells_of(problems: Callable[..., list[tuple[str, Any]]], settings: dict[str, Any], device: str) -> list[Cell]:
    try:
        return [Cell(key, problem) for key, problem in problems(settings, device)]
    except ProblemError as error:
        raise SettingsError(f"settings: {error}") from None


_MODEL = {"measure": "model_cell:measure_model", "kind": MODEL, "metric": "latency"}
_FORMS = ("benchmarking/attention_forms.py", "benchmarking/attention_masks.py")
_ALL = (
    Experiment("mha", "attention alone, the paper's four masks (Figures 9 and 10)", attention_cells),
    Experiment("mha_artifact", "attention alone, the masks that the authors' artifact generates", attention_cells),
    Experiment(
        "mha_long",
        "attention alone at lengths of 8k to 32k, with wider heads, shared key heads and a mask per head",
        attention_cells,
        measure="attention_forms:measure_cell",
        like="mha",
        depends=_FORMS,
    ),
    Experiment("mha_bf16", "attention alone in bfloat16", attention_cells, like="mha"),
    Experiment(
        "mask_build",
        "time and temporary memory of building a mask in each method's own form",
        attention_cells,
        measure="attention_build:measure_cell",
        like="mha",
        only=("stof", "sdpa", "flex_attention"),
        depends=(*_FORMS, "benchmarking/attention_build.py", "benchmarking/attention_memory.py"),
        metric="mask_build_time",
    ),
    Experiment(
        "planner",
        "regret of the planner's and of the paper's choice against trying every candidate",
        planner_cells,
        measure="candidates:measure_candidates",
    ),
    Experiment(
        "scaling",
        "time and memory over the kept share and over the length",
        attention_cells,
        measure="attention_forms:measure_with_memory",
        like="mha",
        depends=(*_FORMS, "benchmarking/attention_memory.py"),
    ),
    Experiment(
        "dynamic_mask",
        "attention whose mask changes from call to call: building it is part of the call",
        attention_cells,
        measure="attention_dynamic:measure_cell",
        like="mha",
        depends=(*_FORMS, "benchmarking/attention_dynamic.py"),
    ),
    Experiment(
        "duel",
        "close cells of the experiments above: each rival and STOF in one process, turn by turn",
        duel_cells,
        measure="duel:measure_cell",
        like="mha",
        depends=(*_FORMS, "benchmarking/duel.py"),
        against="stof",
        by_cell=True,
    ),
    Experiment(
        "end_to_end",
        "whole models: latency, throughput, peak memory and tuning of each way to run them (Figure 11)",
        model_cells,
        **_MODEL,
    ),
    Experiment(
        "ablation", "attention alone, fusion alone, both (Figure 12)", model_cells, shares="end_to_end", **_MODEL
    ),
    Experiment(
        "overhead",
        "parts of the tuner's own work (Figure 13)",
        model_cells,
        shares="end_to_end",
        **_MODEL | {"metric": "tuning_time"},
    ),
    Experiment(
        "tuning_cost",
        "wall time of tuning (Table 4)",
        model_cells,
        shares="end_to_end",
        **_MODEL | {"metric": "tuning_time"},
    ),
    Experiment(
        "motivation",
        "fused against detached operators and their tuning (Figures 3 and 4)",
        pair_cells,
        measure="model_pairs:measure_pair",
        kind=PAIR,
    ),
)

EXPERIMENTS: dict[str, Experiment] = {experiment.id: experiment for experiment in _ALL}
"""Every experiment by id; those without ``cells`` are known names that only recorded rows can have today."""


def get(id: str) -> Experiment:
    """The experiment of that id; ValueError for an unknown one."""
    if id not in EXPERIMENTS:
        raise ValueError(f"experiment {id!r} is unknown, allowed: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[id]
