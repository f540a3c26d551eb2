"""The attention experiments beside mha: the forms methods take masks in, builds, and masks that change at every call."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from stof_kernels import SparseMask, baselines, masks
from stof_kernels.baselines import Prepared, Problem, registry
from stof_kernels.baselines.inputs import dense_keep, make_tensors
from stof_kernels.baselines.torch_native import unfused_attention
from stof_kernels.benchmarking import attention_build, attention_dynamic, attention_forms
from stof_kernels.benchmarking.attention_masks import HeadBlocks
from stof_kernels.benchmarking.cell import Measured
from stof_kernels.benchmarking.check import relative_error
from stof_kernels.benchmarking.control import dense_control
from stof_kernels.benchmarking.measurement import read_rows
from stof_kernels.benchmarking.runner import run_job

SETTINGS = {
    "masks": [{"family": "head_blocks", "block": 16, "fill": 0.3}],
    "sizes": [{"batch": 2, "seq_len": [80]}],
    "heads": 4,
    "head_dim": 16,
    "dtype": "float32",
    "seed": 3,
    "timing": {"min_samples": 2, "max_samples": 4, "budget_s": 0.01, "warmup": 1},
}


def problem(pattern: masks.Pattern, batch: int = 2, heads: int = 4, kv_heads: int = 2, length: int = 96) -> Problem:
    return Problem(pattern, batch, length, length, heads, kv_heads, 16, "float32", "cpu", seed=1)


@pytest.fixture
def job(tmp_path):
    """Run a job in a temporary folder; returns its rows and its provenance."""

    def run(experiment: str, method: str, **changes):
        files = {kind: tmp_path / f"{method}.{kind}" for kind in ("csv", "provenance.json", "jsonl")}
        run_job("cpu", experiment, method, SETTINGS | changes, *files.values(), "cpu")
        return read_rows(files["csv"]), json.loads(files["provenance.json"].read_text())

    return run


def test_our_form_of_a_mask_per_head_is_right_where_one_plane_is_not() -> None:
    found = problem(HeadBlocks(4, 16, 0.3))
    tensors = make_tensors(found)
    ours = baselines.get("stof")
    prepared = attention_forms.prepare(ours, found, tensors)
    assert relative_error(found, tensors, found.pattern, prepared.run()) < 1e-5
    assert prepared.mask_build().heads == 4
    single = replace(found, pattern=masks.causal())
    assert attention_forms.prepare(ours, single, tensors).applied == masks.causal()


@pytest.mark.parametrize("method", ["sdpa", "torch_native"])
def test_dense_methods_take_a_mask_per_head_as_it_is(method: str) -> None:
    found = problem(HeadBlocks(4, 16, 0.3))
    tensors = make_tensors(found)
    prepared = attention_forms.prepare(baselines.get(method), found, tensors)
    assert relative_error(found, tensors, found.pattern, prepared.run()) < 1e-5


@pytest.mark.parametrize("length", [512, 448])
@pytest.mark.parametrize("tile", [64, 128])
def test_flex_block_masks_list_the_blocks_of_every_head(tile: int, length: int) -> None:
    found = problem(HeadBlocks(3, 64, 0.3), heads=3, kv_heads=3, length=length)
    table = found.pattern.table(length, length)
    built = attention_forms.flex_block_mask(found, table, found.pattern.bind(length, length), tile)
    assert tuple(built.BLOCK_SIZE) == (tile, tile)
    kept = dense_keep(found).float()
    some = F.max_pool2d(kept, tile, ceil_mode=True) > 0
    every = -F.max_pool2d(-F.pad(kept, (0, -length % tile, 0, -length % tile), value=1.0), tile) > 0
    assert torch.equal(built.to_dense().bool(), some)
    listed = torch.zeros_like(some)
    for h in range(3):
        for row, n in enumerate(built.full_kv_num_blocks[0, h].tolist()):
            listed[0, h, row, built.full_kv_indices[0, h, row, :n].long()] = True
    assert torch.equal(listed, every)


def test_flex_falls_back_on_the_tiles_that_compile(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    found = problem(HeadBlocks(4, 64, 0.3), length=256)
    tensors, table = make_tensors(found), found.pattern.table(256, 256)
    rule = found.pattern.bind(256, 256)

    def picky(spec, problem, tensors, options=None):
        def call(block_mask):
            if block_mask.BLOCK_SIZE[0] == 64:
                raise ValueError("Q and KV block size must be divisible by BLOCK_M and BLOCK_N")
            return block_mask

        return call

    monkeypatch.setattr(attention_forms, "flex_call", picky)
    call, tile = attention_forms.flex_blocks_call(baselines.get("flex_attention"), found, tensors, table, rule)
    assert tile == 128
    assert call(attention_forms.flex_block_mask(found, table, rule, tile)).BLOCK_SIZE == (128, 128)
    assert "no block mask of 64 x 64 tiles here: ValueError: Q and KV block size" in capsys.readouterr().err


def documents_one_by_one(q, k, v, ends, longest, causal, scale):
    """A varlen kernel in plain torch: (tokens, heads, head_dim), documents between ``ends``."""
    bounds = ends.tolist()
    assert longest == max(b - a for a, b in pairwise(bounds))
    parts = []
    for a, b in pairwise(bounds):
        own = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(*own, is_causal=causal, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_documents_are_the_masked_batch(batch: int, causal: bool) -> None:
    pattern = masks.document((30, 50, 16), causal)
    found = problem(pattern, batch=batch)
    tensors = make_tensors(found)
    assert attention_forms.packed_ends(pattern, 2) == [0, 30, 80, 96, 126, 176, 192]
    prepared = attention_forms._packed(found, tensors, pattern, documents_one_by_one)
    assert prepared.exact
    assert relative_error(found, tensors, pattern, prepared.run()) < 1e-5


def test_a_kernel_without_shared_heads_gets_repeated_ones() -> None:
    found = problem(masks.causal())
    tensors = make_tensors(found)
    seen = []

    def own(problem, tensors):
        seen.append((problem.kv_heads, tensors.k.shape[1]))
        keep = dense_keep(problem)
        return Prepared(
            lambda: unfused_attention(tensors.q, tensors.k, tensors.v, keep, problem.scale), problem.pattern, note="own"
        )

    spec = replace(baselines.get("sdpa_efficient"), prepare=own)
    prepared = attention_forms.prepare(spec, found, tensors)
    assert seen == [(4, 4)]
    assert prepared.note == "own; key heads repeated beforehand"
    assert relative_error(found, tensors, found.pattern, prepared.run()) < 1e-5


def test_the_control_of_a_long_cell_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    from stof_kernels.benchmarking import control

    found = problem(masks.causal())
    tensors = make_tensors(found)
    call, name = dense_control(found, tensors)
    assert (call().shape[2], name) == (96, "dense SDPA")
    monkeypatch.setattr(control, "_LONGEST", 32)
    call, name = dense_control(found, tensors)
    assert (call().shape[2], name) == (32, "dense SDPA, first 32 positions")


@pytest.mark.parametrize("method", ["stof", "sdpa"])
@pytest.mark.parametrize("experiment", ["mha_long", "scaling", "mha_bf16"])
def test_jobs_of_long_cells(job, experiment: str, method: str) -> None:
    changes = {"masks": ["bigbird", {"family": "sliding_window", "w": 5}, "document"]}
    changes["sizes"] = [{"batch": 1, "heads": 4, "kv_heads": 2, "seq_len": [80]}]
    if experiment == "mha_bf16":
        changes["dtype"] = "bfloat16"
    rows, provenance = job(experiment, method, **changes)
    times = [row for row in rows if row.metric == "device_time"]
    assert [row.mask for row in times] == ["bigbird", "sliding_window", "document"]
    assert {(row.status, row.exact, row.heads, row.kv_heads) for row in times} == {("ok", True, 4, 2)}
    assert times[1].mask_params == "w=5;causal=false"
    added = {name for name in provenance["code"]["parts"] if "attention_" in name and name.startswith("benchmarking")}
    assert bool(added) == (experiment != "mha_bf16")


def test_a_method_without_room_for_the_mask_is_a_row(job, monkeypatch: pytest.MonkeyPatch) -> None:
    from stof_kernels.baselines import inputs, sdpa

    def too_large(problem):
        return torch.empty(1 << 60)

    monkeypatch.setattr(inputs, "dense_keep", too_large)
    monkeypatch.setattr(sdpa, "dense_keep", too_large)
    rows, _ = job("mha_long", "sdpa")
    assert [(row.status, row.median) for row in rows] == [("oom", None)]
    assert rows[0].kept == pytest.approx(2 / 5)  # round(0.3 x 5) blocks of 5


def test_builds_are_timed_form_by_form(job) -> None:
    rows, _ = job("mask_build", "stof", masks=["bigbird", *SETTINGS["masks"]])
    built = [(row.mask, row.operator) for row in rows if row.metric == "mask_build_time" and row.status == "ok"]
    forms = ["from_dense", "from_dense_prepared", "from_dense_fixed", "update"]
    assert built == [("bigbird", name) for name in ("from_pattern", *forms)] + [
        ("head_blocks", name) for name in ("from_blocks", *forms)
    ]
    assert all(row.median > 0 and row.exact for row in rows)
    rows, _ = job("mask_build", "sdpa", masks=["causal"])
    assert [row.operator for row in rows] == ["dense_bool", "dense_additive"]


def test_flex_builds_are_checked(job) -> None:
    rows, _ = job("mask_build", "flex_attention", masks=["longformer", *SETTINGS["masks"]])
    assert [(row.operator, row.status) for row in rows] == [("create_block_mask", "ok")] * 2


def test_a_form_that_builds_another_mask_or_fails_does_not_spoil_the_rest(job, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SparseMask.from_dense

    def other(keep, *args, **options):
        if options.get("capacity"):
            raise RuntimeError("CUDA out of memory. Tried to allocate 7 GiB")
        return real(~keep)

    monkeypatch.setattr(SparseMask, "from_dense", other)
    rows, _ = job("mask_build", "stof", masks=["causal"])
    assert [(row.operator, row.status) for row in rows] == [
        ("from_pattern", "ok"),
        ("from_dense", "wrong_result"),
        ("from_dense_prepared", "wrong_result"),
        ("from_dense_fixed", "oom"),
        ("update", "oom"),
    ]


def test_large_masks_are_compared_by_their_number_of_kept_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_build, "_LOOKED_AT", 0)
    found = problem(masks.causal())
    same = partial(attention_build._same_positions, found, dense=lambda: 1 / 0)
    assert same(SparseMask.from_pattern(masks.causal(), 96, 96))
    assert not same(SparseMask.from_pattern(masks.causal(1), 96, 96))


def test_a_mask_that_changes_at_every_call_is_built_in_the_call(job) -> None:
    rows, provenance = job("dynamic_mask", "stof")
    found = {(row.operator, row.metric): row for row in rows}
    assert set(found) == {
        ("attention", "device_time"),
        ("attention", "mask_build_time"),
        ("attention", "control_time"),
        ("build_and_attention", "device_time"),
        ("build_and_attention", "control_time"),
    }
    whole = found["build_and_attention", "device_time"]
    assert (whole.status, whole.exact) == ("ok", True)
    assert whole.rel_err < 1e-5
    assert "benchmarking/attention_dynamic.py" in provenance["code"]["parts"]
    rows, _ = job("dynamic_mask", "sdpa")
    assert {row.operator for row in rows} == {"attention"}


def test_every_table_is_checked(job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that keeps the first table is right once and wrong for the others."""

    def stuck(spec, problem, tensors, table):
        right = attention_dynamic._stof(spec, problem, tensors, table)
        return lambda other: right(table)

    monkeypatch.setitem(attention_dynamic._WHOLE, "stof", stuck)
    rows, _ = job("dynamic_mask", "stof")
    assert {(row.operator, row.status) for row in rows if row.metric == "device_time"} == {
        ("attention", "ok"),
        ("build_and_attention", "wrong_result"),
    }


def test_tables_come_in_turn() -> None:
    seen = []
    run = attention_dynamic._in_turn(seen.append, [torch.tensor(i) for i in range(3)])
    for _ in range(7):
        run()
    assert [int(t) for t in seen] == [1, 2, 0, 1, 2, 0, 1]


def test_flex_takes_a_new_table_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule follows the table although it is one function for all of them; FlexAttention itself is left out here."""
    found = problem(HeadBlocks(4, 64, 0.3), length=256)
    tensors = make_tensors(found)
    asked = []
    monkeypatch.setattr(attention_dynamic, "flex_blocks_call", lambda *which: (asked.append, 64))
    tables = [replace(found.pattern, seed=s).table(256, 256) for s in (0, 5)]
    call = attention_dynamic._flex(baselines.get("flex_attention"), found, tensors, tables[0])
    for table in tables:
        call(table)
        block_mask = asked[-1]
        assert torch.equal(block_mask.to_dense()[0].bool(), table)
        h, q, kv = torch.arange(4).view(-1, 1, 1), torch.arange(256).view(1, -1, 1), torch.arange(256).view(1, 1, -1)
        dense = table.repeat_interleave(64, 1).repeat_interleave(64, 2)
        assert torch.equal(block_mask.mask_mod(0, h, q, kv), dense)


def test_only_methods_with_a_build_of_their_own_have_a_whole_call() -> None:
    assert set(attention_dynamic._WHOLE) <= {spec.id for spec in registry.all_methods()}


def test_measured_rows_of_a_part_carry_its_name() -> None:
    job = Measured("cpu", "dynamic_mask", baselines.get("stof"), None)  # type: ignore[arg-type]
    row = job.missing(problem(HeadBlocks(4, 16, 0.3)), "oom", "no room")[0]
    assert attention_dynamic._named(row, "attention").operator == "attention"
    assert attention_dynamic._named(replace(row, operator="x"), "attention").operator == "x"
