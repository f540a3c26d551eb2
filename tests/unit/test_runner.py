"""Measuring jobs: what becomes a row, what a kill costs, and what the provenance file says and does not say."""

from __future__ import annotations

import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from stof_kernels import masks
from stof_kernels.baselines import Prepared, Unsupported, method, registry
from stof_kernels.baselines.torch_native import unfused_attention
from stof_kernels.benchmarking.cell import one_line
from stof_kernels.benchmarking.experiments import EXPERIMENTS, SettingsError, attention_cell, attention_cells
from stof_kernels.benchmarking.measurement import read_rows
from stof_kernels.benchmarking.runner import JobError, run_job

SETTINGS = {
    "masks": ["causal", "longformer"],
    "sizes": [{"batch": 1, "seq_len": [64, 96]}, {"batch": 2, "seq_len": [64]}],
    "heads": 2,
    "head_dim": 16,
    "dtype": "float32",
    "seed": 3,
    "timing": {"min_samples": 3, "max_samples": 6, "budget_s": 0.01, "warmup": 1},
}
DESIGN_EXPERIMENTS = [
    "mha", "mha_artifact", "mha_long", "mha_bf16", "mask_build", "planner", "scaling", "dynamic_mask", "duel", "end_to_end",
    "ablation", "overhead", "tuning_cost", "motivation",
]  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    """Register a method for one test: ``fake(prepare)`` returns its id."""
    registry.discover()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "discover", lambda: None)

    def register(prepare, **facts) -> str:
        method("fake", **({"label": "Fake", "experiments": ("mha",)} | facts))(prepare)
        return "fake"

    return register


@pytest.fixture
def job(tmp_path):
    """Run a job in a temporary folder; returns its rows and its provenance."""

    def run(name: str, settings=SETTINGS, experiment: str = "mha"):
        files = {kind: tmp_path / f"{name}.{kind}" for kind in ("csv", "provenance.json", "jsonl")}
        run_job("cpu", experiment, name, settings, *files.values(), "cpu")
        return read_rows(files["csv"]), json.loads(files["provenance.json"].read_text())

    run.folder = tmp_path
    return run


def right(problem, tensors, **facts) -> Prepared:
    rule = problem.pattern.bind(problem.q_len, problem.kv_len)
    i = torch.arange(problem.q_len)
    keep = rule(i[:1], i[:1], i[:, None], i[None])
    run = lambda: unfused_attention(tensors.q, tensors.k, tensors.v, keep, problem.scale)  # noqa: E731
    return Prepared(run, problem.pattern, **facts)


def times(rows):
    return [row for row in rows if row.metric == "device_time"]


def test_every_cell_has_a_checked_time_and_a_control(job, capsys):
    rows, _ = job("torch_native")
    shapes = [(row.mask, row.batch, row.seq_len) for row in times(rows)]
    assert shapes == [(m, b, s) for b, s in ((1, 64), (1, 96), (2, 64)) for m in ("causal", "longformer")]
    for row in times(rows):
        assert (row.status, row.exact, row.source, row.unit) == ("ok", True, "measured", "us")
        assert 0 < row.rel_err < 1e-5
        assert row.p20 <= row.median <= row.p80
        assert row.samples >= 3
        assert 0 < row.kept < 1
    assert {row.mask_params for row in rows if row.seq_len == 96} == {"offset=0", "w=10;g=10"}
    controls = [row for row in rows if row.metric == "control_time"]
    assert len(controls) == 6
    assert {row.note for row in controls} == {"dense SDPA"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("mha cpu torch_native [1/6] causal:1x64: ")


@pytest.mark.parametrize("before", [None, "elsewhere"])
@pytest.mark.parametrize("mode", [0o755, 0o644, None])
def test_a_job_assembles_with_torchs_ptxas(job, fake, tmp_path, monkeypatch, mode, before):
    (tmp_path / "bin").mkdir()
    ptxas = tmp_path / "bin" / "ptxas"
    if mode is not None:
        ptxas.write_text("")
        ptxas.chmod(mode)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setenv("TRITON_PTXAS_PATH", before or "")  # also makes sure that what a job sets goes away
    if before is None:
        monkeypatch.delenv("TRITON_PTXAS_PATH")
    seen = set()

    def prepare(problem, tensors):
        seen.add(os.environ.get("TRITON_PTXAS_PATH"))
        return right(problem, tensors)

    job(fake(prepare))
    assert seen == {before or (str(ptxas) if mode == 0o755 else None)}


def test_stof_times_its_mask_build_apart(job):
    rows, provenance = job("stof")
    builds = [row for row in rows if row.metric == "mask_build_time"]
    assert len(builds) == 6
    assert all(row.median > 0 for row in builds)
    assert all(row.status == "ok" and row.rel_err < 1e-5 for row in times(rows))
    assert provenance["build"]["target"] == "cpu"
    assert "-O3" in provenance["build"]["flags"]


def test_a_wrong_result_has_no_time(job, fake):
    def almost(problem, tensors):
        good = right(problem, tensors)
        return Prepared(lambda: good.run() * 1.0001, problem.pattern)

    rows, _ = job(fake(almost))
    assert len(rows) == 6
    for row in rows:
        assert (row.status, row.median, row.exact) == ("wrong_result", None, True)
        assert row.rel_err == pytest.approx(1e-4, rel=0.05)
        assert "relative error above 1e-05" in row.note


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_output_that_is_not_finite_is_wrong(job, fake, bad):
    def poisoned(problem, tensors):
        out = right(problem, tensors).run()
        out[0, 0, 0, 0] = bad
        return Prepared(lambda: out, problem.pattern)

    for row in job(fake(poisoned))[0]:
        assert (row.status, row.median, row.rel_err, row.note) == (
            "wrong_result",
            None,
            None,
            "the output is not finite",
        )


def test_an_output_that_changes_while_it_is_timed_is_wrong(job, fake):
    def drifting(problem, tensors):
        good, calls = right(problem, tensors), []
        return Prepared(lambda: good.run() * (1 if calls.append(1) or len(calls) < 3 else 2), problem.pattern)

    assert {(row.status, row.median) for row in job(fake(drifting))[0]} == {("wrong_result", None)}


def test_a_method_that_ignores_the_mask_is_timed_but_not_exact(job, fake):
    def dense(problem, tensors):
        every = torch.ones(problem.q_len, problem.kv_len, dtype=torch.bool)
        run = lambda: unfused_attention(tensors.q, tensors.k, tensors.v, every, problem.scale)  # noqa: E731
        return Prepared(run, masks.full(), exact=False, note="dense")

    rows = times(job(fake(dense, exact_by_design=False))[0])
    assert {(row.status, row.exact, row.note) for row in rows} == {("ok", False, "dense")}
    assert all(row.median > 0 and row.kept < 1 for row in rows)


def test_claiming_a_mask_that_was_not_applied_is_wrong(job, fake):
    def liar(problem, tensors):
        every = torch.ones(problem.q_len, problem.kv_len, dtype=torch.bool)
        return Prepared(
            lambda: unfused_attention(tensors.q, tensors.k, tensors.v, every, problem.scale), problem.pattern
        )

    assert {row.status for row in job(fake(liar))[0]} == {"wrong_result"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unsupported("no such mask"), "unsupported"),
        (MemoryError(), "oom"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB"), "oom"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "oom",
        ),
        (RuntimeError("something broke\nin /opt/some/where/kernel.cu:12\nmore"), "error"),
    ],
)
@pytest.mark.parametrize("when", ["prepare", "run"])
def test_a_failing_cell_is_a_row_and_the_rest_is_measured(job, fake, error, status, when):
    def picky(problem, tensors):
        def run():
            if when == "run" and problem.q_len == 96:
                raise error
            return right(problem, tensors).run()

        if when == "prepare" and problem.q_len == 96:
            raise error
        return Prepared(run, problem.pattern)

    rows = times(job(fake(picky))[0])
    assert [row.status for row in rows] == ["ok", "ok", status, status, "ok", "ok"]
    for row in rows[2:4]:
        assert row.median is None
        assert row.note
        assert "/opt" not in row.note


def test_an_exception_is_one_line_without_paths():
    error = RuntimeError("cannot read /home/someone/x/y.cpp\n\n  and ~/z/w.h too\nthird")
    assert one_line(error) == "RuntimeError: cannot read y.cpp and w.h too"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 999))) == 240


def test_out_of_memory_is_really_caught(job, fake):
    def huge(problem, tensors):
        return Prepared(lambda: torch.empty(1 << 60), problem.pattern)

    assert {row.status for row in job(fake(huge))[0]} == {"oom"}


def test_a_method_that_cannot_run_here_gives_rows_without_torch(tmp_path):
    code = f"""
        import sys
        from pathlib import Path
        from stof_kernels.benchmarking.runner import run_job
        for name in ("splat", "fa4", "torch_compile_reduce_overhead"):
            run_job("cpu", "mha", name, {SETTINGS!r}, Path(name + ".csv"), Path(name + ".json"), Path(name + ".jsonl"), "cpu")
        sys.exit("torch" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=False).returncode == 0
    notes = {name: {row.note for row in read_rows(tmp_path / f"{name}.csv")} for name in ("splat", "fa4")}
    assert notes["fa4"] == {"runs on cuda only"}
    assert notes["splat"] == {"runs on cuda only"}
    rows = read_rows(tmp_path / "splat.csv")
    assert [row.status for row in rows] == ["unsupported"] * 6
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_finished_job_leaves_no_journal_and_measures_anew(job):
    job("sdpa")
    assert not (job.folder / "sdpa.jsonl").exists()
    (job.folder / "sdpa.csv").unlink()
    assert len(times(job("sdpa")[0])) == 6


def interrupted_at_the_fourth(measured):
    """A right method that is interrupted, once, at the fourth cell; ``measured`` collects the problems it was asked for."""

    def prepare(problem, tensors):
        measured.append(problem)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return right(problem, tensors)

    return prepare


def test_an_interrupted_job_measures_only_the_rest(job, fake, capsys):
    measured = []
    name = fake(interrupted_at_the_fourth(measured))
    with pytest.raises(KeyboardInterrupt):
        job(name)
    assert not (job.folder / "fake.csv").exists()
    rows, provenance = job(name)
    assert len(times(rows)) == 6
    assert len(measured) == 4 + 3
    assert len(set(measured)) == 6
    assert provenance["resumed"] is True
    assert capsys.readouterr().out.count("finished before, kept") == 3


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"seed": 4}, 6),
        ({"heads": 1}, 6),
        ({"timing": SETTINGS["timing"] | {"warmup": 2}}, 6),
        ({"masks": ["causal", "longformer", "full"]}, 6),
        ({}, 3),
    ],
)
def test_changed_settings_start_anew_and_more_cells_do_not(job, fake, change, again):
    measured = []
    name = fake(interrupted_at_the_fourth(measured))
    with pytest.raises(KeyboardInterrupt):
        job(name)
    rows, provenance = job(name, SETTINGS | change)
    assert len(measured) == 4 + again
    assert provenance["resumed"] is (change == {} or "masks" in change)
    assert len(times(rows)) == (9 if "masks" in change else 6)


def test_a_killed_job_loses_nothing_finished(tmp_path):
    settings = SETTINGS | {"timing": SETTINGS["timing"] | {"budget_s": 0.15, "max_samples": 10**6}}
    code = f"""
        from pathlib import Path
        from stof_kernels.benchmarking.runner import run_job
        run_job("cpu", "mha", "sdpa", {settings!r}, Path("a.csv"), Path("a.json"), Path("a.jsonl"), "cpu")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(2):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.csv").exists()
    kept = [json.loads(line)["rows"][0]["median"] for line in (tmp_path / "a.jsonl").read_text().splitlines()[1:3]]
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "[1/6] causal:1x64: finished before, kept" in second.stdout
    assert [row.median for row in times(read_rows(tmp_path / "a.csv"))[:2]] == kept
    assert len(times(read_rows(tmp_path / "a.csv"))) == 6


def test_provenance_says_how_and_on_what_but_not_where_or_who(job):
    _, provenance = job("stof")
    assert re.fullmatch(r"[0-9a-f]{12}", provenance["run_id"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", provenance["date"])
    assert provenance["kind"] == "measured"
    assert provenance["settings"] == SETTINGS
    assert provenance["seed"] == 3
    assert "after 1 for warm-up" in provenance["protocol"]
    assert provenance["machine"]["threads"] == torch.get_num_threads()
    assert provenance["machine"]["name"]
    assert provenance["versions"]["torch"] == torch.__version__
    assert set(provenance["code"]["parts"]) >= {
        "baselines/stof.py",
        "benchmarking/timing.py",
        "masks",
        "ops",
        "planner",
    }
    text = json.dumps(provenance)
    for private in (socket.gethostname(), str(Path.home()), str(Path.cwd()), str(job.folder), sys.prefix):
        assert private not in text
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)
    assert not re.search(r'"[^"]*(?:^|[\s"=])/[A-Za-z]\w*/', text)


def test_every_experiment_of_the_design_is_known():
    assert list(EXPERIMENTS) == DESIGN_EXPERIMENTS
    assert all(experiment.statement for experiment in EXPERIMENTS.values())
    assert "stof" in EXPERIMENTS["mha_artifact"].methods


@pytest.mark.parametrize(
    ("experiment", "name", "message"),
    [
        ("mha", "sdpaa", "method 'sdpaa' is unknown"),
        ("mhaa", "sdpa", "experiment 'mhaa' is unknown, allowed: mha, "),
        (
            "tuning_cost",
            "sdpa",
            "method 'sdpa' is not part of experiment 'tuning_cost', allowed: ",
        ),
        ("mha_artifact", "splat", "method 'splat' is not part of experiment 'mha_artifact'"),
    ],
)
def test_an_unknown_job_is_one_clear_line(job, experiment, name, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        job(name, experiment=experiment)
    assert "\n" not in str(error.value)


def test_a_job_runs_on_a_known_kind_of_device(tmp_path):
    with pytest.raises(JobError, match="device is 'tpu', allowed: cpu, cuda"):
        run_job("cpu", "mha", "sdpa", SETTINGS, tmp_path / "a", tmp_path / "b", tmp_path / "c", "tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_job_for_a_gpu_that_torch_does_not_see_is_one_clear_line(tmp_path):
    with pytest.raises(JobError, match=r"^torch \S+ sees no CUDA device here, allowed: a CUDA build of torch"):
        run_job("h200", "mha", "sdpa", SETTINGS, tmp_path / "a", tmp_path / "b", tmp_path / "c", "cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": ["causel"]}, "mask 'causel' is unknown, allowed: causal"),
        ({"masks": []}, "masks is [], allowed: a list of"),
        ({"sizes": [{"batch": 1}]}, "sizes has {'batch': 1}, allowed: a list of {batch"),
        ({"sizes": [{"batch": 0, "seq_len": [1]}]}, "batch is 0, allowed: an integer >= 1"),
        ({"heads": True}, "heads is True, allowed: an integer >= 1"),
        ({"heads": 6, "kv_heads": 4}, "kv_heads is 4, allowed: a divisor of heads (6)"),
        ({"dtype": "fp16"}, "dtype is 'fp16', allowed: float32"),
        ({"seed": "x"}, "seed is 'x', allowed: an integer"),
    ],
)
def test_settings_that_cannot_be_read_are_one_clear_line(change, message):
    with pytest.raises(SettingsError) as error:
        attention_cells(SETTINGS | change, "cpu")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["causal", "causal:1", "causal:0x8", "causal:1x-8", "nomask:1x8", "causal:1x8x2", ""])
def test_a_cell_that_has_no_such_name_is_one_clear_line(name):
    with pytest.raises(SettingsError, match="allowed: MASK:BATCHxLENGTH"):
        attention_cell(name, SETTINGS, "cpu")
