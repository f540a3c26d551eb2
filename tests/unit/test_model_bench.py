"""Whole models and pairs of operators as measuring jobs: what is checked before it is timed, what a row says, what is
shared."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from stof_kernels.baselines import Unsupported, models, pairs, registry
from stof_kernels.baselines.models import ModelProblem, ModelReady, run_variant
from stof_kernels.baselines.models import registry as model_registry
from stof_kernels.benchmarking import experiments, model_caches, model_memory, model_subject, runner
from stof_kernels.benchmarking.measurement import Measurement, read_rows, write_rows
from stof_kernels.benchmarking.model_problems import METRICS, ProblemError, model_problems, pair_problems
from stof_kernels.benchmarking.records import busy_cells
from stof_kernels.benchmarking.runner import run_job
from stof_kernels.figures import style
from stof_kernels.fusion import motivation
from stof_kernels.fusion.plan import OVERHEADS
from stof_kernels.integrations import models as real_models
from stof_kernels.integrations import variants

TIMING = {"min_samples": 2, "max_samples": 3, "budget_s": 0.01, "warmup": 1}
SETTINGS = {
    "mask": "bigbird",
    "models": ["bert_base", "t5"],
    "model_size": "tiny",
    "sizes": [{"batch": 2, "seq_len": [96, 130]}],
    "dtype": "float32",
    "seed": 3,
    "tuning_s": 0,
    "timing": TIMING,
}
ONE = SETTINGS | {"models": ["bert_base"], "sizes": [{"batch": 2, "seq_len": [130]}]}
PAIRS = {
    "operators": ["bias_layernorm", "gemm_gemm"],
    "sizes": [{"batch": 1, "seq_len": [8], "hidden": [16]}],
    "dtype": "float32",
    "seed": 3,
    "search_s": 1,
    "candidates": 2,
    "timing": TIMING,
}


@pytest.fixture
def job(tmp_path):
    """Run a job in a temporary folder; returns its rows and its provenance."""

    def run(method: str, settings=ONE, experiment: str = "end_to_end", shared: str = ""):
        folder = tmp_path / experiment
        files = [folder / f"{method}.{kind}" for kind in ("csv", "provenance.json", "jsonl")]
        other = tmp_path / shared / f"{method}.csv" if shared else None
        run_job("cpu", experiment, method, settings, *files, "cpu", shared=other)
        return read_rows(files[0]), json.loads(files[1].read_text())

    return run


@pytest.fixture
def fake(monkeypatch):
    """Register a way to run whole models for one test: ``fake(prepare)`` returns its id."""
    registry.discover()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    def register(prepare, experiments=("end_to_end", "ablation", "tuning_cost")) -> str:
        models.model_method("fake", label="Fake", experiments=experiments)(prepare)
        return "fake"

    return register


# ---- what there is ---------------------------------------------------------------------------------------------------


def test_names_are_the_same_in_every_layer():
    assert models.MODELS == tuple(real_models.MODELS) == tuple(style.MODELS)
    assert pairs.OPERATORS == motivation.OPERATORS == tuple(style.OPERATORS)
    assert tuple(model_registry.OVERHEADS) == OVERHEADS
    assert {spec.id for spec in registry.all_methods("pair")} == set(motivation.METHODS)
    whole = {experiment.id for experiment in experiments.EXPERIMENTS.values() if experiment.kind == models.KIND}
    assert whole == set(METRICS)
    for experiment in whole:
        assert experiments.get(experiment).metric in METRICS[experiment]


def test_labels_and_ranks_are_those_of_attention():
    registry.discover()
    shared = [spec for spec in registry.all_methods("model") if registry.find(spec.id)]
    assert {"stof", "torch_native", "mcfuser", "bolt"} <= {spec.id for spec in shared}
    for spec in shared:
        assert (spec.label, spec.rank) == (registry.get(spec.id).label, registry.get(spec.id).rank)
    labels = [style.look(spec.id).label for spec in registry.all_methods("model")]
    assert labels == [spec.label for spec in registry.all_methods("model")]


def test_a_new_file_is_a_new_way_to_run_models(tmp_path, monkeypatch):
    (tmp_path / "abacus.py").write_text(
        "from stof_kernels.baselines.models import model_method, run_variant\n\n\n"
        "@model_method('abacus', label='Abacus', experiments=('end_to_end',), rank=25)\n"
        "def abacus(subject):\n"
        "    return run_variant(subject, 'torch_native')\n"
    )
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    try:
        ids = [spec.id for spec in registry.methods_for("end_to_end")]
        depends = registry.get("abacus", "model").depends
        alone = {spec.id for spec in registry.methods_for("mha")}
    finally:
        sys.modules.pop("stof_kernels.baselines.models.abacus", None)
    assert ids.index("torch_compile") < ids.index("abacus") < ids.index("sdpa")
    assert depends[0] == "baselines/models/abacus.py"
    assert "abacus" not in alone


def test_a_label_that_contradicts_or_is_missing_is_one_line():
    with pytest.raises(ValueError, match="'sdpa': label 'S D P A', allowed: 'SDPA', as for attention"):
        models.model_method("sdpa", label="S D P A", experiments=())
    with pytest.raises(ValueError, match="'nobody': no label, allowed: one"):
        models.model_method("nobody", experiments=())


def test_cells_keep_a_model_together():
    keys = [key for key, _ in model_problems(SETTINGS, "cpu")]
    assert keys == ["bert_base:2x96", "bert_base:2x130", "t5:2x96", "t5:2x130"]
    problem = dict(model_problems(SETTINGS, "cpu"))["t5:2x130"]
    assert problem.columns()["heads"] == 2
    assert problem.columns()["mask_params"] == "w=11;g=11;block=64;fill=0.1;seed=0"
    image = ModelProblem("vit", 1, 128, "bigbird", "float32", "cpu")
    assert (image.columns()["seq_len"], image.columns()["kv_len"]) == (128, 122)
    assert [key for key, _ in pair_problems(PAIRS, "cpu")] == ["bias_layernorm:1x8x16", "gemm_gemm:1x8x16"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("models", ["bert"], "models: 'bert' is unknown, allowed: bert_base, bert_large, gpt2, llama, t5, vit"),
        ("models", [], r"models is \[\], allowed: a list of bert_base"),
        ("mask", "bigbrid", "mask: 'bigbrid' is unknown, allowed: "),
        ("model_size", "huge", "model_size: 'huge' is unknown, allowed: paper, tiny"),
        ("dtype", "int8", "dtype: 'int8' is unknown, allowed: float32"),
        ("sizes", [], "sizes is"),
    ],
)
def test_settings_that_cannot_be_read_are_one_line(key, value, said):
    with pytest.raises(ProblemError, match=f"^{said}"):
        model_problems(SETTINGS | {key: value}, "cpu")
    with pytest.raises(experiments.SettingsError, match=f"^settings: {said}"):
        experiments.get("end_to_end").cells(SETTINGS | {key: value}, "cpu")


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_a_cell_has_checked_rows_of_every_metric(job):
    rows, provenance = job("sdpa", SETTINGS)
    by_metric = {(row.model, row.seq_len, row.metric): row for row in rows}
    assert len(by_metric) == len(rows)
    for model in ("bert_base", "t5"):
        for length in (96, 130):
            latency, rate = (by_metric[model, length, metric] for metric in ("latency", "throughput"))
            assert (latency.status, latency.exact, latency.mask, latency.batch) == ("ok", True, "bigbird", 2)
            assert 0 < latency.rel_err < 1e-4
            assert latency.p20 <= latency.median <= latency.p80
            assert rate.median == pytest.approx(1e3 * 2 * length / latency.median, rel=1e-4)
            assert rate.p20 <= rate.median <= rate.p80
            assert by_metric[model, length, "control_time"].median > 0
            assert (model, length, "tuning_time") not in by_metric
    memory = model_memory.peak_mib(lambda: None, "cpu")
    assert memory is None or by_metric["t5", 130, "peak_memory"].median > 50
    assert "wall time from the model on its device" in provenance["protocol"]


def test_tuning_and_its_parts_are_rows_too(job):
    rows, _ = job("stof")
    assert {row.operator for row in rows if row.metric == "overhead_time"} == set(model_registry.OVERHEADS.values())
    (tuning,) = (row for row in rows if row.metric == "tuning_time")
    assert tuning.unit == "s"
    assert 1e3 * tuning.median > sum(row.median for row in rows if row.metric == "overhead_time") > 0


def changed(change):
    def prepare(subject):
        ready = run_variant(subject, "torch_native")
        return replace(ready, run=lambda: change(ready.run()))

    return prepare


def drifting():
    calls = []

    def change(out):
        calls.append(out)
        return out if len(calls) < 3 else out * 1.1

    return change


def out_of_memory(subject):
    return ModelReady(lambda: torch.empty(1 << 60))


def refused(subject):
    raise Unsupported("has no such layer")


@pytest.mark.parametrize(
    ("prepare", "status", "note"),
    [
        (changed(lambda out: out * 1.001), "wrong_result", "relative error above 0.0001"),
        (changed(lambda out: out * torch.nan), "wrong_result", "the output is not finite"),
        (changed(lambda out: out[:, :-1]), "error", "output has shape (2, 129, 128), allowed: (2, 130, 128)"),
        (changed(drifting()), "wrong_result", "the output changed while it was timed"),
        (out_of_memory, "oom", ""),
        (refused, "unsupported", "has no such layer"),
    ],
)
def test_what_fails_is_one_row(job, fake, prepare, status, note):
    (row,), _ = job(fake(prepare))
    assert (row.status, row.metric, row.median) == (status, "latency", None)
    assert note in row.note
    assert 0 < row.kept < 1


def test_another_mask_is_a_wrong_result(job, fake):
    def dense(subject):
        model, given = subject.model(variants.NATIVE), subject.inputs(variants.NATIVE)
        given["stof_mask"] = torch.zeros_like(given["stof_mask"])
        return ModelReady(lambda: model(**given).last_hidden_state)

    (row,), _ = job(fake(dense))
    assert row.status == "wrong_result"
    assert row.rel_err > 1e-3


# ---- the reference ---------------------------------------------------------------------------------------------------


def test_every_stack_gets_the_attention(monkeypatch):
    """Also under versions of transformers that set it at the top only."""
    bench = model_subject.subject(dict(model_problems(SETTINGS, "cpu"))["t5:2x96"])
    top = type(bench.model(variants.NATIVE))
    monkeypatch.setattr(top, "set_attn_implementation", lambda self, name: None)
    for attention in (variants.SDPA, variants.NATIVE):
        stacks = bench.model(attention)
        assert {part.config._attn_implementation for part in stacks.modules() if hasattr(part, "config")} == {attention}


def test_the_reference_widens_the_weights_and_gives_them_back():
    problem = replace(dict(model_problems(ONE, "cpu"))["bert_base:2x130"], dtype="bfloat16")
    bench = model_subject.subject(problem)
    weights = {name: p.data_ptr() for name, p in bench.model(variants.NATIVE).named_parameters()}
    want, eager = bench.reference()
    assert want.dtype == torch.float32
    assert 1e-4 < eager < 0.1
    assert {name: p.data_ptr() for name, p in bench.model(variants.NATIVE).named_parameters()} == weights
    torch.testing.assert_close(want, variants.reference(problem.case), rtol=1e-4, atol=1e-4)
    assert model_subject.tolerance(problem, 0.04) == pytest.approx(1.25 * 0.04)
    assert model_subject.tolerance(problem, 0.001) == model_subject.FLOOR[torch.bfloat16]


def test_sizes_of_a_model_share_its_weights():
    problems = dict(model_problems(SETTINGS, "cpu"))
    first, second = (model_subject.subject(problems[f"bert_base:2x{n}"]).model(variants.NATIVE) for n in (96, 130))
    assert first is second
    assert model_subject.subject(problems["t5:2x96"]).model(variants.NATIVE) is not first


# ---- runs that are shared --------------------------------------------------------------------------------------------


def test_experiments_take_rows_of_one_run(job):
    first, origin = job("stof")
    for experiment in ("ablation", "overhead", "tuning_cost"):
        rows, provenance = job("stof", SETTINGS | {"models": ["bert_base"]}, experiment, shared="end_to_end")
        assert provenance["shared"] == {
            "experiment": "end_to_end",
            "run_id": origin["run_id"],
            "cells": ["bert_base:2x130"],
        }
        assert {row.experiment for row in rows} == {experiment}
        assert {row.metric for row in rows} <= set(METRICS[experiment])
        of_run = [row for row in rows if row.seq_len == 130]
        wanted = [row for row in first if row.metric in METRICS[experiment]]
        assert [replace(row, experiment="end_to_end") for row in of_run] == wanted
        assert [row for row in rows if row.seq_len == 96]  # was not in that run: measured here


def test_a_run_that_is_wholly_shared_needs_no_device(job, monkeypatch):
    _, origin = job("torch_native")
    monkeypatch.setattr(runner, "_require_device", None)
    monkeypatch.setattr(runner.environment, "machine", None)
    rows, provenance = job("torch_native", experiment="ablation", shared="end_to_end")
    assert {row.experiment for row in rows} == {"ablation"}
    for name in ("machine", "gpu_name", "versions", "build", "code"):
        assert provenance[name] == origin[name]


def test_a_run_that_failed_is_shared_as_such(job, fake):
    id = fake(refused)
    job(id)
    (row,), _ = job(id, experiment="tuning_cost", shared="end_to_end")
    assert (row.status, row.metric, row.unit, row.note) == ("unsupported", "tuning_time", "s", "has no such layer")


def test_controls_are_compared_within_a_model(tmp_path):
    def table(method, times):
        shared = {
            "experiment": "end_to_end",
            "gpu": "cpu",
            "method": method,
            "mask": "bigbird",
            "batch": 1,
            "seq_len": 64,
        }
        rows = [Measurement(**shared, model=m, metric="control_time", median=t) for m, t in times.items()]
        write_rows(tmp_path / f"{method}.csv", rows)
        return tmp_path / f"{method}.csv"

    first, second = table("sdpa", {"bert_base": 10.0, "bert_large": 30.0}), table("stof", {"bert_large": 31.0})
    assert busy_cells([first, second]) == []
    (found,) = busy_cells([first, table("stof", {"bert_large": 60.0})])
    assert found == "end_to_end bert_large:1x64: the control took 2.0x longer beside stof than beside sdpa"


# ---- caches and memory -----------------------------------------------------------------------------------------------


def test_compile_caches_are_empty_and_gone_afterwards(tmp_path, monkeypatch):
    before = str(tmp_path / "before")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
    with model_caches.empty_caches():
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert list(folder.iterdir()) == []
        assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(folder)
        (folder / "compiled").write_text("x")
    assert not folder.exists()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == before


def test_peak_memory_sees_what_is_gone_afterwards():
    def run():
        return float(torch.ones(64 << 20).sum())  # 256 MiB

    quiet = model_memory.peak_mib(lambda: None, "cpu")
    if quiet is None:
        pytest.skip("this machine does not tell peak memory")
    assert 250 < model_memory.peak_mib(run, "cpu") - quiet < 400


def test_memory_goes_back_without_what_cublas_keeps(monkeypatch):
    """Its workspace can lie in a block of an earlier cell, so it goes before the blocks do."""
    done = []
    for owner, name in ((torch._C, "_cuda_clearCublasWorkspaces"), (torch.cuda, "empty_cache")):
        monkeypatch.setattr(owner, name, lambda name=name: done.append(name), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    model_memory.give_back("cuda")
    assert done == ["_cuda_clearCublasWorkspaces", "empty_cache"]
    model_memory.give_back("cpu")
    assert len(done) == 2


def test_nothing_of_the_reference_is_left_when_a_method_prepares(monkeypatch):
    order = []
    compute = model_subject.BenchSubject._reference
    monkeypatch.setattr(
        model_subject.BenchSubject, "_reference", lambda self: order.append("computed") or compute(self)
    )
    monkeypatch.setattr(model_subject, "give_back", lambda device: order.append(device))
    model_subject.subject(dict(model_problems(ONE, "cpu"))["bert_base:2x130"]).reference()
    assert order == ["computed", "cpu"]


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_are_checked_and_timed(job):
    rows, _ = job("detached", PAIRS, "motivation")
    times = {row.operator: row for row in rows if row.metric == "device_time"}
    for operator in PAIRS["operators"]:
        row = times[operator]
        assert (row.status, row.batch, row.seq_len, row.hidden) == ("ok", 1, 8, 16)
        assert 0 < row.rel_err < 1e-4 or row.rel_err == 0
        assert row.note == "eager then eager"
    (alone,) = (row for row in job("tuned_individually", PAIRS, "motivation")[0] if row.operator == "gemm_gemm")
    assert alone.status == "unsupported"
    assert alone.note


def test_a_wrong_pair_is_not_timed(job, monkeypatch):
    measure = motivation.measure

    def wrong(*arguments, **options):
        found = measure(*arguments, **options)
        run = found["detached"].run
        return found | {"detached": replace(found["detached"], run=lambda: [2 * run()[0]])}

    monkeypatch.setattr(motivation, "measure", wrong)
    rows, _ = job("detached", PAIRS, "motivation")
    assert {(row.status, row.median) for row in rows} == {("wrong_result", None)}
