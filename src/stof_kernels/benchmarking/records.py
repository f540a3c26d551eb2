"""Recorded rows: promoting reviewed measurements into git, and telling which of them were measured with older code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stof_kernels import baselines, kernels
from stof_kernels.provenance import code_digest

from .experiments import EXPERIMENTS
from .measurement import Measurement, MeasurementError, read_rows, write_rows
from .runner import write_json

PROVENANCE = ".provenance.json"
_BUSY = 1.3  # machines of one kind differ by a few percent, and so do runs on an idle one


class RecordError(ValueError):
    """Measurements that cannot be recorded. The message is one line: which file, what is wrong, what is allowed."""


@dataclass(frozen=True)
class Stale:
    """A recorded table measured with other code than today's."""

    csv: Path
    recorded: str
    today: str
    changed: tuple[str, ...]

    def __str__(self) -> str:
        why = f"changed: {', '.join(self.changed)}" if self.changed else "its dependencies are listed differently"
        return f"{self.csv}: measured with code {self.recorded}, today's is {self.today or 'gone'} ({why})"


def provenance_of(csv: Path) -> Path:
    """The file beside a table that says where its numbers come from."""
    return csv.with_name(csv.stem + PROVENANCE)


def read_provenance(csv: Path) -> dict[str, Any]:
    """Contents of the provenance file beside ``csv``; RecordError if there is none or it is not one."""
    path = provenance_of(csv)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{csv}: has no {path.name} beside it, allowed: tables that a measuring job wrote") from None
    except (OSError, ValueError):
        raise RecordError(f"{path}: cannot be read as JSON, allowed: what a measuring job wrote") from None
    if not isinstance(value, dict):
        raise RecordError(f"{path}: holds {type(value).__name__}, allowed: a JSON object")
    return value


def today_digests(method: str, device: str, experiment: str = "") -> dict[str, str]:
    """Digest of each part of the code that ``method``'s numbers on ``device`` depend on, in ``experiment`` if one is named.

    Empty for a method that is gone.
    """
    known = EXPERIMENTS.get(experiment)
    try:
        spec = known.spec(method) if known else baselines.get(method)
    except ValueError:
        return {}
    names = known.depends_of(spec, device) if known else spec.depends_on(device)
    return {name: code_digest([name]) for name in names}


def staleness(csv: Path) -> Stale | None:
    """How the code of a measured table differs from today's; None if it does not, or the table is published."""
    provenance = read_provenance(csv)
    if provenance.get("kind") == "published":
        return None
    try:
        code, device = provenance["code"], provenance["machine"]["device"]
        then, recorded = dict(code["parts"]), str(code["digest"])
    except (KeyError, TypeError, ValueError):
        raise RecordError(f"{provenance_of(csv)}: lacks code or machine, allowed: what a measuring job wrote") from None
    now = today_digests(csv.stem, device, csv.parent.name)
    today = code_digest(now) if now else ""
    changed = sorted(name for name in then | now if then.get(name) != now.get(name))
    if not _same_flags(provenance.get("build")):
        changed.append("build flags")
    if today == recorded and not changed:
        return None
    return Stale(csv, recorded, today, tuple(changed))


def _same_flags(build: dict[str, Any] | None) -> bool:
    """Whether our library is still compiled as it was for those numbers; true for methods that do not run it."""
    if not build:
        return True
    target = kernels.TARGETS.get(build.get("target"))
    return target is not None and build.get("flags") == [*target.flags, *target.link_flags]


def stale(results: Path) -> list[Stale]:
    """Every recorded measured table whose code differs from today's."""
    return [found for csv in sorted((results / "recorded").rglob("*.csv")) if (found := staleness(csv)) is not None]


def record(
    results: Path, gpu: str, experiments: tuple[str, ...] = (), methods: tuple[str, ...] = (), replace: bool = False
) -> list[Path]:
    """Promote ``results/measured/{gpu}`` to ``results/recorded/{gpu}``; returns the tables written.

    Empty ``experiments`` or ``methods`` means all that were measured. Everything is checked before anything is written: rows
    that can be read, are measured and belong to their path, with a provenance file of today's code. Published rows in the
    target are replaced only with ``replace``. RecordError otherwise.
    """
    found = sorted((results / "measured" / gpu).glob("*/*.csv"))
    chosen = [
        csv
        for csv in found
        if (not experiments or csv.parent.name in experiments) and (not methods or csv.stem in methods)
    ]
    if not chosen:
        have = ", ".join(f"{csv.parent.name}/{csv.stem}" for csv in found) or "nothing"
        raise RecordError(f"no measured rows of gpu {gpu!r} match; measured there: {have}")
    checked = [(csv, *_check(csv, gpu)) for csv in chosen]
    targets = [results / "recorded" / gpu / csv.parent.name / csv.name for csv in chosen]
    for target in targets:
        _check_target(target, replace)
    for target, (_, rows, provenance) in zip(targets, checked, strict=True):
        write_json(provenance_of(target), provenance)
        write_rows(target, rows)
    return targets


def busy_cells(tables: list[Path]) -> list[str]:
    """Cells whose control, the same work in every table, took very different times: the machine was busy."""
    controls: dict[tuple, dict[str, float]] = {}
    for path in tables:
        for row in read_rows(path):
            if row.metric == "control_time" and row.median:
                what = (
                    row.experiment,
                    row.mask or row.operator,
                    row.batch,
                    row.seq_len,
                    row.model,
                    row.hidden,
                    row.note,
                )
                controls.setdefault(what, {})[row.method] = row.median
    found = []
    for (experiment, name, batch, seq_len, model, *_), times in controls.items():
        low, high = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
        if times[high] > _BUSY * times[low]:
            ratio, cell = times[high] / times[low], f"{model or name}:{batch}x{seq_len}"
            found.append(f"{experiment} {cell}: the control took {ratio:.1f}x longer beside {high} than beside {low}")
    return found


def _check(csv: Path, gpu: str) -> tuple[list[Measurement], dict[str, Any]]:
    try:
        rows = read_rows(csv)
    except MeasurementError as error:
        raise RecordError(str(error)) from None
    if not rows:
        raise RecordError(f"{csv}: holds no rows, allowed: at least one")
    own = {"gpu": gpu, "experiment": csv.parent.name, "method": csv.stem, "source": "measured"}
    for row in rows:
        for column, expected in own.items():
            if getattr(row, column) != expected:
                raise RecordError(f"{csv}: a row of {column} {getattr(row, column)!r}, allowed: {expected!r}")
    provenance = read_provenance(csv)
    for name in ("gpu", "experiment", "method"):
        if provenance.get(name) != own[name]:
            path = provenance_of(csv)
            raise RecordError(f"{path}: {name} is {provenance.get(name)!r}, allowed: {own[name]!r} (its path)")
    old = staleness(csv)
    if old is not None:
        raise RecordError(f"{old}; allowed: rows of today's code, measure again")
    return rows, provenance


def _check_target(target: Path, replace: bool) -> None:
    if replace or not target.exists():
        return
    try:
        published = any(row.source == "published" for row in read_rows(target))
    except MeasurementError as error:
        raise RecordError(f"{error}; --replace overwrites it") from None
    if published:
        raise RecordError(f"{target}: holds published rows, allowed: --replace to put measured rows in their place")
