"""From rows to bars: speedup over a baseline, or the reason why there is none; and the table behind a figure."""

from __future__ import annotations

import csv
import io
import math
import os
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stof_kernels.benchmarking.measurement import Measurement

# status -> (the letter drawn in place of the bar, what it stands for)
REASONS: dict[str, tuple[str, str]] = {
    "unsupported": ("u", "not supported"),
    "oom": ("m", "out of memory"),
    "wrong_result": ("w", "output check failed"),
    "error": ("e", "no result"),
    "not_measured": ("n", "not measured"),
    "no_baseline": ("b", "no baseline to divide by"),
}
_IN_TABLES = {True: "true", False: "false", None: ""}
EXACTNESS = {True: "exact", False: "not exact", None: "exactness not recorded"}


@dataclass(frozen=True)
class Bar:
    """One method at one problem: its ratio to the baseline, or a status of REASONS and the reason in words.

    ``repeated``: the number was not measured for this panel's mask; its one series stands in every panel.
    """

    method: str
    row: Measurement | None
    ratio: float | None
    status: str
    reason: str = ""
    repeated: bool = False

    @property
    def exact(self) -> bool | None:
        """Whether the method applied the cell's mask; None if nobody recorded it."""
        return self.row.exact if self.row else None


def index(
    rows: Iterable[Measurement], slot: Callable[[Measurement], Hashable]
) -> dict[tuple[Hashable, str], Measurement]:
    """(slot, method) -> row. ValueError if two rows would be the same bar, such as one problem in two dtypes."""
    found: dict[tuple[Hashable, str], Measurement] = {}
    for row in rows:
        place = (slot(row), row.method)
        if place in found:
            raise ValueError(
                f"two rows for one bar: experiment {row.experiment}, gpu {row.gpu}, method {row.method} at {place[0]}, "
                "allowed: one dtype, head count and head size per figure"
            )
        found[place] = row
    return found


def bar(row: Measurement | None, baseline: Measurement | None, method: str, repeated: bool = False) -> Bar:
    """The bar of a row: baseline time / its time."""
    if row is None:
        return Bar(method, None, None, "not_measured", "no row")
    if row.status != "ok":
        return Bar(method, row, None, row.status, row.note.split("; ")[0], repeated)
    if baseline is None or baseline.status != "ok":
        reason = "no row" if baseline is None else f"{REASONS[baseline.status][1]}, {baseline.note.split('; ')[0]}"
        return Bar(method, row, None, "no_baseline", reason, repeated)
    if not row.median or not baseline.median:
        return Bar(method, row, None, "error", "the time is 0", repeated)
    return Bar(method, row, baseline.median / row.median, "ok", "", repeated)


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean; None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def against_best(ours: Bar, others: Iterable[Bar], published: bool) -> float | None:
    """Our speedup over the fastest other method at the same problem: the fastest exact one, unless nothing is recorded."""
    rivals = [b.ratio for b in others if b.ratio is not None and (published or b.exact)]
    return ours.ratio / max(rivals) if ours.ratio is not None and rivals else None


def footnotes(bars: Iterable[Bar], label: Callable[[str], str]) -> str:
    """One sentence that explains every letter drawn in place of a bar, with the methods and their reasons."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for b in bars:
        if b.status != "ok":
            methods = reasons.setdefault(b.status, {}).setdefault(b.reason, [])
            if label(b.method) not in methods:
                methods.append(label(b.method))
    parts = []
    for status, (letter, meaning) in REASONS.items():
        if status in reasons:
            # Without a baseline the reason is the baseline's, whichever method lacks it.
            why = list(reasons[status]) if status == "no_baseline" else _by_method(reasons[status])
            parts.append(f"{letter} = {meaning} ({'; '.join(why)})")
    return f"In place of a bar: {'. '.join(parts)}." if parts else ""


def _by_method(reasons: Mapping[str, Sequence[str]]) -> list[str]:
    """Methods with all their reasons; what several reasons begin with, up to a colon, is said once."""
    groups: dict[str, dict[str, list[str]]] = {}
    for text, methods in reasons.items():
        start, _, rest = text.partition(": ")
        groups.setdefault(", ".join(methods), {}).setdefault(start, []).append(rest)
    found = []
    for methods, starts in groups.items():
        texts = [
            f"{start}: {', '.join(filter(None, rests))}" if any(rests) else start for start, rests in starts.items()
        ]
        found.append(methods if texts == ["no row"] else f"{methods}: {'; '.join(t for t in texts if t != 'no row')}")
    return found


def number(value: float | None) -> str:
    """Six significant digits, empty for None."""
    return "" if value is None else f"{value:.6g}"


def truth(value: bool | None) -> str:
    """true, false, or empty for None."""
    return _IN_TABLES[value]


def outcome(row: Measurement) -> dict[str, object]:
    """What a table says of how a row came about: status, exactness, source, and why there is no number."""
    return {
        "status": row.status,
        "exact": truth(row.exact),
        "source": row.source,
        "reason": row.note if row.status != "ok" else "",
    }


def table_line(figure: str, b: Bar, gpu: str, baseline: Measurement | None, **where: object) -> dict[str, object]:
    """One line of the table behind a figure of speedups."""
    row = b.row
    return {
        "figure": figure,
        "gpu": gpu,
        **where,
        "method": b.method,
        "metric": row.metric if row else "",
        "unit": row.unit if row else "",
        "median": number(row.median) if row else "",
        "p20": number(row.p20) if row else "",
        "p80": number(row.p80) if row else "",
        "baseline_method": baseline.method if baseline else "",
        "baseline_median": number(baseline.median) if baseline else "",
        "speedup": number(b.ratio),
        "status": b.status,
        "exact": truth(b.exact),
        "repeated": truth(b.repeated),
        "source": row.source if row else "",
        "reason": b.reason,
        "note": row.note if row else "",
    }


def write_table(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, object]]) -> None:
    """Write a CSV whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def speedup_columns(*where: str) -> tuple[str, ...]:
    """Header for lines of `table_line` with those places."""
    return (
        "figure", "gpu", *where, "method", "metric", "unit", "median", "p20", "p80", "baseline_method", "baseline_median",
        "speedup", "status", "exact", "repeated", "source", "reason", "note",
    )  # fmt: skip
