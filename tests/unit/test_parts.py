"""Tables measured in parts: each cell by itself, kept, and put together only with what belongs to it."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from stof_kernels.benchmarking import parts, records
from stof_kernels.benchmarking.__main__ import main
from stof_kernels.benchmarking.config import job_settings
from stof_kernels.benchmarking.measurement import read_rows
from stof_kernels.benchmarking.parts import PartError, measure, merge

CELLS = ["causal:1x64", "longformer:1x64", "causal:2x48", "longformer:2x48"]


def alike(value):
    """The same for both kinds of device, as the config says it."""
    return {"cpu": value, "cuda": value}


CONFIG = {
    "seed": 3,
    "gpus": {"cpu": {"label": "CPU", "device": "cpu", "arch": "cpu"}},
    "experiments": {
        "mha": {
            "masks": ["causal", "longformer"],
            "sizes": alike([{"batch": 1, "seq_len": [64]}, {"batch": 2, "seq_len": [48]}]),
            "heads": 2,
            "head_dim": 16,
            "dtype": alike("float32"),
            "methods": "all",
            "timing": alike({"min_samples": 3, "max_samples": 6, "budget_s": 0.01, "warmup": 1}),
        }
    },
}


def measured(folder, keys=(), method="sdpa"):
    settings = job_settings(CONFIG, "mha", "cpu", method)
    return measure("cpu", "mha", method, settings, "cpu", folder, keys)


def origin(csv):
    return json.loads(records.provenance_of(csv).read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    measured(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "parts")


def test_a_part_holds_one_cell_and_is_kept(tmp_path, capsys):
    first = measured(tmp_path, CELLS[1:2])
    (csv,) = first
    assert origin(csv)["cells"] == [CELLS[1]]
    assert {(row.mask, row.batch, row.seq_len) for row in read_rows(csv)} == {("longformer", 1, 64)}
    assert len(list(tmp_path.rglob("*.csv"))) == 1
    before = csv.read_bytes()
    assert measured(tmp_path, CELLS[:2]) != first
    assert csv.read_bytes() == before
    assert "longformer:1x64: measured before, kept" in capsys.readouterr().out
    about = origin(csv)
    about["code"]["parts"]["masks"] = "0" * 12
    records.provenance_of(csv).write_text(json.dumps(about))
    measured(tmp_path, CELLS[1:2])  # of older code
    assert origin(csv)["code"]["parts"]["masks"] != "0" * 12


def test_a_cell_that_is_none_is_one_line(tmp_path):
    with pytest.raises(PartError, match=r"^mha has no cell 'causal:9x9', allowed: causal:1x64, longformer:1x64, .*$"):
        measured(tmp_path, ["causal:9x9"])


def test_after_a_broken_device_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "device_is_usable", lambda device: False)
    with pytest.raises(
        PartError, match=r"^longformer:1x64: .*sdpa\.csv left the device unusable, allowed: the rest in another"
    ):
        measured(tmp_path, CELLS[:2])
    assert len(list(tmp_path.rglob("*.csv"))) == 1


def test_parts_become_the_table_that_a_job_would_have_written(folder, tmp_path):
    measured(folder, method="torch_native")
    tables = merge(folder, CONFIG, tmp_path)
    assert [csv.relative_to(tmp_path).as_posix() for csv in tables] == [
        "measured/cpu/mha/sdpa.csv",
        "measured/cpu/mha/torch_native.csv",
    ]
    rows, facts = read_rows(tables[0]), origin(tables[0])
    assert list(dict.fromkeys(f"{row.mask}:{row.batch}x{row.seq_len}" for row in rows)) == CELLS
    assert "cells" not in facts
    assert "left_out" not in facts
    assert facts["settings"] == job_settings(CONFIG, "mha", "cpu", "sdpa")
    (run,) = facts["runs"]
    assert run["cells"] == CELLS
    assert len(run["run_ids"]) == len(CELLS)
    assert run["protocol"] == facts["protocol"]
    assert not records.staleness(tables[0])
    assert records.record(tmp_path, "cpu") == [
        tmp_path / "recorded" / csv.relative_to(tmp_path / "measured") for csv in tables
    ]


def test_runs_are_told_apart_and_what_is_missing_is_said(folder, tmp_path):
    for key in ("causal_1x64", "longformer_2x48"):
        csv = folder / key / "mha" / "sdpa.csv"
        records.provenance_of(csv).write_text(json.dumps(origin(csv) | {"date": "2026-01-01", "commit": "abc"}))
    shutil.rmtree(folder / "causal_2x48")
    (csv,) = merge(folder, CONFIG, tmp_path)
    facts = origin(csv)
    assert [(run["date"] == "2026-01-01", run["cells"]) for run in facts["runs"]] == [
        (True, ["causal:1x64", "longformer:2x48"]),
        (False, ["longformer:1x64"]),
    ]
    assert facts["date"] == facts["runs"][1]["date"]
    assert facts["left_out"] == "not measured: causal:2x48"


def test_cells_without_a_part_keep_their_recorded_rows(folder, tmp_path):
    merge(folder, CONFIG, tmp_path)
    (recorded,) = records.record(tmp_path, "cpu")
    before = read_rows(recorded)
    about = origin(recorded)
    about["runs"][0] |= {"date": "2026-01-01", "commit": "abc", "code": {"digest": "of then"}}
    records.provenance_of(recorded).write_text(json.dumps(about | {"date": "2026-01-01", "commit": "abc"}))
    for key in ("causal_1x64", "longformer_1x64", "longformer_2x48"):
        shutil.rmtree(folder / key)
    again = read_rows(folder / "causal_2x48" / "mha" / "sdpa.csv")
    (csv,) = merge(folder, CONFIG, tmp_path, keep=True)
    rows, facts = read_rows(csv), origin(csv)
    assert len(rows) == len(before)
    assert [row for row in rows if (row.mask, row.batch) == ("causal", 2)] == again
    assert [row for row in rows if (row.mask, row.batch) != ("causal", 2)] == [
        row for row in before if (row.mask, row.batch) != ("causal", 2)
    ]
    kept, new = facts["runs"]
    assert kept["cells"] == ["causal:1x64", "longformer:1x64", "longformer:2x48"]
    assert (kept["date"], kept["commit"], kept["code"]) == ("2026-01-01", "abc", {"digest": "of then"})
    assert len(kept["run_ids"]) == 4
    assert (new["cells"], new["date"]) == (["causal:2x48"], facts["date"])
    assert "left_out" not in facts
    about["code"]["parts"]["masks"] = "0" * 12
    records.provenance_of(recorded).write_text(json.dumps(about))
    with pytest.raises(PartError, match=r"recorded/cpu/mha/sdpa\.csv: measured with other code than today's"):
        merge(folder, CONFIG, tmp_path, keep=True)


def test_what_a_recorded_table_says_of_its_rows_is_not_lost_and_not_made_up(folder, tmp_path):
    merge(folder, CONFIG, tmp_path)
    (recorded,) = records.record(tmp_path, "cpu")
    shutil.rmtree(folder / "causal_1x64")
    about = origin(recorded) | {"commit": None, "date": "2026-01-01", "left_out": "peak_memory"}

    def merged(**changes):
        records.provenance_of(recorded).write_text(json.dumps(about | changes))
        (csv,) = merge(folder, CONFIG, tmp_path, keep=True)
        return origin(csv)

    one_job = {name: value for name, value in about.items() if name != "runs"}
    records.provenance_of(recorded).write_text(json.dumps(one_job))
    facts = origin(merge(folder, CONFIG, tmp_path, keep=True)[0])
    assert facts["runs"][0]["cells"] == ["causal:1x64"]
    assert facts["runs"][0]["commit"] is None  # not today's
    assert facts["runs"][0]["left_out"] == "peak_memory"
    assert "left_out" not in facts
    with pytest.raises(
        PartError, match=r"sdpa\.csv: does not say which run causal:1x64 is of, allowed: tables that do"
    ):
        merged(runs=["its id alone"])
    assert merged(runs=[about["runs"][0] | {"left_out": "of then"}])["runs"][0]["left_out"] == "of then"


DAMAGE = {
    "another machine than in": lambda about: about["machine"].update(name="another"),
    "another versions than in": lambda about: about["versions"].update(torch="1.0"),
    "another settings than in": lambda about: about["settings"].update(heads=3),
    "measured with other code than today's": lambda about: about["code"].update(digest="0" * 12),
    "causal:1x64 is in ": lambda about: about.update(cells=["causal:1x64"]),
    "causal:7x7 is no cell of the config, allowed: causal:1x64": lambda about: about.update(cells=["causal:7x7"]),
    "its provenance names no cell": lambda about: about.pop("cells"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_what_does_not_belong_together_is_one_line_and_nothing_is_written(folder, tmp_path, message):
    csv = folder / "causal_2x48" / "mha" / "sdpa.csv"
    about = origin(csv)
    DAMAGE[message](about)
    records.provenance_of(csv).write_text(json.dumps(about))
    with pytest.raises(PartError) as error:
        merge(folder, CONFIG, tmp_path / "results")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_the_commands(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    named = ["--config", str(config)]
    job = ["measure", *named, "--gpu=cpu", "--experiment=mha", "--method=sdpa", f"--parts={tmp_path / 'parts'}"]
    assert main([*job, CELLS[2]]) == 0
    assert main(["merge", *named, str(tmp_path / "parts"), "--results", str(tmp_path)]) == 0
    assert f"merged {tmp_path}/measured/cpu/mha/sdpa.csv" in capsys.readouterr().out
    assert main([*job, "causal"]) == 2
    assert capsys.readouterr().err.startswith("measure: mha has no cell 'causal', allowed: causal:1x64")
    assert main([*job, "--experiment=planner"]) == 2
    assert f"experiment 'planner' has no section in {config}, allowed: mha\n" in capsys.readouterr().err
    assert main(["merge", *named, str(tmp_path / "nothing")]) == 2
    assert "holds no parts" in capsys.readouterr().err
    assert main(["merge", "--config", str(tmp_path / "none.yaml"), str(tmp_path)]) == 2
    assert "none.yaml: there is no such file" in capsys.readouterr().err
