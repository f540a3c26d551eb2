"""A measuring job: one method on every cell of one experiment on one GPU, resumable, one line of progress per cell."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

from stof_kernels import kernels
from stof_kernels.baselines import MethodSpec
from stof_kernels.baselines.cuda_timing import device_is_usable
from stof_kernels.baselines.models import KIND as MODEL
from stof_kernels.provenance import code_digest

from . import environment, experiments
from .cell import Measured
from .experiments import Cell
from .journal import Journal
from .measurement import Measurement, write_rows
from .model_share import Taken, take
from .timing import Budget
from .turns import TOGETHER, turns

_PROTOCOL = {
    "cpu": "wall time of single calls after {warmup} for warm-up, in turns with the control; median, 20th and 80th percentile",
    "cuda": "replays of a CUDA graph of up to {graph_calls} calls between events, divided by their number, after {warmup} "
    "calls for warm-up, in turns with the control; host time: up to {host_calls} eager calls between two synchronisations, "
    "divided by their number; median, 20th and 80th percentile",
}
_MORE = {
    "model": "; tuning: wall time from the model on its device to the first tuned call, in a process that has compiled before, "
    "with empty folders for Inductor's and Triton's caches and without the cache of plans; peak memory: one call after timing",
    "pair": "; kernels found by one search per cell, each compared with the operators one by one",
}
_SHARED = {
    None: "; several jobs shared the device and its cores: they prepared and checked side by side, and each was timed while no "
    "other one ran or compiled anything",
    True: "; several jobs shared the device and its cores: they prepared side by side, and each was checked and timed while no "
    "other one ran or compiled anything",
    False: "; jobs beside this one on the same device and cores waited while it prepared and measured",
}
_LISTS = ("masks", "sizes", "scatter", "models", "operators", "cells")
_AGAINST = (
    ", ours and the rival's in turns in one process, on the same tensors; median, 20th and 80th percentile. The ratio is that "
    "of the medians of two neighbouring turns: median, 20th and 80th percentile over turns"
)
_DUEL = {
    "cpu": "wall time of single calls after {warmup} for warm-up" + _AGAINST,
    "cuda": "replays of a CUDA graph of up to {graph_calls} calls between events, divided by their number, after {warmup} "
    "calls for warm-up" + _AGAINST,
}
_LEFT_UNUSABLE = "not measured: an earlier cell left the GPU unusable in this process"


class JobError(ValueError):
    """A job that cannot start. The message is one line: what is wrong and what is allowed."""


def _in_turn(run: Callable[..., None]) -> Callable[..., None]:
    """Take turns with other jobs on the device, where they are asked to: cell by cell (models, duels) or from end to end."""

    @wraps(run)
    def job(gpu: str, experiment: str, *arguments: Any, **named: Any) -> None:
        known = experiments.get(experiment)
        by_cell = known.by_cell or known.kind == MODEL
        with turns().joined(), nullcontext() if by_cell else turns().alone():
            run(gpu, experiment, *arguments, **named)

    return job


@_in_turn
def run_job(
    gpu: str,
    experiment: str,
    method: str,
    settings: dict[str, Any],
    csv: Path,
    provenance: Path,
    journal: Path,
    device: str,
    shared: Path | None = None,
    only: str = "",
) -> None:
    """Measure and write ``csv`` and ``provenance``, both whole, once every cell has its rows.

    ``gpu`` is the name that rows and folders carry, ``device`` (cpu or cuda) what runs; ``settings`` the experiment's section
    for that device (masks, sizes, heads, head_dim, dtype, seed, timing). A cell that runs out of memory, fails or is not
    supported becomes a row with that status. Finished cells are kept in ``journal`` and not measured again when a killed job
    is run again. ``shared`` is the finished table of the experiment whose runs this one shares: its cells are taken, not
    measured again, and the provenance says which. ``only``: the key of the one cell to measure, of which the provenance then
    speaks (`parts`). ValueError for an unknown experiment or method and for settings that cannot be read.
    """
    spec, cells = _resolve(experiment, method, settings, device)
    cells = [cell for cell in cells if only in ("", cell.key)]
    job = Measured(gpu, experiment, spec, Budget.from_settings(settings.get("timing", {})))
    why_not = experiments.get(experiment).why_not(spec, device)
    taken = take(shared, job, cells) if shared and not why_not else Taken()
    about, book = environment.new_run(), None
    if why_not:
        facts = _facts(job, settings, {"device": device})
        rows = [row for cell in cells for row in job.missing(cell.problem, "unsupported", why_not)]
        print(f"{_name(job)}: {len(cells)} cells unsupported: {why_not}", flush=True)
    elif all(cell.key in taken.rows for cell in cells):
        # Nothing runs here: the machine and the software are those of that run.
        facts = _facts(job, settings, {"device": device}) | taken.origin | {"shared": taken.facts}
        rows = _measure_all(cells, job, None, taken)
    else:
        _require_device(device)
        environment.one_assembler()
        facts = _facts(job, settings, environment.machine(device))
        book = Journal(Path(journal), _identity(facts), about=about)
        about = book.about | {"resumed": book.resumed}
        facts |= {"shared": taken.facts} if taken.rows else {}
        rows = _measure_all(cells, job, book, taken)
    write_json(Path(provenance), about | facts | ({"cells": [only]} if only else {}))
    write_rows(csv, rows)
    if book is not None:
        book.close()


def cells_of(experiment: str, method: str, settings: dict[str, Any], device: str) -> list[Cell]:
    """The cells of a job in their order; JobError, or SettingsError, where ``run_job`` would raise it."""
    return _resolve(experiment, method, settings, device)[1]


def _resolve(experiment: str, method: str, settings: dict[str, Any], device: str) -> tuple[MethodSpec, list[Cell]]:
    known = experiments.get(experiment)
    spec = known.spec(method)
    if device not in ("cpu", "cuda"):
        raise JobError(f"device is {device!r}, allowed: cpu, cuda")
    if known.cells is None:
        runnable = ", ".join(e.id for e in experiments.EXPERIMENTS.values() if e.cells)
        raise JobError(f"experiment {experiment!r} has recorded rows only, allowed to measure: {runnable}")
    if method not in known.methods:
        raise JobError(
            f"method {method!r} is not part of experiment {experiment!r}, allowed: {', '.join(known.methods)}"
        )
    return spec, known.cells(settings, device)


def _require_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise JobError(
            f"torch {torch.__version__} sees no CUDA device here, allowed: a CUDA build of torch and a driver for it"
        )


def _measure_all(cells: list[Cell], job: Measured, book: Journal | None, taken: Taken) -> list[Measurement]:
    rows: list[Measurement] = []
    usable = True
    measure = experiments.get(job.experiment).measure_cell if book else None
    for number, cell in enumerate(cells, start=1):
        place = f"{_name(job)} [{number}/{len(cells)}] {cell.key}"
        if cell.key in taken.rows:
            found = taken.rows[cell.key]
            print(f"{place}: {summary(found)} (the run of {taken.experiment})", flush=True)
        elif cell.key in book.done:
            found = book.done[cell.key]
            print(f"{place}: finished before, kept", flush=True)
        elif usable:
            found = measure(cell, job)
            book.finish(cell.key, found)
            print(f"{place}: {summary(found)}", flush=True)
            usable = found[0].status in ("ok", "unsupported") or device_is_usable(cell.problem.device)
        else:
            # Not in the journal: a later run of the job measures these cells.
            found = job.missing(cell.problem, "error", _LEFT_UNUSABLE)
            print(f"{place}: {_LEFT_UNUSABLE}", flush=True)
        rows.extend(found)
    return rows


def _name(job: Measured) -> str:
    return f"{job.experiment} {job.gpu} {job.method.id}"


def summary(rows: list[Measurement]) -> str:
    """One cell's rows as the rest of a progress line."""
    regrets = [f"{row.operator} {row.median:.2f}" for row in rows if row.metric == "regret"]
    if regrets:
        return f"regret {', '.join(regrets)}"
    duels = [row for row in rows if row.metric == "speedup"]
    if duels:
        return _duel(rows[0], rows[1], duels[0])
    parts = [row for row in rows if row.operator]
    if len(parts) > 1 and rows[0].operator:
        return ", ".join(_part(row) for row in parts)
    by_metric = {row.metric: row for row in rows}
    time = by_metric.get("device_time", rows[0])
    if time.median is None:
        return f"{time.status}: {time.note}"
    text = f"{_short(time.median)} {time.unit}"
    text += "" if time.p20 is None else f" ({_short(time.p20)}-{_short(time.p80)}, n={time.samples})"
    text += " without the mask" if time.exact is False else ""
    if "tuning_time" in by_metric and time.metric != "tuning_time":
        text += f", tuned in {by_metric['tuning_time'].median:.1f} s"
    if "control_time" in by_metric:
        text += f", control {by_metric['control_time'].median:.1f} us"
    return text if time.rel_err is None else f"{text}, rel_err {time.rel_err:.1e}"


def _duel(rival: Measurement, ours: Measurement, ratio: Measurement) -> str:
    """The rival's time, ours, and how many times faster that is."""
    spread = f"{ratio.p20:.3f}-{ratio.p80:.3f}, n={ratio.samples}"
    text = f"{_short(rival.median)} us, STOF {_short(ours.median)} us: {ratio.median:.3f}x ({spread})"
    return text + ("" if rival.exact else ", the rival without the mask")


def _short(value: float) -> str:
    """Four digits, none of them a power of ten."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _part(row: Measurement) -> str:
    """One of several things that a cell measures, named by its operator."""
    found = row.status if row.median is None else f"{_short(row.median)} {row.unit}"
    return f"{row.operator} {row.metric} {found}"


def _facts(job: Measured, settings: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Everything that the provenance file says about how the numbers came about."""
    spec = job.method
    depends = experiments.get(job.experiment).depends_of(spec, machine["device"])
    return {
        "kind": "measured",
        "experiment": job.experiment,
        "gpu": job.gpu,
        "gpu_name": machine.get("name", ""),
        "method": spec.id,
        "label": spec.label,
        "reimplemented": spec.reimplemented,
        "machine": machine,
        "versions": environment.versions(),
        "protocol": _protocol(job, machine["device"]),
        "seed": settings.get("seed", 0),
        "settings": settings,
        "code": {"digest": code_digest(depends), "parts": {name: code_digest([name]) for name in depends}},
        "build": _build_facts(depends, machine),
        "commit": environment.git_commit(),
    }


def _protocol(job: Measured, device: str) -> str:
    known, kind = experiments.get(job.experiment), job.method.kind
    text = (_DUEL if known.against else _PROTOCOL)[device].format(**asdict(job.budget)) + _MORE.get(kind, "")
    beside = None if known.by_cell else kind == MODEL and job.method.id in TOGETHER
    return text + (_SHARED[beside] if turns().active else "")


def _build_facts(depends: tuple[str, ...], machine: dict[str, Any]) -> dict[str, Any] | None:
    """Compiler and flags of our own library, for a method that runs it."""
    target = "cpu" if machine["device"] == "cpu" else environment.arch(machine)
    if target not in kernels.TARGETS or not any(name.startswith("kernels") for name in depends):
        return None
    made_of = kernels.manifest(target)
    return {name: made_of[name] for name in ("target", "digest", "compiler", "flags")}


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    """What a finished cell's numbers depend on. The lists of cells do not count: a longer list keeps what is finished."""
    settings = {name: value for name, value in facts["settings"].items() if name not in _LISTS}
    kept = ("experiment", "gpu", "method", "versions", "build")
    # The clock of the moment is a reading, not a property of the machine.
    machine = {name: value for name, value in facts["machine"].items() if name not in ("clocks_sm", "clocks_mem")}
    return {name: facts[name] for name in kept} | {
        "settings": settings,
        "machine": machine,
        "code": facts["code"]["digest"],
    }


def same_run(facts: dict[str, Any], other: dict[str, Any]) -> str:
    """The first thing that numbers depend on in which two provenances differ; empty if they could be of one job."""
    one, two = _identity(facts), _identity(other)
    return next((name for name in one if one[name] != two[name]), "")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
