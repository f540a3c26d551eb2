"""The experiment of duels: whose cells, which rows, what a cut and an edit cost."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from snakemake.utils import validate

from stof_kernels import provenance
from stof_kernels.baselines import Prepared, Unsupported, method, registry
from stof_kernels.baselines.torch_native import unfused_attention
from stof_kernels.benchmarking import config as checks
from stof_kernels.benchmarking import duel as module
from stof_kernels.benchmarking import fights, records
from stof_kernels.benchmarking.__main__ import main
from stof_kernels.benchmarking.check import relative_error, relative_errors
from stof_kernels.benchmarking.config import ConfigError
from stof_kernels.benchmarking.experiments import (
    EXPERIMENTS,
    SettingsError,
    attention_cell,
    attention_cells,
    duel_cells,
)
from stof_kernels.benchmarking.measurement import Measurement, read_rows
from stof_kernels.benchmarking.runner import run_job
from stof_kernels.benchmarking.turns import Turns

ROOT = Path(__file__).resolve().parents[2]
CONFIG = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
checks.normalize(CONFIG)
validate(CONFIG, str(ROOT / "workflow/schemas/config.schema.yaml"))
SETTINGS = {
    "cells": ["mha:causal:1x64", "mha_long:sliding_window(w=8):2x48:4/2x32", "mha_bf16:document:1x64"],
    "shapes": {
        "mha": {"heads": 2, "head_dim": 16, "dtype": "float32"},
        "mha_long": {"heads": 4, "head_dim": 16, "dtype": "float32"},
        "mha_bf16": {"heads": 2, "head_dim": 16, "dtype": "bfloat16"},
    },
    "seed": 3,
    "timing": {"min_samples": 3, "max_samples": 6, "budget_s": 0.01, "warmup": 1},
}


@pytest.fixture
def job(tmp_path: Path):
    """Run a job of duels in a temporary folder; returns its rows and its provenance."""

    def run(rival: str, settings=SETTINGS):
        files = [tmp_path / "results/measured/cpu/duel" / f"{rival}{kind}" for kind in (".csv", ".provenance.json")]
        run_job("cpu", "duel", rival, settings, *files, tmp_path / "journal.jsonl", "cpu")
        return read_rows(files[0]), json.loads(files[1].read_text())

    run.folder = tmp_path
    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """Register a rival for one test: ``fake(prepare)`` returns its id."""
    registry.discover()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "discover", lambda: None)

    def register(prepare) -> str:
        method("fake", label="Fake", experiments=("mha",))(prepare)
        return "fake"

    return register


def right(problem, tensors, factor: float = 1.0) -> Prepared:
    rule = problem.pattern.bind(problem.q_len, problem.kv_len)
    i = torch.arange(problem.q_len)
    keep = rule(i[:1], i[:1], i[:, None], i[None])
    groups = problem.heads // problem.kv_heads
    k, v = (t.repeat_interleave(groups, dim=1) for t in (tensors.k, tensors.v))
    return Prepared(lambda: factor * unfused_attention(tensors.q, k, v, keep, problem.scale), problem.pattern)


# ---- cells -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", [name for name in fights.FIELDS if name in CONFIG["experiments"]])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_key_of_an_attention_experiment_names_its_cell(experiment: str, device: str) -> None:
    settings = checks.job_settings(CONFIG, experiment, device)
    for cell in attention_cells(settings, device):
        assert attention_cell(cell.key, settings, device) == cell


def test_the_config_s_duels_are_held_as_their_experiments_define_the_cells() -> None:
    settings = checks.job_settings(CONFIG, "duel", "cuda", "fa4")
    cells = {cell.key: cell.problem for cell in duel_cells(settings, "cuda")}
    long = {c.key: c.problem for c in attention_cells(checks.job_settings(CONFIG, "mha_long", "cuda"), "cuda")}
    for key, problem in long.items():
        if key.startswith(("causal:", "document:")):
            assert cells[f"mha_long:{key}"] == problem
    grouped = cells["mha_long:causal:1x32768:32/8x128"]
    assert (grouped.heads, grouped.kv_heads, grouped.head_dim, grouped.dtype) == (32, 8, 128, "float16")
    assert cells["mha_bf16:causal:8x4096"].dtype == "bfloat16"
    assert not any("flex_flash" in key for key in settings)  # another rival's cells do not count for this job


def test_close_recorded_cells_are_duels() -> None:
    """What an H200 recorded at less than 1.05 times the best exact other is fought for, by that other."""
    fought = {
        (cell.key, spec.id)
        for spec in checks.selected_methods(CONFIG, "duel", "cuda")
        for cell in duel_cells(checks.job_settings(CONFIG, "duel", "cuda", spec.id), "cuda")
    }
    for experiment in ("mha", "mha_bf16"):
        cells = attention_cells(checks.job_settings(CONFIG, experiment, "cuda"), "cuda")
        times: dict[tuple, dict[str, Measurement]] = {}
        for path in (ROOT / "results/recorded/h200" / experiment).glob("*.csv"):
            for row in read_rows(path):
                if row.metric == "device_time" and row.status == "ok" and row.exact:
                    times.setdefault((row.mask, row.batch, row.seq_len), {})[row.method] = row
        for cell in cells:
            found = times[cell.problem.pattern.family, cell.problem.batch, cell.problem.q_len]
            best = min((row for name, row in found.items() if name != "stof"), key=lambda row: row.median)
            if best.median < 1.05 * found["stof"].median:
                name = f"{experiment}:{cell.key}"
                assert (name, best.method) in fought, f"{name} against {best.method}: add it to duel.fights"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"of": "end_to_end"}, "fights.cuda.0.of: 'end_to_end', allowed: mha, "),
        ({"of": "mha_artifact"}, "fights.cuda.0.of: 'mha_artifact', allowed: mha, "),
        ({"rivals": ["fa7"]}, "fights.cuda.0.rivals: 'fa7' is unknown, allowed: "),
        ({"rivals": ["stof"]}, "fights.cuda.0.rivals: 'stof' is unknown, allowed: "),
        ({"cells": ["casual:1x64"]}, "fights.cuda.0.cells: cell 'casual:1x64': allowed: MASK:BATCHxLENGTH"),
        (
            {"cells": ["causal:*x77"]},
            "fights.cuda.0.cells: 'causal:*x77' matches no cell of mha, allowed: keys such as ",
        ),
        ({"cells": ["sliding_window(w=x):1x64"]}, "fights.cuda.0.cells: cell 'sliding_window(w=x):1x64': "),
        ({"cells": ["sliding_window(v=3):1x64"]}, "fights.cuda.0.cells: cell 'sliding_window(v=3):1x64': mask "),
    ],
)
def test_an_entry_that_names_no_duel_is_one_line(entry: dict, said: str) -> None:
    config = json.loads(json.dumps(CONFIG))
    config["experiments"]["duel"]["fights"]["cuda"] = [{"of": "mha", "rivals": ["fa4"], "cells": ["causal:*"]} | entry]
    with pytest.raises(ConfigError) as raised:
        checks.check_relations(config)
    assert str(raised.value).startswith(f"config experiments.duel.{said}")
    assert "\n" not in str(raised.value)


def test_each_kind_of_device_has_its_own_rivals() -> None:
    cpu, cuda, both = (
        [spec.id for spec in checks.selected_methods(CONFIG, "duel", device)] for device in ("cpu", "cuda", "")
    )
    assert cpu == ["sdpa"]
    assert set(both) == {*cpu, *cuda}
    assert "stof" not in EXPERIMENTS["duel"].methods
    some = json.loads(json.dumps(CONFIG))
    some["experiments"]["duel"]["methods"] = ["fa4"]
    assert [spec.id for spec in checks.selected_methods(some, "duel", "cuda")] == ["fa4"]


def test_cells_of_another_experiment_than_the_settings_know_are_refused() -> None:
    with pytest.raises(SettingsError, match="cell 'scaling:causal:1x64': allowed: cells of mha, "):
        duel_cells(SETTINGS | {"cells": ["scaling:causal:1x64"]}, "cpu")


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_cell_has_both_times_and_their_ratio(job, capsys) -> None:
    rows, facts = job("sdpa")
    assert [row.metric for row in rows] == ["device_time", "stof_time", "speedup"] * 3
    assert {(row.experiment, row.gpu, row.method) for row in rows} == {("duel", "cpu", "sdpa")}
    assert [row.operator for row in rows[::3]] == ["mha", "mha_long", "mha_bf16"]
    assert [(row.heads, row.kv_heads, row.head_dim, row.dtype) for row in rows[::3]] == [
        (2, 2, 16, "float32"), (4, 2, 32, "float32"), (2, 2, 16, "bfloat16"),
    ]  # fmt: skip
    for rival, ours, ratio in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert rival.status == ours.status == ratio.status == "ok"
        assert all(row.exact for row in (rival, ours, ratio))
        assert 0 < rival.rel_err < 2e-2
        assert 0 < ours.rel_err < 2e-2
        assert ratio.unit == "ratio"
        assert ratio.samples >= 1  # turns
        assert ratio.p20 <= ratio.median <= ratio.p80
    assert "in turns in one process" in facts["protocol"]
    assert "control" not in facts["protocol"]
    line = capsys.readouterr().out.splitlines()[1]
    assert re.search(
        r"mha_long:sliding_window\(w=8\):2x48:4/2x32: [\d.]+ us, STOF [\d.]+ us: [\d.]+x \([\d.]+-[\d.]+, n=\d+\)", line
    )


def test_the_ratio_is_of_neighbouring_turns(job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is ten times slower in the second turn of three: medians over all turns would say 20 times, not twice."""
    ours, theirs = [[1.0], [10.0], [1.0]], [[2.0], [20.0, 20.0, 20.0], [2.2]]
    monkeypatch.setattr(module, "interleave", lambda arms, budget: [ours, theirs])
    rows, _ = job("sdpa", SETTINGS | {"cells": ["mha:causal:1x64"]})
    rival, own, ratio = rows
    assert (rival.median, own.median) == (20.0, 1.0)
    assert (ratio.median, ratio.samples) == (2.0, 3)
    assert ratio.p20 == 2.0
    assert ratio.p80 == pytest.approx(2.12)


def test_a_wrong_rival_has_no_time(job, fake) -> None:
    rows, _ = job(
        fake(lambda problem, tensors: right(problem, tensors, 1.01)), SETTINGS | {"cells": SETTINGS["cells"][:2]}
    )
    assert [(row.metric, row.status, row.operator) for row in rows] == [
        ("device_time", "wrong_result", "mha"),
        ("device_time", "wrong_result", "mha_long"),
    ]
    assert all(row.note.startswith("fake: wrong result, relative error 1.0e-02") for row in rows)


def test_our_own_wrong_result_has_no_time_either(job, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = module.attention_forms.prepare

    def ours_is_wrong(spec, problem, tensors):
        ready = prepare(spec, problem, tensors)
        return replace(ready, run=lambda: ready.run() + 1) if spec.id == "stof" else ready

    monkeypatch.setattr(module.attention_forms, "prepare", ours_is_wrong)
    rows, _ = job("sdpa", SETTINGS | {"cells": ["mha:causal:1x64"]})
    assert [(row.metric, row.status) for row in rows] == [("device_time", "wrong_result")]
    assert rows[0].note.startswith("stof: wrong result")


def test_an_output_that_changes_while_it_is_timed_is_wrong(job, fake) -> None:
    def prepare(problem, tensors):
        ready, calls = right(problem, tensors), []
        return replace(ready, run=lambda: calls.append(1) or ready.run() + (len(calls) > 2))

    rows, _ = job(fake(prepare), SETTINGS | {"cells": ["mha:causal:1x64"]})
    assert [(row.status, row.note) for row in rows] == [("wrong_result", "fake: the output changed while it was timed")]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Unsupported("no such mask"), "unsupported"), (MemoryError("no room"), "oom"), (RuntimeError("broken"), "error")],
)
def test_a_rival_that_fails_is_a_row(job, fake, error: Exception, status: str) -> None:
    def prepare(problem, tensors):
        raise error

    rows, _ = job(fake(prepare), SETTINGS | {"cells": ["mha:causal:1x64"]})
    assert [(row.metric, row.status) for row in rows] == [("device_time", status)]
    assert str(error) in rows[0].note


def test_a_rival_of_another_device_is_rows_without_torch(job) -> None:
    rows, _ = job("fa4")
    assert [row.status for row in rows] == ["unsupported"] * 3


def test_both_outputs_are_compared_with_one_reference() -> None:
    problem = attention_cell("bigbird:2x96", {"heads": 2, "head_dim": 16, "dtype": "float32"}, "cpu").problem
    tensors = module.shared_tensors(problem)
    good = right(problem, tensors).run()
    bad = good * 1.5
    both = relative_errors(problem, tensors, problem.pattern, [good, bad])
    assert both == [relative_error(problem, tensors, problem.pattern, out) for out in (good, bad)]
    assert both[0] < 1e-5
    assert both[1] == pytest.approx(0.5)
    assert math.isnan(relative_errors(problem, tensors, problem.pattern, [good, bad * math.nan])[1])


# ---- a cut, an edit, other jobs ---------------------------------------------------------------------------------------


def test_an_interrupted_job_holds_only_the_rest(job, fake, capsys) -> None:
    prepared, cut = [], True

    def prepare(problem, tensors):
        if cut and len(prepared) == 2:
            raise KeyboardInterrupt
        prepared.append(problem)
        return right(problem, tensors)

    rival = fake(prepare)
    with pytest.raises(KeyboardInterrupt):
        job(rival)
    cut = False
    rows, facts = job(rival)
    assert len(prepared) == 3
    assert facts["resumed"] is True
    assert [row.metric for row in rows] == ["device_time", "stof_time", "speedup"] * 3
    assert "[2/3] mha_long:sliding_window(w=8):2x48:4/2x32: finished before, kept" in capsys.readouterr().out


def test_other_heads_start_anew_and_more_cells_do_not(job, fake) -> None:
    prepared = []

    def prepare(problem, tensors):
        if len(prepared) == 1:
            prepared.append(None)
            raise KeyboardInterrupt
        prepared.append(problem)
        return right(problem, tensors)

    rival = fake(prepare)
    more = {"cells": [*SETTINGS["cells"][:2], "mha:causal:1x32"]}
    other = {"shapes": SETTINGS["shapes"] | {"mha": {"heads": 1, "head_dim": 16, "dtype": "float32"}}}
    for change, again in ((more, 2), (other, 3)):
        prepared.clear()
        with pytest.raises(KeyboardInterrupt):
            job(rival)
        del prepared[1:]
        prepared.append(None)
        job(rival, SETTINGS | change)
        assert len(prepared) - 2 == again


@pytest.mark.parametrize(
    "edited", ["baselines/sdpa.py", "baselines/stof.py", "planner", "benchmarking/duel.py", "masks"]
)
def test_an_edit_of_either_side_makes_rows_stale(job, monkeypatch: pytest.MonkeyPatch, edited: str) -> None:
    _, facts = job("sdpa", SETTINGS | {"cells": ["mha:causal:1x64"]})
    table = job.folder / "results/measured/cpu/duel/sdpa.csv"
    assert edited in facts["code"]["parts"]
    assert facts["build"]["target"] == "cpu"  # our own library ran
    assert records.staleness(table) is None
    digest = provenance.code_digest
    monkeypatch.setattr(records, "code_digest", lambda names: "0" * 12 if list(names) == [edited] else digest(names))
    assert edited in records.staleness(table).changed


def test_an_edit_of_a_third_method_changes_nothing() -> None:
    spec = EXPERIMENTS["duel"].spec("sdpa")
    found = EXPERIMENTS["duel"].depends_of(spec, "cpu")
    assert not any("fa4" in name or "flex" in name for name in found)


def test_jobs_that_share_a_device_are_alone_while_they_time(
    fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lock = Turns(tmp_path / "lock")
    monkeypatch.setattr(module, "turns", lambda: lock)
    seen = []
    interleave, prepare = module.interleave, module.attention_forms.prepare
    monkeypatch.setattr(module, "interleave", lambda *a: seen.append(("time", lock._is_alone)) or interleave(*a))
    monkeypatch.setattr(
        module.attention_forms, "prepare", lambda *a: seen.append((a[0].id, lock._is_alone)) or prepare(*a)
    )
    problem, chooser = (
        duel_cells(SETTINGS, "cpu")[0].problem,
        fake(right),
    )  # a method that may choose kernels by their time
    with lock.joined():
        module.duel(problem, "stof", "sdpa", module.Budget(2, 3, 0.0))
        module.duel(problem, "stof", chooser, module.Budget(2, 3, 0.0))
    assert seen == [("stof", False), ("sdpa", False), ("time", True), ("stof", True), ("fake", True), ("time", True)]


# ---- command line ----------------------------------------------------------------------------------------------------


def test_cells_of_every_experiment_can_be_named(capsys, tmp_path: Path) -> None:
    sections = {name: {"heads": 4, "head_dim": 16, "dtype": {"cpu": dtype, "cuda": "float16"}, "sizes": {}}
                for name, dtype in (("mha_long", "float32"), ("mha_bf16", "bfloat16"))}  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"experiments": sections}))
    cells = "mha_long:longformer(w=8,g=4):1x64:4/2x32,mha_bf16:causal:1x64,document:2x32"
    arguments = [
        "duel",
        cells,
        "stof",
        "sdpa",
        "--device",
        "cpu",
        "--seconds",
        "0.02",
        "--config",
        str(tmp_path / "c.yaml"),
    ]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].split() for line in lines] == [
        ["mha_long:longformer(w=8,g=4):1x64:4/2x32", "cpu", "float32"],
        ["mha_bf16:causal:1x64", "cpu", "bfloat16"],
        ["document:2x32", "cpu", "float32"],
    ]
    assert (
        main(["duel", "scaling:causal:1x64", "stof", "sdpa", "--device", "cpu", "--config", str(tmp_path / "c.yaml")])
        == 2
    )
    assert "the config has no section scaling" in capsys.readouterr().err


def test_what_is_given_goes_before_what_the_experiment_has() -> None:
    fields = {"mha_long": {"heads": 16, "head_dim": 64, "dtype": "float16"}}
    text = "mha_long:causal:1x64, mha_long:causal:1x64:8/2x128"
    plain, own = fights.parse_cells(text, {"heads": 4, "seed": 1}, fields, "cuda")
    assert (plain.problem.heads, plain.problem.head_dim, plain.problem.dtype) == (4, 64, "float16")
    assert (own.problem.heads, own.problem.kv_heads, own.problem.head_dim) == (8, 2, 128)
