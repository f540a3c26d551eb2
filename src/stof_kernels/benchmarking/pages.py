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
    date is the day, or the first and last day, of this GPU's runs; stale are its methods whose code has changed since then.
    """
    own = [path for path in tables if path.parts[-3] == gpu]
    origins = [read_provenance(path) for path in own]
    return {
        "date": _days(origins),
        "hardware": next(filter(None, map(_hardware, origins)), ""),
        "stale": tuple(path.stem for path in own if staleness(path)),
        "missing_reason": "" if own else _why_missing(gpu, source, experiments),
    }


def _days(origins: Sequence[dict[str, Any]]) -> str:
    """The day of all runs, or the first and the last; only of measured tables, which list theirs, where there are any."""
    measured = [origin for origin in origins if origin.get("kind") != "published"]
    runs = [run for origin in measured or origins for run in (origin, *origin.get("runs", ())) if isinstance(run, dict)]
    days = sorted({run["date"] for run in runs if run.get("date")})
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""


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
