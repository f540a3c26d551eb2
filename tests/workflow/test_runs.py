"""Whole runs of a tiny experiment: the client's commands, what a second run does, what changes plan and what they do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from stof_kernels.benchmarking.measurement import read_rows
from stof_kernels.figures import FIGURES

pytestmark = pytest.mark.slow

TINY = ("--configfile", "tiny.yaml")
MEASURED = Path("results/measured/cpu/mha")
MODEL_EXPERIMENTS = ("end_to_end", "ablation", "overhead", "tuning_cost", "motivation")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_all_measures_and_draws_everything(finished, finished_output: str) -> None:
    for figure in FIGURES:
        assert (finished.path / "results" / f"{figure}.pdf").read_bytes().startswith(b"%PDF"), figure
        assert (finished.path / "results" / f"{figure}.csv").stat().st_size > 0, figure
    rows = read_rows(finished.path / "results" / "tables" / "mha.csv")
    assert {row.gpu for row in rows} == {"cpu"}
    assert {row.method for row in rows} == {"stof", "torch_native", "fa4"}
    cells = [(row.mask, row.seq_len) for row in rows if row.method == "stof" and row.metric == "device_time"]
    assert sorted(cells) == [("causal", 32), ("causal", 48), ("longformer", 32), ("longformer", 48)]
    assert all(row.status == "ok" and row.exact for row in rows if row.method == "stof" and row.metric == "device_time")
    assert {row.status for row in rows if row.method == "fa4"} == {"unsupported"}
    # One line per cell on the terminal, and the same in the log.
    log = (finished.path / "results/logs/bench/cpu/mha/stof.log").read_text(encoding="utf-8")
    assert "mha cpu stof [3/4] causal:1x48: " in log
    assert "mha cpu stof [3/4] causal:1x48: " in finished_output
    assert json.loads((finished.path / MEASURED / "stof.provenance.json").read_text())["gpu"] == "cpu"


def test_whole_models_and_pairs_are_measured_and_drawn(finished) -> None:
    """One run of a model feeds Figures 11 to 13 and Table 4, each of which says whose run it is."""
    tables = {name: read_rows(finished.path / "results" / "tables" / f"{name}.csv") for name in MODEL_EXPERIMENTS}
    whole = {(row.method, row.metric): row for row in tables["end_to_end"] if not row.operator}
    assert whole["torch_native", "latency"].status == whole["stof", "latency"].status == "ok"
    assert 0 < whole["stof", "latency"].rel_err < 1e-4
    assert whole["mcfuser", "latency"].status == "unsupported"
    for experiment in ("ablation", "overhead", "tuning_cost"):
        assert {row.method for row in tables[experiment]} == {"stof"}
        path = finished.path / f"results/measured/cpu/{experiment}/stof.provenance.json"
        own, first = (
            json.loads(path.read_text()),
            finished.path / "results/measured/cpu/end_to_end/stof.provenance.json",
        )
        assert own["shared"]["run_id"] == json.loads(first.read_text())["run_id"]
        assert own["shared"]["cells"] == ["t5:1x32"]
    (tuning,) = tables["tuning_cost"]
    assert tuning.median == whole["stof", "tuning_time"].median
    assert len([row for row in tables["overhead"] if row.metric == "overhead_time"]) == 4
    pairs = {row.method: row for row in tables["motivation"] if row.metric == "device_time"}
    assert pairs["detached"].status == "ok"
    assert pairs["fused"].status == "ok"  # a second is too short for its compiler, which is awaited all the same
    drawn = (finished.path / "results" / "fig11.csv").read_text(encoding="utf-8").splitlines()
    assert [line for line in drawn if ",t5,1,32,stof,latency,ms," in line]


def test_every_attention_experiment_has_a_table(finished) -> None:
    tables = {
        name: read_rows(finished.path / "results" / "tables" / f"{name}.csv")
        for name in ("mha_bf16", "mha_long", "mask_build", "dynamic_mask", "scaling")
    }
    assert all({row.status for row in rows} == {"ok"} for rows in tables.values())
    assert {row.dtype for row in tables["mha_bf16"]} == {"bfloat16"}
    assert {"from_pattern", "update"} <= {row.operator for row in tables["mask_build"]}
    assert {row.operator for row in tables["dynamic_mask"]} == {"attention", "build_and_attention"}
    floors = (finished.path / "results" / "floors.csv").read_text(encoding="utf-8").splitlines()
    assert {line.split(",")[0] for line in floors[1:]} == {"mha", "mha_bf16", "mha_long", "dynamic_mask"}
    assert all("no measured rates" in line for line in floors[1:])  # what a CPU can do is not in the table of GPUs


def test_close_cells_are_fought_for(finished) -> None:
    rows = read_rows(finished.path / "results" / "tables" / "duel.csv")
    assert {(row.method, row.operator, row.mask) for row in rows} == {("torch_native", "mha", "causal")}
    assert [(row.seq_len, row.metric, row.status) for row in rows] == [
        (length, metric, "ok") for length in (32, 48) for metric in ("device_time", "stof_time", "speedup")
    ]
    lines = (finished.path / "results" / "duel.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    provenance = json.loads((finished.path / "results/measured/cpu/duel/torch_native.provenance.json").read_text())
    assert provenance["settings"]["cells"] == ["mha:causal:1x32", "mha:causal:1x48"]
    assert provenance["build"]["target"] == "cpu"


def test_second_run_does_nothing(finished) -> None:
    before = contents(finished.path / "results")
    assert "Nothing to be done" in finished.snakemake("--cores", "1", "all", *TINY)
    assert contents(finished.path / "results") == before


def test_touching_and_commenting_plans_nothing(finished) -> None:
    finished.edit("src/stof_kernels/benchmarking/timing.py", "from __future__", "# A remark.\nfrom __future__")
    finished.edit("src/stof_kernels/kernels/csrc/bindings/library.cpp", "#include", "// A remark.\n#include")
    finished.edit("workflow/scripts/bench.py", "with job", "# A remark.\nwith job")
    for path in finished.path.glob("workflow/scripts/*.py"):
        path.touch()
    assert finished.planned("all", *TINY) == {}


def test_code_edits_plan_what_depends_on_them_in_one_go(finished) -> None:
    def planned() -> dict[str, int]:
        jobs = finished.planned("all", *TINY)
        return {rule: count for rule, count in jobs.items() if rule in ("build_extension", "bench")}

    def append(name: str, code: str) -> None:
        with (finished.path / "src" / "stof_kernels" / name).open("a", encoding="utf-8") as file:
            file.write(code)

    library = "kernels/csrc/bindings/library.cpp"
    original = (finished.path / "src" / "stof_kernels" / library).read_text(encoding="utf-8")
    append(library, "\nstatic const int unused [[maybe_unused]] = 1;\n")
    # stof alone runs the library, in every experiment that measures it, and beside its rival in the duels.
    tiny = yaml.safe_load((finished.path / "tiny.yaml").read_text(encoding="utf-8"))["experiments"]
    assert planned() == {
        "build_extension": 1,
        "bench": sum("stof" in section.get("methods", ["stof"]) for section in tiny.values()),
    }
    (finished.path / "src" / "stof_kernels" / library).write_text(original, encoding="utf-8")
    assert planned() == {}  # a revert finds the old build
    append("baselines/torch_native.py", "\nUNUSED = 1\n")
    assert planned() == {"bench": 2}  # alone and in its duel
    append("benchmarking/timing.py", "\nUNUSED = 1\n")
    assert planned()["bench"] >= 2  # everything that is timed


def test_settings_plan_only_measurements(finished) -> None:
    finished.edit("tiny.yaml", "head_dim: 16", "head_dim: 24")
    jobs = finished.planned("all", *TINY)
    assert jobs["bench"] == 4  # the methods of mha and the duel for its cells, not the planner's job
    assert "build_extension" not in jobs
    assert not [rule for rule in jobs if rule in ("plot_fig11", "plot_masks")]


def test_switching_gpu_and_source_never_mixes_rows(finished) -> None:
    measured, recorded = (contents(finished.path / "results" / kind) for kind in ("measured", "recorded"))
    table, pdf = finished.path / "results/tables/mha.csv", finished.path / "results/fig9_10.pdf"
    here, drawn_here = table.read_bytes(), pdf.read_bytes()

    finished.snakemake("--config", "gpu=4090")  # the client's command: an integer, and all targets
    rows = read_rows(table)
    assert {(row.gpu, row.source) for row in rows} == {("4090", "published")}
    drawn_there = pdf.read_bytes()
    assert drawn_there != drawn_here

    finished.snakemake("results/fig9_10.pdf", "--config", "gpu=4090,a100")
    assert {row.gpu for row in read_rows(table)} == {"4090", "a100"}
    assert pdf.read_bytes() not in (drawn_here, drawn_there)

    finished.snakemake("results/fig9_10.pdf", *TINY)  # no --cores: the default profile has it
    assert table.read_bytes() == here
    assert pdf.read_bytes() == drawn_here
    assert contents(finished.path / "results" / "measured") == measured
    assert contents(finished.path / "results" / "recorded") == recorded


def test_recorded_rows_are_drawn_instead_of_measured_ones(finished) -> None:
    own = finished.path / "results" / "recorded" / "cpu"
    shutil.rmtree(own, ignore_errors=True)
    finished.run("python", "-m", "stof_kernels.benchmarking", "record", "--gpu", "cpu", "--method", "torch_native")
    output = finished.snakemake("results/fig9_10.pdf", *TINY, "--config", "source=recorded")
    assert "gpu cpu: recorded rows, as configured" in output
    assert {row.method for row in read_rows(finished.path / "results/tables/mha.csv")} == {"torch_native"}


def test_a_gpu_without_rows_has_a_page_that_says_so(finished) -> None:
    finished.edit("config.yaml", "match: \\bH100\\b", "match: (?!)  # never here")
    finished.snakemake("figures", *TINY, "--config", "gpu=h100")
    assert read_rows(finished.path / "results/tables/mha.csv") == []
    assert (finished.path / "results/fig9_10.pdf").read_bytes().startswith(b"%PDF")


def test_report(finished) -> None:
    finished.snakemake("all", *TINY, "--report", "report.html")
    text = (finished.path / "report.html").read_text(encoding="utf-8")
    assert all(figure in text for figure in FIGURES)


def test_a_failing_job_prints_one_line_and_logs_its_traceback(finished) -> None:
    table = finished.path / MEASURED / "torch_native.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("causal", "caus\x07al", 1), encoding="utf-8")
    output = finished.snakemake("aggregate", *TINY, status=1)
    ours = [line for line in output.splitlines() if str(MEASURED / "torch_native.csv") in line and "input:" not in line]
    assert len(ours) == 1
    assert "(log: results/logs/aggregate/mha.log)" in ours[0]
    assert "Traceback" not in output
    assert "Traceback" in (finished.path / "results/logs/aggregate/mha.log").read_text(encoding="utf-8")


def test_a_missing_compiler_is_one_line(repo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path / "cache"))
    output = repo.snakemake("build", *TINY, status=1)
    ours = [line for line in output.splitlines() if "no-such-compiler" in line]
    assert len(ours) == 1
    assert "Traceback" not in output
