"""The one row type of every measurement, and its CSV form.

A table is long format: one row per measured (or missing) number, the same columns in every file. Rows are checked when they
are made, so that a row in memory or on disk is always a legal one. Standard library only: the workflow imports this while it
parses its rules.
"""

from __future__ import annotations

import csv
import io
import math
import numbers
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

METRICS: dict[str, str] = {
    "device_time": "us",  # one call on the device: CUDA-graph replay; on the CPU the wall time of one call
    "host_time": "us",  # one eager call as the host sees it
    "control_time": "us",  # the fixed control, interleaved in the same cell
    "stof_time": "us",  # our call, in turns with the device_time of its rival (duel)
    "speedup": "ratio",  # the rival's time / ours, turn by turn; above 1 ours is faster (duel)
    "mask_build_time": "us",
    "plan_time": "us",
    "predicted_time": "us",  # the cost model's estimate
    "regret": "ratio",  # chosen time / best time of an exhaustive search
    "latency": "ms",  # one forward pass of a whole model
    "overhead_time": "ms",  # one part of the tuner's own work; the part is named in `operator`
    "tuning_time": "s",
    "peak_memory": "MiB",
    "throughput": "tokens/s",
}
"""Metric -> the one unit it is written in."""

STATUSES = ("ok", "unsupported", "oom", "wrong_result", "error")
SOURCES = ("measured", "published")
DTYPES = ("", "float16", "bfloat16", "float32", "float64")

_ALLOWED_FILE = "allowed: a CSV of measurement rows"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # names that become folders and files
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]*")  # a model may be called organisation/name
_BOOL = re.compile(r"true|false")
_INT = re.compile(r"[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


class MeasurementError(ValueError):
    """A row or a file of rows that is not legal. The message is one line: where, which column, what it is, what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number, what it measures, and how sure we are of it. The field order is the column order of the CSV.

    Empty text or None means unknown or not applicable. Raises MeasurementError when the fields do not fit together.
    """

    experiment: str
    gpu: str
    method: str
    mask: str = ""  # family
    mask_params: str = ""
    model: str = ""
    operator: str = ""
    batch: int | None = None
    seq_len: int | None = None
    kv_len: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    dtype: str = ""
    metric: str
    unit: str = ""  # filled in from the metric
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    samples: int | None = None
    status: str = "ok"
    exact: bool | None = None  # the mask that the method applied is the cell's mask
    rel_err: float | None = None  # against the fp32 reference of the mask that the method applied
    kept: float | None = None  # share of (query, key) pairs that the mask keeps
    source: str = "measured"
    note: str = ""

    def __post_init__(self) -> None:
        for name in _INTEGERS + _FLOATS:  # NumPy scalars become Python's, so that equal rows compare and print the same
            value = getattr(self, name)
            kind = numbers.Integral if name in _INTEGERS else numbers.Real
            if isinstance(value, kind) and not isinstance(value, bool):
                object.__setattr__(self, name, int(value) if name in _INTEGERS else float(value))
        if not self.unit and self.metric in METRICS:
            object.__setattr__(self, "unit", METRICS[self.metric])
        for column, allowed in _problems(self):
            raise MeasurementError(_complaint(column, getattr(self, column), allowed))


COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(Measurement))
_INTEGERS = ("batch", "seq_len", "kv_len", "heads", "kv_heads", "head_dim", "hidden", "samples")
_FLOATS = ("median", "p20", "p80", "rel_err", "kept")
KEY_COLUMNS: tuple[str, ...] = (*COLUMNS[: COLUMNS.index("metric")], "metric")
"""What a row measures. Two rows of one table never agree in all of these."""


def _complaint(column: str, value: object, allowed: str) -> str:
    return f"column {column!r}: got {value!r}, allowed: {allowed}"


def _problems(row: Measurement) -> Iterable[tuple[str, str]]:
    """(column, what is allowed) for everything wrong with the row, most basic first."""
    yield from _type_problems(row)
    yield from _vocabulary_problems(row)
    yield from _number_problems(row)
    yield from _status_problems(row)


def _type_problems(row: Measurement) -> Iterable[tuple[str, str]]:
    for name in COLUMNS:
        value = getattr(row, name)
        if name in _INTEGERS:
            if value is not None and type(value) is not int:
                yield name, "an integer or None"
        elif name in _FLOATS:
            if value is not None and type(value) is not float:
                yield name, "a number or None"
        elif name == "exact":
            if value is not None and type(value) is not bool:
                yield name, "True, False or None"
        elif not isinstance(value, str) or not value.isprintable():
            yield name, "text of one line, without control characters"


def _vocabulary_problems(row: Measurement) -> Iterable[tuple[str, str]]:
    for name in ("experiment", "gpu", "method"):
        if not _NAME.fullmatch(getattr(row, name)):
            yield name, "a name of letters, digits, '_', '.' and '-'"
    for name in ("mask", "model", "operator"):
        if getattr(row, name) and not _WORD.fullmatch(getattr(row, name)):
            yield name, "empty, or a name of letters, digits, '_', '.', '/' and '-'"
    for name, words in (("dtype", DTYPES), ("metric", tuple(METRICS)), ("status", STATUSES), ("source", SOURCES)):
        if getattr(row, name) not in words:
            yield name, ", ".join(word or "empty" for word in words)
    if row.metric in METRICS and row.unit != METRICS[row.metric]:
        yield "unit", f"{METRICS[row.metric]} (the unit of {row.metric})"


def _number_problems(row: Measurement) -> Iterable[tuple[str, str]]:
    for name in _INTEGERS:
        value = getattr(row, name)
        if value is not None and value < 1:
            yield name, "an integer >= 1, or empty"
    for name in _FLOATS:
        value = getattr(row, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            yield name, "a finite number >= 0, or empty"
    if row.kept is not None and row.kept > 1:
        yield "kept", "a share from 0 to 1, or empty"
    for name in ("p20", "p80"):
        if getattr(row, name) is not None and row.median is None:
            yield name, "empty where the median is empty"
    if row.p20 is not None and row.median is not None and row.p20 > row.median:
        yield "p20", f"at most the median ({row.median!r})"
    if row.p80 is not None and row.median is not None and row.p80 < row.median:
        yield "p80", f"at least the median ({row.median!r})"


def _status_problems(row: Measurement) -> Iterable[tuple[str, str]]:
    if row.status == "ok" and row.median is None:
        yield "median", "a finite number >= 0 where status is ok"
    if row.status in ("unsupported", "oom", "error") and row.median is not None:
        yield "median", f"empty where status is {row.status}"
    if row.status != "ok" and not row.note.strip():
        yield "note", f"the reason, where status is {row.status}"
    if row.source == "published":
        for name in ("exact", "rel_err"):
            if getattr(row, name) is not None:
                yield name, "empty in a published row (nobody checked it here)"


def key(row: Measurement) -> tuple[object, ...]:
    """What the row measures: its values in KEY_COLUMNS."""
    return tuple(getattr(row, name) for name in KEY_COLUMNS)


def merge(*tables: Iterable[Measurement]) -> list[Measurement]:
    """All rows in order. MeasurementError if two rows measure the same thing: tables never mix two sources of one number."""
    merged: dict[tuple[object, ...], Measurement] = {}
    for table in tables:
        for row in table:
            _add(merged, row)
    return list(merged.values())


def _add(rows: dict[tuple[object, ...], Measurement], row: Measurement) -> None:
    if key(row) in rows:
        raise MeasurementError(f"two rows for the same cell ({_cell(row)}), allowed: one row per cell and metric")
    rows[key(row)] = row


def _cell(row: Measurement) -> str:
    return ", ".join(f"{name}={getattr(row, name)}" for name in KEY_COLUMNS if getattr(row, name) not in ("", None))


def _to_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def write_rows(path: str | os.PathLike[str], rows: Iterable[Measurement]) -> None:
    """Write a table whole or not at all: a temporary file beside it, flushed, then renamed over ``path``.

    UTF-8, lines end in a newline alone; folders are made. MeasurementError for two rows of one cell.
    """
    path = Path(path)
    rows = merge(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([_to_text(value) for value in astuple(row)] for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private to the user
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_rows(path: str | os.PathLike[str]) -> list[Measurement]:
    """Rows of a table. MeasurementError (file, line, column, value, what is allowed) for anything that is not one."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise MeasurementError(f"{path}: cannot be read ({error.strerror}), {_ALLOWED_FILE}") from None
    except UnicodeDecodeError as error:
        raise MeasurementError(f"{path}: byte {error.start} is not UTF-8, {_ALLOWED_FILE}") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: dict[tuple[object, ...], Measurement] = {}
    try:
        _check_header(next(reader, []))
        for cells in reader:
            _add(rows, _from_text(cells))
    except (MeasurementError, csv.Error) as error:
        allowed = "" if isinstance(error, MeasurementError) else f", {_ALLOWED_FILE}"
        raise MeasurementError(f"{path}: line {max(1, reader.line_num)}: {error}{allowed}") from None
    return list(rows.values())


def _check_header(header: Sequence[str]) -> None:
    if not header:
        raise MeasurementError(f"the file is empty, allowed: a header with the columns {','.join(COLUMNS)}")
    for i, expected in enumerate(COLUMNS):
        found = header[i] if i < len(header) else None
        if found != expected:
            columns = ",".join(COLUMNS)
            raise MeasurementError(f"column {i + 1}: got {found!r}, allowed: {expected!r} (columns: {columns})")
    if len(header) > len(COLUMNS):
        extra = header[len(COLUMNS)]
        raise MeasurementError(f"column {len(COLUMNS) + 1}: got {extra!r}, allowed: {len(COLUMNS)} columns")


def _from_text(cells: Sequence[str]) -> Measurement:
    if len(cells) != len(COLUMNS):
        raise MeasurementError(f"{len(cells)} cells, allowed: {len(COLUMNS)}, one per column")
    values: dict[str, object] = dict(zip(COLUMNS, cells, strict=True))
    for name in _INTEGERS:
        values[name] = _parse(name, str(values[name]), _INT, int, "an integer >= 1 without a point, or empty")
    for name in _FLOATS:
        values[name] = _parse(name, str(values[name]), _FLOAT, float, "a finite number >= 0, or empty")
    values["exact"] = _parse("exact", str(values["exact"]), _BOOL, "true".__eq__, "true, false or empty")
    if not values["unit"]:
        raise MeasurementError(_complaint("unit", "", "the metric's unit"))
    return Measurement(**values)  # type: ignore[arg-type]


def _parse(name: str, text: str, form: re.Pattern[str], convert: Callable[[str], object], allowed: str) -> object:
    if not text:
        return None
    if not form.fullmatch(text):
        raise MeasurementError(_complaint(name, text, allowed))
    return convert(text)
