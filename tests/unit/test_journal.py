"""The journal: nothing finished is lost, nothing torn or foreign is believed."""

from __future__ import annotations

import json

import pytest

from stof_kernels.benchmarking.journal import Journal
from stof_kernels.benchmarking.measurement import Measurement

IDENTITY = {"method": "m", "settings": {"seed": 0, "timing": {"budget_s": 0.5}}, "code": "abc"}


def row(median: float, mask: str = "causal") -> Measurement:
    return Measurement(experiment="mha", gpu="cpu", method="m", mask=mask, metric="device_time", median=median)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "deep" / "m.jsonl"
    journal = Journal(path, IDENTITY, {"run_id": "first"})
    journal.finish("causal:1x128", [row(1.25)])
    journal.finish("bigbird:1x128", [row(2.5, "bigbird"), row(3.5, "full")])
    return path


def test_a_resumed_journal_gives_back_rows_and_the_first_run(path):
    journal = Journal(path, IDENTITY, {"run_id": "second"})
    assert journal.resumed
    assert journal.about == {"run_id": "first"}
    assert journal.done == {
        "causal:1x128": [row(1.25)],
        "bigbird:1x128": [row(2.5, "bigbird"), row(3.5, "full")],
    }


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_costs_that_cell_only(path, cut):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    journal = Journal(path, IDENTITY, {})
    assert list(journal.done) == ["causal:1x128"]
    journal.finish("bigbird:1x128", [row(9.0)])
    assert Journal(path, IDENTITY, {}).done["bigbird:1x128"] == [row(9.0)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    "junk", [b"\x00\xff\n", b'{"cell": "x"}\n', b'{"cell": "x", "rows": [{"metric": "none"}]}\n', b"7\n"]
)
def test_an_unreadable_line_is_dropped(path, junk):
    path.write_bytes(path.read_bytes() + junk)
    assert list(Journal(path, IDENTITY, {}).done) == ["causal:1x128", "bigbird:1x128"]


@pytest.mark.parametrize(
    "changed",
    [
        IDENTITY | {"code": "abd"},
        IDENTITY | {"settings": {"seed": 1, "timing": {"budget_s": 0.5}}},
        IDENTITY | {"machine": "another"},
    ],
)
def test_other_code_settings_or_machine_start_anew(path, changed):
    journal = Journal(path, changed, {"run_id": "second"})
    assert not journal.resumed
    assert journal.done == {}
    assert journal.about == {"run_id": "second"}
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"\n", b"not json\n", b'{"identity"', b"[]\n"])
def test_a_file_that_is_no_journal_starts_anew(tmp_path, content):
    path = tmp_path / "m.jsonl"
    path.write_bytes(content)
    assert not Journal(path, IDENTITY, {}).resumed
    assert Journal(path, IDENTITY, {}).resumed


def test_a_closed_journal_is_gone(path):
    journal = Journal(path, IDENTITY, {})
    journal.close()
    journal.close()
    assert not path.exists()
