"""A table measured in parts of one cell each: for a device that is lent for minutes, or processes that take turns on one.

A part is what a job of that cell writes, a table and its provenance, so that nothing is lost when a later one is cut. `merge`
makes one table of them, with or without a device, and lists under ``runs`` in its provenance which cells came from which run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stof_kernels.baselines.cuda_timing import device_is_usable

from . import environment
from .config import job_settings
from .experiments import Cell
from .measurement import Measurement, read_rows, write_rows
from .records import provenance_of, read_provenance, staleness
from .runner import cells_of, run_job, same_run, write_json

_REMARKS = ("left_out", "note", "remark")  # what a table's provenance may say of its numbers in words


class PartError(ValueError):
    """Parts that cannot be measured or put together. The message is one line: which, what is wrong, what is allowed."""


def measure(
    gpu: str,
    experiment: str,
    method: str,
    settings: dict[str, Any],
    device: str,
    folder: Path,
    keys: Sequence[str] = (),
) -> list[Path]:
    """Measure the cells ``keys`` (all if none is named), each into a part of its own in ``folder``; returns the parts.

    Parts of today's code that are there already are kept, whatever their status. PartError for a key that is no cell, and where
    a cell has left the device unusable in this process; the errors of ``run_job``.
    """
    known = [cell.key for cell in cells_of(experiment, method, settings, device)]
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise PartError(f"{experiment} has no cell {unknown[0]!r}, allowed: {', '.join(known)}")
    made: list[Path] = []
    for key in keys or known:
        csv = folder / re.sub(r"[^\w.-]", "_", key) / experiment / f"{method}.csv"
        if csv.is_file() and read_provenance(csv).get("cells") == [key] and staleness(csv) is None:
            print(f"{experiment} {gpu} {method} {key}: measured before, kept", flush=True)
        elif made and not device_is_usable(device):
            raise PartError(f"{key}: {made[-1]} left the device unusable, allowed: the rest in another process")
        else:
            run_job(
                gpu, experiment, method, settings, csv, provenance_of(csv), csv.with_suffix(".jsonl"), device, only=key
            )
        made.append(csv)
    return made


def merge(folder: Path, config: Mapping[str, Any], results: Path, keep: bool = False) -> list[Path]:
    """Put all parts under ``folder`` together; returns the tables, ``results/measured/{gpu}/{experiment}/{method}.csv``.

    ``config`` says all of a table's cells and their order. Those without a part keep their rows in ``results/recorded`` with
    ``keep``; else, or where there are none, the provenance names them. PartError for two parts of one cell, for rows of other
    code than today's, and for what does not belong together: another machine, other versions or other settings. Nothing is
    written then.
    """
    groups: dict[tuple[str, str, str], dict[Path, dict[str, Any]]] = {}
    for csv in sorted(folder.rglob("*.csv")):
        origin = read_provenance(csv)
        if len(origin.get("cells", ())) != 1:
            raise PartError(f"{csv}: its provenance names no cell, allowed: parts, as measure writes them")
        groups.setdefault((origin["gpu"], origin["experiment"], origin["method"]), {})[csv] = origin
    if not groups:
        raise PartError(f"{folder}: holds no parts, allowed: a folder that measure wrote")
    whole = {}
    for (gpu, experiment, method), parts in groups.items():
        place = Path(gpu, experiment, f"{method}.csv")
        kept = results / "recorded" / place
        whole[results / "measured" / place] = _whole(parts, config, kept if keep and kept.is_file() else None)
    for csv, (rows, facts) in whole.items():
        write_json(provenance_of(csv), facts)
        write_rows(csv, rows)
    return list(whole)


@dataclass(frozen=True)
class _Part:
    """One cell's rows, the table that they are from, its provenance, and what that says of the cell's run."""

    csv: Path
    rows: list[Measurement]
    origin: dict[str, Any]
    run: dict[str, Any]


def _whole(
    parts: dict[Path, dict[str, Any]], config: Mapping[str, Any], recorded: Path | None
) -> tuple[list[Measurement], dict[str, Any]]:
    """Rows in the order of the config's cells, and the provenance of all. ``parts``: tables with their provenance."""
    where, first = next(iter(parts.items()))
    experiment, method, device = first["experiment"], first["method"], first["machine"]["device"]
    if experiment not in config["experiments"]:
        raise PartError(f"{where}: the config has no section for {experiment}, allowed: one of its experiments")
    settings = job_settings(config, experiment, device, method)
    cells = cells_of(experiment, method, settings, device)
    keys = [cell.key for cell in cells]
    found: dict[str, _Part] = {}
    for csv, origin in parts.items():
        (key,) = origin["cells"]
        if key in found:
            raise PartError(f"{csv}: {key} is in {found[key].csv} too, allowed: one part of a cell")
        if key not in keys:
            raise PartError(f"{csv}: {key} is no cell of the config, allowed: {', '.join(keys)}")
        run = _run_of(origin)
        # A copy without git measured today's commit: the code is the same.
        found[key] = _Part(csv, read_rows(csv), origin, run | {"commit": run["commit"] or environment.git_commit()})
    if recorded is not None:
        found |= _recorded(recorded, [cell for cell in cells if cell.key not in found])
    for part in {part.csv: part for part in found.values()}.values():
        if staleness(part.csv) is not None:
            raise PartError(f"{part.csv}: measured with other code than today's, allowed: rows of today's code")
        differing = same_run(first | {"settings": settings}, part.origin)
        if differing:
            raise PartError(f"{part.csv}: another {differing} than in {where} or the config, allowed: one for a table")
    facts = _provenance({key: found[key] for key in keys if key in found}) | {"settings": settings}
    missing = [key for key in keys if key not in found]
    if missing:
        facts["left_out"] = f"not measured: {', '.join(missing)}"
    return [row for key in keys if key in found for row in found[key].rows], facts


def _recorded(csv: Path, cells: Sequence[Cell]) -> dict[str, _Part]:
    """These cells of a recorded table. PartError for one whose provenance does not tell the run of a cell."""
    origin, rows = read_provenance(csv), read_rows(csv)
    remarks = {name: origin[name] for name in _REMARKS if name in origin}
    found = {}
    for cell in cells:
        columns = cell.problem.columns()
        own = [row for row in rows if all(getattr(row, name) == value for name, value in columns.items())]
        if own:
            runs = origin["runs"] if "runs" in origin else [{**_run_of(origin), "cells": [cell.key]}]
            run = next((run for run in runs if isinstance(run, dict) and cell.key in run["cells"]), None)
            if run is None:
                raise PartError(
                    f"{csv}: does not say which run {cell.key} is of, allowed: tables that do, or no --keep"
                )
            found[cell.key] = _Part(csv, own, origin, remarks | {name: run[name] for name in run if name != "cells"})
    return found


def _run_of(origin: dict[str, Any]) -> dict[str, Any]:
    """What a table lists of the one run that made it, less its cells."""
    return {name: origin[name] for name in ("date", "commit", "protocol")} | {"run_ids": [origin["run_id"]]}


def _provenance(parts: dict[str, _Part]) -> dict[str, Any]:
    """That of the newest part, and the runs of all."""
    newest = max(parts.values(), key=lambda part: part.run["date"])
    runs: dict[str, dict[str, Any]] = {}
    for key, part in parts.items():
        about = {name: value for name, value in part.run.items() if name != "run_ids"}
        run = runs.setdefault(json.dumps(about, sort_keys=True), {"run_ids": [], **about, "cells": []})
        run["run_ids"] = sorted({*run["run_ids"], *part.run["run_ids"]})
        run["cells"].append(key)
    facts = {name: value for name, value in newest.origin.items() if name not in ("cells", "left_out")}
    return facts | {"commit": newest.run["commit"], "runs": list(runs.values())}
