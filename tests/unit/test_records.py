"""Recorded rows: promotion, staleness, and the duel of two methods; all through the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest

from stof_kernels import provenance as code
from stof_kernels.benchmarking import records
from stof_kernels.benchmarking.__main__ import main
from stof_kernels.benchmarking.experiments import attention_cell
from stof_kernels.benchmarking.measurement import Measurement, read_rows, write_rows
from stof_kernels.benchmarking.runner import run_job
from stof_kernels.benchmarking.timing import Budget, Timing

SETTINGS = {
    "masks": ["causal"],
    "sizes": [{"batch": 1, "seq_len": [64]}],
    "heads": 2,
    "head_dim": 16,
    "dtype": "float32",
    "timing": {"min_samples": 3, "max_samples": 3, "budget_s": 0.0},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    for name in ("sdpa", "splat", "stof"):
        folder = root / "measured" / "cpu" / "mha"
        run_job(
            "cpu", "mha", name, SETTINGS, folder / f"{name}.csv", folder / f"{name}.provenance.json", root / "j", "cpu"
        )
    return root


@pytest.fixture
def results(measured, tmp_path):
    shutil.copytree(measured, tmp_path / "results")
    return tmp_path / "results"


def call(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def fails(capsys, *arguments) -> str:
    assert call(*arguments) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


def change_provenance(csv, **values) -> None:
    path = records.provenance_of(csv)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_measured_rows_become_recorded_ones(results, capsys):
    assert call("record", "--gpu", "cpu", "--results", results) == 0
    assert capsys.readouterr().out.count("recorded ") == 3
    for name in ("sdpa", "splat", "stof"):
        source, target = (results / kind / "cpu/mha" / f"{name}.csv" for kind in ("measured", "recorded"))
        assert read_rows(target) == read_rows(source)
        assert records.read_provenance(target) == records.read_provenance(source)
    assert call("record", "--gpu", "cpu", "--results", results) == 0  # its own earlier rows may be replaced
    assert call("stale", "--strict", "--results", results) == 0


def test_a_busy_machine_is_warned_about(results, capsys):
    # The same control, five times slower beside one method than beside the other.
    for name, median in (("sdpa", 100.0), ("stof", 500.0)):
        csv = results / f"measured/cpu/mha/{name}.csv"
        times = {"median": median, "p20": median, "p80": median}
        write_rows(csv, [dataclasses.replace(r, **times) if r.metric == "control_time" else r for r in read_rows(csv)])
    assert call("record", "--gpu", "cpu", "--results", results) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        "warning: mha causal:1x64: the control took 5.0x longer beside stof than beside sdpa; was the machine busy?"
    ]
    assert records.busy_cells([results / "measured/cpu/mha/sdpa.csv"]) == []


def test_only_what_was_asked_for_is_recorded(results):
    assert call("record", "--gpu", "cpu", "--method", "splat", "--results", results) == 0
    assert [p.name for p in (results / "recorded").rglob("*.csv")] == ["splat.csv"]


def test_published_rows_are_replaced_only_on_request(results, capsys):
    target = results / "recorded/cpu/mha/sdpa.csv"
    published = Measurement(
        experiment="mha", gpu="cpu", method="sdpa", metric="host_time", median=7.0, source="published"
    )
    write_rows(target, [published])
    text = fails(capsys, "record", "--gpu", "cpu", "--results", results)
    assert "holds published rows, allowed: --replace" in text
    assert read_rows(target) == [published]
    assert not (results / "recorded/cpu/mha/splat.csv").exists()  # all or nothing
    assert call("record", "--gpu", "cpu", "--replace", "--results", results) == 0
    assert read_rows(target)[0].source == "measured"


def test_nothing_to_record_says_what_there_is(results, capsys):
    assert "measured there: mha/sdpa, mha/splat, mha/stof" in fails(
        capsys, "record", "--gpu", "cpu", "--method", "fa2", "--results", results
    )
    assert "measured there: nothing" in fails(capsys, "record", "--gpu", "h200", "--results", results)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda csv: csv.write_text("not,a,table\n"), "sdpa.csv: line 1: column 1: got 'not'"),
        (lambda csv: write_rows(csv, []), "holds no rows"),
        (lambda csv: records.provenance_of(csv).unlink(), "has no sdpa.provenance.json beside it"),
        (lambda csv: records.provenance_of(csv).write_text("{"), "cannot be read as JSON"),
        (lambda csv: change_provenance(csv, gpu="h200"), "gpu is 'h200', allowed: 'cpu'"),
        (lambda csv: change_provenance(csv, code=None), "lacks code or machine"),
        (lambda csv: change_provenance(csv, code={"digest": "0" * 12, "parts": {}}), "measure again"),
        (
            lambda csv: write_rows(csv, [dataclasses.replace(row, gpu="h200") for row in read_rows(csv)]),
            "a row of gpu 'h200', allowed: 'cpu'",
        ),
    ],
)
def test_what_cannot_be_trusted_is_not_recorded(results, capsys, damage, message):
    damage(results / "measured/cpu/mha/sdpa.csv")
    assert message in fails(capsys, "record", "--gpu", "cpu", "--results", results)
    assert not (results / "recorded").exists()


def test_older_code_is_listed_with_what_changed(results, capsys, monkeypatch):
    call("record", "--gpu", "cpu", "--results", results)
    capsys.readouterr()
    genuine = code.normalized_source
    edited = lambda path: genuine(path) + ("x" if path.name == "timing.py" else "")  # noqa: E731
    monkeypatch.setattr(code, "normalized_source", edited)
    assert call("stale", "--results", results) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # every one of them is timed by it
    assert re.search(
        r"sdpa\.csv: measured with code \w{12}, today's is \w{12} \(changed: benchmarking/timing\.py\)", lines[0]
    )
    assert call("stale", "--strict", "--results", results) == 1


def test_other_build_flags_are_listed(results):
    call("record", "--gpu", "cpu", "--results", results)
    assert records.stale(results) == []
    csv = results / "recorded/cpu/mha/stof.csv"
    build = records.read_provenance(csv)["build"]
    change_provenance(csv, build=build | {"flags": [*build["flags"], "-O0"]})
    assert [(entry.csv, entry.changed) for entry in records.stale(results)] == [(csv, ("build flags",))]


def test_a_recorded_method_that_is_gone_is_stale(results):
    call("record", "--gpu", "cpu", "--method", "sdpa", "--results", results)
    folder = results / "recorded/cpu/mha"
    for suffix in (".csv", ".provenance.json"):
        (folder / f"sdpa{suffix}").rename(folder / f"forgotten{suffix}")
    found = records.stale(results)
    assert [entry.csv.name for entry in found] == ["forgotten.csv"]
    assert "today's is gone" in str(found[0])


def test_published_rows_are_never_stale(results):
    csv = results / "recorded/4090/mha/fa2.csv"
    write_rows(
        csv,
        [Measurement(experiment="mha", gpu="4090", method="fa2", metric="host_time", median=1.0, source="published")],
    )
    records.provenance_of(csv).write_text('{"kind": "published"}')
    assert records.stale(results) == []


def test_a_duel_prints_a_ratio_with_its_spread(capsys):
    arguments = ["duel", "mha:causal:1x128,bigbird:2x64", "stof", "torch_native", "--seconds", "0.05", "--heads", "2"]
    assert call(*arguments, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["mha:causal:1x128", "bigbird:2x64"]
    for line in lines:
        found = re.search(r"([\d.]+) us against ([\d.]+) us: ([\d.]+)x \(([\d.]+)-([\d.]+) over (\d+) turns\)", line)
        first, second, ratio, low, high, turns = map(float, found.groups())
        assert 0 < low <= ratio <= high
        assert first > 0
        assert second > 0
        assert turns >= 1


def test_a_duel_is_decided_turn_by_turn(monkeypatch):
    from stof_kernels.benchmarking import duel as module

    # The machine is ten times slower in the second turn; the ratio of the two methods is 2 in each.
    monkeypatch.setattr(module, "interleave", lambda arms, budget: [[[1.0, 1.0], [10.0]], [[2.0], [20.0, 20.0]]])
    problem = attention_cell("causal:1x64", SETTINGS, "cpu").problem
    outcome = module.duel(problem, "stof", "torch_native", Budget())
    assert outcome.ratio == Timing(2.0, 2.0, 2.0, 2)
    assert (outcome.first.median, outcome.second.median) == (1.0, 20.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["causal:1x64", "stof"], "got 1 methods, allowed: two ids"),
        (["causal:1x64", "stof", "nobody"], "method 'nobody' is unknown, allowed: stof"),
        (["causal:1x64", "stof", "splat"], "splat: runs on cuda only"),
        (["causal:1x64", "stof", "sdpa_cudnn"], "sdpa_cudnn: runs on cuda only"),
        (["end_to_end:causal:1x64", "stof", "sdpa"], "experiment 'end_to_end' cannot duel"),
        (["mha:1x64", "stof", "sdpa"], "cell '1x64': allowed: MASK:BATCHxLENGTH"),
        ([",", "stof", "sdpa"], "allowed: a comma list"),
        (["causal:1x64", "stof", "sdpa", "--dtype", "half"], "dtype is 'half', allowed: float32"),
        (["causal:1x64", "stof", "sdpa", "--dtype", "float16"], "stof: runs float32 and bfloat16 on cpu"),
        (["causal:1x64", "stof", "sdpa", "--seconds", "-1"], "budget_s is -1.0, allowed: a number >= 0"),
    ],
)
def test_a_duel_that_cannot_be_held_is_one_clear_line(capsys, arguments, message):
    assert message in fails(capsys, "duel", *arguments, "--device", "cpu")
