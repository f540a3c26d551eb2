"""What a figure says about a GPU besides its numbers: their date, what is out of date, why there are none. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .records import read_provenance, staleness
from .targets import MEASURED


def page_facts(gpu: str, source: str, experiments: Sequence[str], tables: Iterable[Path]) -> dict[str, Any]:
    """``date``, ``hardware``, ``stale`` and ``missing_reason`` of a GPU's page.

    ``tables``: files ``.../{gpu}/{experiment}/{method}.csv`` behind the figure, of any GPU, their provenance beside them. The
    date is the newest of this GPU's; stale are its methods whose code has changed since their rows were measured.
    """
    own = [path for path in tables if path.parts[-3] == gpu]
    origins = [read_provenance(path) for path in own]
    return {
        "date": max((origin.get("date", "") for origin in origins), default=""),
        "hardware": next(filter(None, map(_hardware, origins)), ""),
        "stale": tuple(path.stem for path in own if staleness(path)),
        "missing_reason": "" if own else _why_missing(gpu, source, experiments),
    }


def _hardware(origin: dict[str, Any]) -> str:
    """Processor and threads behind rows of a CPU, which the word CPU does not tell; empty for a card, whose label does."""
    machine = origin.get("machine", {})
    if machine.get("device") != "cpu" or "name" not in machine:
        return ""
    return f"{machine['name']}, {machine['threads']} threads"


def _why_missing(gpu: str, source: str, experiments: Sequence[str]) -> str:
    names = " and ".join(experiments)
    if source == MEASURED:
        return f"not measured: config.yaml has no section for {names}"
    return f"no rows of {names} are recorded for {gpu}, and there is no such device here to measure on"
