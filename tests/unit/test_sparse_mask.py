"""The format: any mask goes in and comes out unchanged, by every constructor."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stof_kernels import SparseMask, masks
from stof_kernels.formats import cells

sizes = st.integers(0, 70)


@st.composite
def dense_masks(draw) -> torch.Tensor:
    """Bool (Bm, Hm, Lq, Lk) mixing empty, full and ragged regions at every scale."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), sizes, sizes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grain = draw(st.sampled_from([1, 7, 16, 32]))
    coarse = (*shape[:2], -(-shape[2] // grain), -(-shape[3] // grain))
    keep = torch.rand(coarse, generator=generator) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    keep = keep.repeat_interleave(grain, 2).repeat_interleave(grain, 3)[:, :, : shape[2], : shape[3]]
    if draw(st.booleans()):
        keep = keep ^ (torch.rand(shape, generator=generator) < 0.01)
    return keep


def assert_same_lists(mask: SparseMask, other: SparseMask) -> None:
    n, n_bits = other.counts[:2].tolist()
    assert torch.equal(mask.counts, other.counts)
    assert torch.equal(mask.strip_ptr, other.strip_ptr)
    assert torch.equal(mask.cell_col[:n], other.cell_col[:n])
    assert torch.equal(mask.cell_slot[:n], other.cell_slot[:n])
    assert torch.equal(mask.cell_bits[:n_bits], other.cell_bits[:n_bits])


@settings(max_examples=150, deadline=None)
@given(dense_masks())
def test_dense_goes_in_and_comes_out(keep):
    mask = SparseMask.from_dense(keep).check()
    assert torch.equal(mask.to_dense(), keep)
    assert mask.kept == pytest.approx(keep.float().mean().item() if keep.numel() else 0.0, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(dense_masks())
def test_compiled_builder_equals_its_specification(keep):
    built = SparseMask.from_dense(keep)
    want = cells.lists_from_dense(keep)
    n, n_bits = want.cell_col.numel(), want.cell_bits.shape[0]
    assert torch.equal(built.strip_ptr, want.strip_ptr)
    assert torch.equal(built.cell_col[:n], want.cell_col)
    assert torch.equal(built.cell_slot[:n], want.cell_slot)
    assert torch.equal(built.cell_bits[:n_bits], want.cell_bits)
    assert torch.equal(built.counts, want.counts)


@pytest.mark.parametrize("family", masks.FAMILIES)
@pytest.mark.parametrize("seq_len", [1, 15, 16, 100, 257])
def test_pattern_equals_its_dense_form(family, seq_len):
    pattern = masks.get(family, seq_len)
    i, zero = torch.arange(seq_len), torch.tensor(0)
    keep = pattern.bind(seq_len, seq_len)(zero, zero, i[:, None], i[None]).expand(seq_len, seq_len)
    mask = SparseMask.from_pattern(pattern, seq_len, seq_len).check()
    assert torch.equal(mask.to_dense()[0, 0], keep)
    same = SparseMask.from_dense(keep)
    assert torch.equal(mask.strip_ptr, same.strip_ptr)
    assert torch.equal(mask.counts, same.counts)
    assert mask.name == str(pattern)


@pytest.mark.parametrize(("q_len", "kv_len"), [(40, 100), (100, 40), (0, 5), (5, 0), (0, 0), (33, 16)])
def test_pattern_with_unequal_or_no_lengths(q_len, kv_len):
    mask = SparseMask.from_pattern(masks.causal(offset=3), q_len, kv_len, batch=2, heads=3).check()
    keep = torch.ones(q_len, kv_len, dtype=torch.bool).tril(3)
    assert torch.equal(mask.to_dense(), keep.expand(2, 3, -1, -1))


@pytest.mark.parametrize("family", [f for f in masks.FAMILIES if "document" not in f])
def test_rectangles_of_every_size_are_sorted_right(family):
    # 1100 keys are 69 cells: whole and cut rectangles of 16, 4 and 1 cells, most of them settled unseen.
    pattern, zero = masks.get(family, 1100), torch.tensor(0)
    mask = SparseMask.from_pattern(pattern, 700, 1100).check()
    keep = pattern.bind(700, 1100)(zero, zero, torch.arange(700)[:, None], torch.arange(1100))
    assert_same_lists(mask, SparseMask.from_dense(keep.expand(700, 1100)))


def test_what_the_rectangle_test_settles_is_never_looked_into(monkeypatch):
    looked = []
    look = cells._look_into
    monkeypatch.setattr(cells, "_look_into", lambda *a: looked.append(a[3].numel()) or look(*a))
    SparseMask.from_pattern(masks.causal(), 4096, 4096)
    assert sum(looked) == 256  # the diagonal


def test_a_compiled_rule_gives_the_same_mask(monkeypatch):
    monkeypatch.setattr(
        cells, "_inspect_compiled", lambda: torch.compile(cells._inspect, dynamic=True, backend="aot_eager")
    )
    table = torch.rand(3, 90) < 0.4

    def rule(b, h, q, kv):
        return table[h, kv] | (q - kv == 7 * b)

    torch._dynamo.reset()
    for size in ((70, 90), (33, 64)):
        eager, compiled = (
            SparseMask.from_pattern(rule, *size, batch=2, heads=3, compiled=flag).check() for flag in (False, True)
        )
        assert_same_lists(compiled, eager)


def test_chunks_of_strips_and_of_cells_join_seamlessly(monkeypatch):
    whole = SparseMask.from_pattern(masks.get("bigbird", 300), 300, 300)
    dense = whole.to_dense()
    monkeypatch.setattr(cells, "_CHUNK_CELLS", 40)
    monkeypatch.setattr(cells, "_CHUNK_POSITIONS", 1024)
    monkeypatch.setattr(cells, "_CHUNK_STATES", 64)
    for lists in (
        cells.lists_from_pattern(masks.get("bigbird", 300), 300, 300, 1, 1, "cpu"),
        cells.lists_from_dense(dense),
    ):
        n = lists.cell_col.numel()
        assert torch.equal(lists.strip_ptr, whole.strip_ptr)
        assert torch.equal(lists.cell_slot, whole.cell_slot[:n])
        assert torch.equal(lists.cell_bits, whole.cell_bits[: lists.cell_bits.shape[0]])


def test_predicate_may_look_at_batch_and_head():
    def rule(b, h, q, kv):
        return (kv + h <= q + b) & (kv != 2)

    mask = SparseMask.from_pattern(rule, 20, 30, batch=2, heads=3).check()
    b, h, q, kv = torch.meshgrid(*(torch.arange(n) for n in (2, 3, 20, 30)), indexing="ij")
    assert torch.equal(mask.to_dense(), rule(b, h, q, kv))
    assert mask.name == "predicate(rule)"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), sizes, sizes, st.integers(1, 2), st.integers(1, 3), st.integers(0, 2**31))
def test_blocks_equal_their_dense_form(block, q_len, kv_len, batch, heads, seed):
    block = block if seed % 2 else 16 * (1 + block % 4)
    rows, cols = -(-q_len // block), -(-kv_len // block)
    table = torch.rand(batch, heads, rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.4
    dense = table.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :q_len, :kv_len]
    mask = SparseMask.from_blocks(table, block, q_len, kv_len).check()
    assert torch.equal(mask.to_dense(), dense)
    assert mask.counts[2] == dense.sum()


def test_shared_dimensions_cost_nothing():
    keep = torch.rand(37, 53) < 0.3
    one = SparseMask.from_dense(keep)
    assert SparseMask.from_dense(keep.expand(4, 8, 37, 53)).shape == one.shape == (1, 1, 37, 53)
    padding = torch.rand(3, 1, 1, 53) < 0.5
    mask = SparseMask.from_dense(padding, q_len=37)
    assert mask.shape == (3, 1, 37, 53)
    assert torch.equal(mask.to_dense(), padding.expand(-1, -1, 37, -1))


def test_update_reuses_the_buffers():
    mask = SparseMask.from_dense(torch.rand(64, 64) < 0.5)
    buffers = [t.data_ptr() for t in (mask.strip_ptr, mask.cell_col, mask.cell_bits)]
    other = torch.rand(64, 64) < 0.1
    assert torch.equal(mask.update_(other).check().to_dense()[0, 0], other)
    assert buffers == [t.data_ptr() for t in (mask.strip_ptr, mask.cell_col, mask.cell_bits)]


def test_update_that_does_not_fit_a_compact_mask_raises_and_changes_nothing():
    eye = torch.eye(512, dtype=torch.bool)
    mask = SparseMask.from_dense(eye)
    with pytest.raises(ValueError, match=r"update_: the mask needs 1024 cells .* hold 64 .*build with capacity="):
        mask.update_(torch.rand(512, 512) < 0.5)
    assert torch.equal(mask.check().to_dense()[0, 0], eye)


def test_fixed_capacity_overflows_loudly_and_recovers():
    eye, full = torch.eye(160, dtype=torch.bool), torch.ones(160, 160, dtype=torch.bool)
    mask = SparseMask.from_dense(eye, capacity=40)
    assert mask.capacity == 40
    assert "fixed" in repr(mask)
    mask.update_(full)
    with pytest.raises(ValueError, match=r"100 non-empty cells \(0 partial\) do not fit the fixed capacity of 40"):
        mask.check()
    assert torch.equal(mask.update_(eye).check().to_dense()[0, 0], eye)
    roomy = SparseMask.from_dense(eye, capacity="max")
    assert roomy.capacity == 100
    dense = torch.rand(160, 160) < 0.5
    assert torch.equal(roomy.update_(dense).check().to_dense()[0, 0], dense)


def test_masks_of_one_class_have_the_same_shapes():
    a, b = (SparseMask.from_pattern(masks.sliding_window(w), 512, 512) for w in (20, 24))
    assert int(a.counts[0]) != int(b.counts[0]) or int(a.counts[2]) != int(b.counts[2])
    leaves_a, spec_a = torch.utils._pytree.tree_flatten(a)
    leaves_b, spec_b = torch.utils._pytree.tree_flatten(b)
    assert [t.shape for t in leaves_a] == [t.shape for t in leaves_b]
    assert a.name != b.name
    assert spec_a == spec_b
    back = torch.utils._pytree.tree_unflatten(leaves_a, spec_a)
    assert torch.equal(back.to_dense(), a.to_dense())


def test_leaves_have_names_and_the_tree_survives_json():
    mask = SparseMask.from_pattern(masks.get("bigbird", 200), 200, 200)
    mask.prepare(torch.randn(1, 2, 200, 32), torch.randn(1, 2, 200, 32))
    leaves, spec = torch.utils._pytree.tree_flatten_with_path(mask)
    names = [torch.utils._pytree.keystr(path) for path, _ in leaves]
    assert names[:5] == [".strip_ptr", ".cell_col", ".cell_slot", ".cell_bits", ".counts"]
    assert len(set(names)) == len(names) == 10
    again = torch.utils._pytree.treespec_loads(torch.utils._pytree.treespec_dumps(spec))
    back = torch.utils._pytree.tree_unflatten([leaf for _, leaf in leaves], again)
    assert torch.equal(back.check().to_dense(), mask.to_dense())
    assert torch.equal(back.layout.plan, mask.layout.plan)


def test_saved_masks_are_loaded(tmp_path):
    mask = SparseMask.from_pattern(masks.get("bigbird", 200), 200, 200)
    torch.save(mask, tmp_path / "mask.pt")
    back = torch.load(tmp_path / "mask.pt", weights_only=True).check()
    assert torch.equal(back.to_dense(), mask.to_dense())
    assert back.name == mask.name


def test_damaged_lists_are_found():
    def damaged(name, index, value):
        mask = SparseMask.from_pattern(masks.causal(), 64, 64)
        getattr(mask, name)[index] = value
        return mask

    for mask, message in [
        (damaged("strip_ptr", -1, 3), "strip_ptr does not rise"),
        (damaged("cell_col", 1, 9), "cell_col leaves 0..3"),
        (damaged("cell_col", 2, 0), "cell_col does not ascend"),
        (damaged("cell_slot", 0, 99), "cell_slot leaves -1.."),
    ]:
        with pytest.raises(ValueError, match=message):
            mask.check()


def test_long_rules_never_materialise_the_matrix():
    # 49152**2 bools would be 2.4 GB; the window's lists are a few MB. A process of its own gives a clean peak.
    code = (
        "import resource, stof_kernels as s\n"
        "s.SparseMask.from_pattern(s.masks.sliding_window(64), 64, 64)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "m = s.SparseMask.from_pattern(s.masks.sliding_window(64), 49152, 49152)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, int(m.counts[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown_kib, kept = map(int, done.stdout.split())
    assert kept == 49152 * 129 - 64 * 65
    assert grown_kib < 400 * 1024


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SparseMask.from_dense(torch.ones(3, 3)), TypeError, "keep: dtype torch.float32, allowed: torch.bool"),
        (lambda: SparseMask.from_dense([[True]]), TypeError, "keep: got list, allowed: a bool tensor"),
        (
            lambda: SparseMask.from_dense(torch.ones(1, 1, 1, 3, 3).bool()),
            ValueError,
            "keep: 5 dimensions, allowed: 1 to 4",
        ),
        (
            lambda: SparseMask.from_dense(torch.ones(3, 3).bool(), q_len=4),
            ValueError,
            "shape (3, 3), allowed: the last two",
        ),
        (lambda: SparseMask.from_dense(torch.ones(0, 1, 3, 3).bool()), ValueError, "has no planes"),
        (
            lambda: SparseMask.from_dense(torch.ones(3, 3).bool(), capacity=0),
            ValueError,
            "capacity is 0, allowed: None",
        ),
        (lambda: SparseMask.from_pattern(masks.causal(), -1, 3), ValueError, "from_pattern: q_len is -1"),
        (lambda: SparseMask.from_pattern(masks.causal(), 3.0, 3), TypeError, "from_pattern: q_len is 3.0"),
        (
            lambda: SparseMask.from_pattern(masks.causal(), 3, 3, heads=0),
            ValueError,
            "heads is 0, allowed: an integer >= 1",
        ),
        (lambda: SparseMask.from_pattern("causal", 3, 3), TypeError, "predicate: got str"),
        (
            lambda: SparseMask.from_pattern(lambda b, h, q, kv: q - kv, 3, 3),
            TypeError,
            "returned torch.int64, allowed: a bool",
        ),
        (lambda: SparseMask.from_blocks(torch.ones(2, 2).bool(), 0, 9, 9), ValueError, "block is 0, allowed"),
        (
            lambda: SparseMask.from_blocks(torch.ones(2, 3).bool(), 64, 128, 128),
            ValueError,
            "keep_blocks: shape (2, 3)",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
