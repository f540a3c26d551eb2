"""What a figure says about a GPU besides its numbers: their date, what is out of date, why there are none. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stof_kernels import baselines
from stof_kernels.provenance import code_digest

from .targets import MEASURED


def page_facts(gpu: str, source: str, experiments: Sequence[str], provenance: Iterable[Path]) -> dict[str, Any]:
    """``date``, ``stale`` and ``missing_reason`` of a GPU's page, from the provenance files of the figure's tables.

    The date is the newest of its tables; stale are the methods whose code has changed since their rows were measured.
    """
    own = [path for path in map(Path, provenance) if path.parts[-3] == gpu]
    facts = [json.loads(path.read_text(encoding="utf-8")) for path in own]
    return {
        "date": max((fact.get("date", "") for fact in facts), default=""),
        "stale": tuple(fact["method"] for fact in facts if is_stale(fact)),
        "missing_reason": "" if own else _why_missing(gpu, source, experiments),
    }


def is_stale(provenance: dict[str, Any]) -> bool:
    """Whether rows were measured with other code than today's. Published rows are nobody's code here, so they never are."""
    if "code" not in provenance:
        return False
    try:
        depends = baselines.get(provenance["method"]).depends
    except ValueError:
        return True  # the method is gone
    return provenance["code"]["digest"] != code_digest(depends)


def _why_missing(gpu: str, source: str, experiments: Sequence[str]) -> str:
    names = " and ".join(experiments)
    if source == MEASURED:
        return f"not measured: config.yaml has no section for {names}"
    return f"no rows of {names} are recorded for {gpu}, and there is no such device here to measure on"
