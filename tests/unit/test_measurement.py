"""Measurement rows: every legal row survives the CSV, every illegal one gives one line that says what is allowed."""

from __future__ import annotations

import math
import os
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stof_kernels.benchmarking.measurement import (
    COLUMNS,
    DTYPES,
    KEY_COLUMNS,
    METRICS,
    STATUSES,
    Measurement,
    MeasurementError,
    key,
    merge,
    read_rows,
    write_rows,
)

ROW = Measurement(
    experiment="mha", gpu="cpu", method="stof", mask="sliding_window", mask_params="w=23", batch=1, seq_len=512, kv_len=512,
    heads=12, kv_heads=12, head_dim=64, dtype="float32", metric="device_time", median=812.5, p20=800.0, p80=901.25,
    samples=30, exact=True, rel_err=1.5e-6, kept=0.0899, note="warm L2",
)  # fmt: skip

NAMES = st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=12).filter(lambda s: s[0].isalnum())
WORDS = st.one_of(st.just(""), NAMES)
LINES = st.text(st.characters(exclude_categories=("Cs", "Cc"))).filter(str.isprintable)
COUNTS = st.one_of(st.none(), st.integers(1, 10**9))
SHARES = st.one_of(st.none(), st.floats(0, 1))
POSITIVE = st.floats(0, allow_infinity=False, allow_nan=False)


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    status, source = draw(st.sampled_from(STATUSES)), draw(st.sampled_from(("measured", "published")))
    low, median, high = sorted(draw(st.tuples(POSITIVE, POSITIVE, POSITIVE)))
    timed = status == "ok" or (status == "wrong_result" and draw(st.booleans()))
    checked = source == "measured"
    note = draw(LINES)
    return Measurement(
        experiment=draw(NAMES), gpu=draw(NAMES), method=draw(NAMES), mask=draw(WORDS), mask_params=draw(LINES),
        model=draw(WORDS), operator=draw(WORDS), batch=draw(COUNTS), seq_len=draw(COUNTS), kv_len=draw(COUNTS),
        heads=draw(COUNTS), kv_heads=draw(COUNTS), head_dim=draw(COUNTS), hidden=draw(COUNTS),
        dtype=draw(st.sampled_from(DTYPES)), metric=draw(st.sampled_from(sorted(METRICS))),
        median=median if timed else None, p20=low if timed else None, p80=high if timed else None, samples=draw(COUNTS),
        status=status, exact=draw(st.one_of(st.none(), st.booleans())) if checked else None,
        rel_err=draw(st.one_of(st.none(), POSITIVE)) if checked else None, kept=draw(SHARES), source=source,
        note=note if status == "ok" or note.strip() else "out of memory",
    )  # fmt: skip


@given(st.lists(measurements(), max_size=8, unique_by=key))
def test_rows_survive_the_csv(tmp_path_factory: pytest.TempPathFactory, rows: list[Measurement]) -> None:
    path = tmp_path_factory.mktemp("rows") / "method.csv"
    write_rows(path, rows)
    assert read_rows(path) == rows


def test_the_file_is_plain(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.csv"
    write_rows(path, [ROW, replace(ROW, metric="mask_build_time", unit="", exact=False, rel_err=None, note="a, b")])
    lines = path.read_bytes().decode().split("\n")
    assert lines[0] == ",".join(COLUMNS)
    assert lines[1] == (
        "mha,cpu,stof,sliding_window,w=23,,,1,512,512,12,12,64,,float32,device_time,us,812.5,800.0,901.25,30,ok,true,1.5e-06,"
        "0.0899,measured,warm L2"
    )
    assert lines[2].endswith(',ok,false,,0.0899,measured,"a, b"')
    assert lines[3:] == [""]
    assert path.stat().st_mode & 0o777 == 0o644


def test_numpy_scalars_become_plain_numbers() -> None:
    np = pytest.importorskip("numpy")
    row = replace(ROW, batch=np.int64(1), median=np.float32(812.5), samples=np.int32(30))
    assert row == ROW
    assert (type(row.batch), type(row.median)) == (int, float)


def test_the_unit_comes_from_the_metric() -> None:
    assert replace(ROW, metric="latency", unit="").unit == "ms"
    assert set(METRICS.values()) == {"us", "ms", "s", "ratio", "MiB", "tokens/s"}


ILLEGAL = [
    ({"experiment": ""}, "column 'experiment': got '', allowed: a name"),
    ({"gpu": "../4090"}, "column 'gpu': got '../4090', allowed: a name"),
    ({"method": "my method"}, "column 'method': got 'my method', allowed: a name"),
    ({"mask": "sliding window"}, "column 'mask': got 'sliding window', allowed: empty, or a name"),
    ({"note": "two\nlines"}, r"column 'note': got 'two\nlines', allowed: text of one line"),
    ({"model": None}, "column 'model': got None, allowed: text of one line"),
    ({"batch": 1.0}, "column 'batch': got 1.0, allowed: an integer or None"),
    ({"batch": True}, "column 'batch': got True, allowed: an integer or None"),
    ({"seq_len": 0}, "column 'seq_len': got 0, allowed: an integer >= 1"),
    ({"median": "812"}, "column 'median': got '812', allowed: a number or None"),
    ({"median": math.inf, "p80": None}, "column 'median': got inf, allowed: a finite number >= 0"),
    ({"rel_err": math.nan}, "column 'rel_err': got nan, allowed: a finite number >= 0"),
    ({"p20": -1.0}, "column 'p20': got -1.0, allowed: a finite number >= 0"),
    ({"kept": 1.01}, "column 'kept': got 1.01, allowed: a share from 0 to 1"),
    ({"exact": "true"}, "column 'exact': got 'true', allowed: True, False or None"),
    ({"dtype": "fp16"}, "column 'dtype': got 'fp16', allowed: empty, float16"),
    ({"metric": "time"}, "column 'metric': got 'time', allowed: device_time, host_time"),
    ({"unit": "ms"}, "column 'unit': got 'ms', allowed: us (the unit of device_time)"),
    ({"status": "fine"}, "column 'status': got 'fine', allowed: ok, unsupported, oom, wrong_result, error"),
    ({"source": "guessed"}, "column 'source': got 'guessed', allowed: measured, published"),
    ({"p20": 813.0}, "column 'p20': got 813.0, allowed: at most the median (812.5)"),
    ({"p80": 812.0}, "column 'p80': got 812.0, allowed: at least the median (812.5)"),
    ({"median": None}, "column 'p20': got 800.0, allowed: empty where the median is empty"),
    (
        {"median": None, "p20": None, "p80": None},
        "column 'median': got None, allowed: a finite number >= 0 where status",
    ),
    ({"status": "oom"}, "column 'median': got 812.5, allowed: empty where status is oom"),
    (
        {"status": "wrong_result", "note": " "},
        "column 'note': got ' ', allowed: the reason, where status is wrong_result",
    ),
    ({"source": "published"}, "column 'exact': got True, allowed: empty in a published row"),
    ({"source": "published", "exact": None}, "column 'rel_err': got 1.5e-06, allowed: empty in a published row"),
]


@pytest.mark.parametrize(("change", "message"), ILLEGAL, ids=[message[:48] for _, message in ILLEGAL])
def test_illegal_rows_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(MeasurementError) as caught:
        replace(ROW, **change)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _corrupt(tmp_path: Path, old: str, new: str) -> Path:
    path = tmp_path / "stof.csv"
    write_rows(path, [replace(ROW, seq_len=128), ROW])
    text = path.read_text()
    assert old in text
    head, _, tail = text.rpartition(old)  # the last occurrence: line 3
    path.write_text(head + new + tail)
    return path


CORRUPT = [
    (
        ",512,512,",
        ",512.0,512,",
        "line 3: column 'seq_len': got '512.0', allowed: an integer >= 1 without a point, or empty",
    ),
    (",512,512,", ",1_024,512,", "line 3: column 'seq_len': got '1_024', allowed: an integer"),
    (",true,", ",True,", "line 3: column 'exact': got 'True', allowed: true, false or empty"),
    (",812.5,", ",nan,", "line 3: column 'median': got 'nan', allowed: a finite number"),
    (",812.5,", ",1e999,", "line 3: column 'median': got inf, allowed: a finite number"),
    (",812.5,", ",fast,", "line 3: column 'median': got 'fast', allowed: a finite number"),
    (",us,", ",,", "line 3: column 'unit': got '', allowed: the metric's unit"),
    (",us,", ",ms,", "line 3: column 'unit': got 'ms', allowed: us"),
    (",ok,", ",done,", "line 3: column 'status': got 'done', allowed: ok, unsupported"),
    (",measured,warm L2", ",measured", "line 3: 26 cells, allowed: 27, one per column"),
    ("warm L2", '"warm L2', "line 3: unexpected end of data, allowed: a CSV of measurement rows"),
    (",1,512,", ",1,128,", "line 3: two rows for the same cell (experiment=mha, gpu=cpu, method=stof"),
]


@pytest.mark.parametrize(("old", "new", "message"), CORRUPT, ids=[new for _, new, _ in CORRUPT])
def test_corrupt_files_name_file_line_and_column(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = _corrupt(tmp_path, old, new)
    with pytest.raises(MeasurementError) as caught:
        read_rows(path)
    assert f"{path}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


FOREIGN = [
    (b"", "line 1: the file is empty, allowed: a header with the columns experiment,gpu,"),
    (b"figure,gpu,run\n", "line 1: column 1: got 'figure', allowed: 'experiment'"),
    (",".join(COLUMNS[:5]).encode(), "line 1: column 6: got None, allowed: 'model'"),
    (",".join((*COLUMNS, "speed")).encode(), "line 1: column 28: got 'speed', allowed: 27 columns"),
    (b"\x89PNG\r\n", "byte 0 is not UTF-8, allowed: a CSV of measurement rows"),
    (b'{"experiment": "mha"}\n', 'line 1: column 1: got \'{"experiment": "mha"}\''),
]


@pytest.mark.parametrize(("content", "message"), FOREIGN, ids=[message[:40] for _, message in FOREIGN])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "foreign.csv"
    path.write_bytes(content)
    with pytest.raises(MeasurementError) as caught:
        read_rows(path)
    assert f"{path}: {message}" in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"nothing\.csv: cannot be read \(No such file or directory\)"):
        read_rows(tmp_path / "nothing.csv")


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "crlf.csv"
    write_rows(path, [ROW])
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_rows(path) == [ROW]


@pytest.mark.parametrize("column", KEY_COLUMNS)
def test_merge_keeps_apart_what_any_key_column_tells_apart(column: str) -> None:
    other = {"dtype": "bfloat16", "metric": "host_time"}.get(
        column, 7 if isinstance(getattr(ROW, column), int) else "x"
    )
    if column == "hidden":
        other = 768
    assert len(merge([ROW], [replace(ROW, **{column: other})])) == 2


def test_merge_refuses_a_second_number_for_a_cell() -> None:
    published = replace(ROW, source="published", exact=None, rel_err=None, median=805.0)
    with pytest.raises(MeasurementError, match=r"two rows for the same cell \(experiment=mha, gpu=cpu, method=stof"):
        merge([ROW], [published])


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stof.csv"
    write_rows(path, [ROW])

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_rows(path, [replace(ROW, seq_len=128)])
    assert read_rows(path) == [ROW]
    assert [p.name for p in tmp_path.iterdir()] == ["stof.csv"]


def test_importing_it_stays_light() -> None:
    code = (
        "import sys, stof_kernels.benchmarking.measurement; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
