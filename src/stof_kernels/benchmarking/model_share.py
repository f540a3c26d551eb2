"""Rows that one experiment takes from another's run of the same method, cell and settings, instead of a run of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import experiments
from .measurement import Measurement, read_rows
from .model_problems import METRICS, model_key

if TYPE_CHECKING:
    from .cell import Measured


_ORIGIN = ("machine", "gpu_name", "versions", "build", "commit")


@dataclass(frozen=True)
class Taken:
    """Rows by cell, relabelled, what the provenance says about them, and what it says about their machine and software."""

    experiment: str = ""
    rows: dict[str, list[Measurement]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)


def take(shared: Path, job: Measured, cells: Sequence[experiments.Cell]) -> Taken:
    """Rows of ``job``'s cells out of the finished table ``shared``; cells that it does not hold are left to be measured."""
    from .records import read_provenance

    origin, experiment = read_provenance(shared), shared.parent.name
    wanted = {cell.key for cell in cells}
    by_cell: dict[str, list[Measurement]] = {}
    for row in read_rows(shared):
        key = model_key(row.model, row.batch, row.seq_len)
        if key in wanted:
            by_cell.setdefault(key, []).append(row)
    own = experiments.get(job.experiment)
    rows = {key: kept_rows([_relabelled(row, own) for row in found], own.id) for key, found in by_cell.items()}
    rows = {key: found for key, found in rows.items() if found}
    facts = {"experiment": experiment, "run_id": origin.get("run_id", ""), "cells": list(rows)}
    return Taken(experiment, rows, facts, {name: origin[name] for name in _ORIGIN if name in origin})


def kept_rows(rows: Sequence[Measurement], experiment: str) -> list[Measurement]:
    """Those rows of a run that belong to an experiment; a run that failed has only the one that says so."""
    return [row for row in rows if row.metric in METRICS[experiment] or row.status != "ok"]


def _relabelled(row: Measurement, own: experiments.Experiment) -> Measurement:
    """The row under its new experiment; one that says why there is no number says it of that experiment's metric."""
    if row.status == "ok":
        return replace(row, experiment=own.id)
    return replace(row, experiment=own.id, metric=own.metric, unit="")
