"""Measuring jobs of whole models and pairs on a GPU, in two layers: every way to run them gives checked rows."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from stof_kernels.benchmarking.measurement import read_rows
from stof_kernels.benchmarking.runner import run_job

pytestmark = pytest.mark.gpu
TIMING = {"min_samples": 2, "max_samples": 5, "budget_s": 0.02, "warmup": 2}
MODEL = {
    "mask": "bigbird",
    "models": ["bert_base"],
    "model_size": "tiny",
    "sizes": [{"batch": 2, "seq_len": [130]}],
    "dtype": "float16",
    "seed": 3,
    "tuning_s": 4,
    "timing": TIMING,
}
PAIR = {
    "operators": ["gemm_layernorm"],
    "sizes": [{"batch": 1, "seq_len": [128], "hidden": [256]}],
    "dtype": "float16",
    "seed": 3,
    "search_s": 5,
    "candidates": 4,
    "timing": TIMING,
}
CAPTURED = ("torch_native", "sdpa", "torch_compile", "stof_mha_only")
REPLAYING = ("stof", "stof_fusion_only", "torch_compile_reduce_overhead", "flex_attention")


def job(tmp_path, experiment, method, settings):
    files = [tmp_path / f"{method}.{kind}" for kind in ("csv", "provenance.json", "jsonl")]
    run_job("h200", experiment, method, settings, *files, "cuda")
    return read_rows(files[0]), json.loads(files[1].read_text())


@pytest.mark.parametrize("method", [*CAPTURED, *REPLAYING])
def test_a_model_is_checked_timed_and_weighed(tmp_path, method):
    experiment = "ablation" if method in ("stof_mha_only", "stof_fusion_only") else "end_to_end"
    rows, provenance = job(tmp_path, experiment, method, MODEL)
    by_metric = {row.metric: row for row in rows}
    latency = by_metric["latency"]
    assert latency.status == "ok", latency.note
    assert 0 < latency.rel_err < 2e-2
    assert by_metric["peak_memory"].median > 1
    assert by_metric["host_time"].median > 0
    assert provenance["machine"]["device"] == "cuda"
    if method in CAPTURED:
        assert latency.note == ""  # captured into the timer's graph
    elif not latency.note.startswith("the model as it is"):
        assert latency.note.startswith("replays its own CUDA graph")


@pytest.mark.parametrize("method", ["detached", "fused", "tuned_individually", "tuned_after_fusion"])
def test_a_pair_is_checked_and_timed(tmp_path, method):
    rows, _ = job(tmp_path, "motivation", method, PAIR)
    time = next(row for row in rows if row.metric == "device_time")
    assert time.status == "ok" or method == "tuned_individually", time.note
    assert time.status != "ok" or 0 < time.rel_err < 5e-3
