"""Small jobs of the attention experiments on a GPU: every form in which a method takes a mask gives a checked time."""

from __future__ import annotations

import pytest

from stof_kernels.benchmarking.experiments import EXPERIMENTS
from stof_kernels.benchmarking.measurement import Measurement, read_rows
from stof_kernels.benchmarking.runner import run_job

pytestmark = pytest.mark.gpu

BLOCKS = {"family": "head_blocks", "fill": 0.3}
LONG = [{"family": "sliding_window", "w": 40}, "document", {"family": "document", "causal": True}, BLOCKS]
MASKS = {
    "mha_long": LONG,
    "scaling": [{"family": "bigbird", "w": 0, "g": 0, "fill": 0.2}],
    "dynamic_mask": [BLOCKS],
    "mask_build": ["longformer", BLOCKS],
}
METHODS = ("stof", "sdpa", "sdpa_efficient", "sdpa_cudnn", "fa2", "fa4", "flex_attention", "flex_flash")
OPTIONAL = ("fa4", "flex_flash")


@pytest.fixture
def job(tmp_path):
    """Run a job on the GPU; returns its rows."""

    def run(experiment: str, method: str, **changes) -> list[Measurement]:
        settings = {
            "masks": MASKS[experiment],
            "sizes": [{"batch": 1, "heads": 4, "kv_heads": 2, "seq_len": [512]}, {"batch": 2, "seq_len": [384]}],
            "heads": 4,
            "head_dim": 64,
            "dtype": "float16",
            "seed": 0,
            "timing": {"min_samples": 2, "max_samples": 5, "budget_s": 0.02, "warmup": 1},
        }
        files = (tmp_path / name for name in ("rows.csv", "rows.json", "rows.jsonl"))
        run_job("here", experiment, method, settings | changes, *files, "cuda")
        return read_rows(tmp_path / "rows.csv")

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("experiment", ["mha_long", "scaling", "dynamic_mask"])
def test_every_form_runs_and_is_right(job, experiment: str, method: str) -> None:
    if method not in EXPERIMENTS[experiment].methods:
        pytest.skip("not in this experiment")
    rows = job(experiment, method)
    bad = [(r.mask, r.operator, r.status, r.note) for r in rows if r.status not in ("ok", "unsupported")]
    assert not bad
    if method not in OPTIONAL:  # whose packages may be missing, and which know few masks
        assert {row.status for row in rows} == {"ok"}
    times = [row for row in rows if row.metric == "device_time" and row.status == "ok"]
    assert all("no CUDA graph" not in row.note for row in times)
    if method == "stof":
        assert all(row.exact for row in times)


def test_packed_documents_are_native_and_exact(job) -> None:
    rows = [row for row in job("mha_long", "fa2") if row.metric == "device_time" and row.mask == "document"]
    assert len(rows) == 4
    assert {(row.exact, row.note.partition(",")[0]) for row in rows} == {(True, "native varlen")}


def test_what_changes_at_every_call_replays_in_a_graph(job) -> None:
    for method in ("stof", "flex_attention"):
        whole = [
            r for r in job("dynamic_mask", method) if r.operator == "build_and_attention" and r.metric == "device_time"
        ]
        assert [(row.status, row.note) for row in whole] == [("ok", "")] * 2


def test_long_masks_of_flex_are_built_without_the_square(job, monkeypatch: pytest.MonkeyPatch) -> None:
    from stof_kernels.benchmarking import attention_forms

    monkeypatch.setattr(attention_forms, "_EAGER_BLOCK_MASK", 0)
    rows = job("scaling", "flex_attention", masks=[{"family": "sliding_window", "w": 40}])
    assert {(r.status, r.note) for r in rows if r.metric == "device_time"} == {("ok", "compiled create_block_mask")}


@pytest.mark.parametrize("method", ["stof", "sdpa", "flex_attention"])
def test_builds_have_time_and_memory(job, method: str) -> None:
    rows = job("mask_build", method)
    assert {row.status for row in rows} == {"ok"}
    assert {"mask_build_time", "peak_memory"} <= {row.metric for row in rows}
    if method == "stof":
        on_device = {row.operator for row in rows if row.metric == "device_time" and not row.note}
        assert on_device == {"from_dense_fixed", "update"}
