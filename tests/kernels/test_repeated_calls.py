"""A call like an earlier one takes a short way: it must give the same results, and notice everything that changed."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import stof_kernels as stof
from stof_kernels.ops import reference, sparse_attention

N = 48


def inputs(seed=0, batch=1, heads=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, N, 32, generator=g).to(dtype) for _ in range(3)]


def window(width=5):
    return stof.SparseMask.from_pattern(stof.masks.sliding_window(width), N, N)


def assert_right(out, q, k, v, mask, bias=None, scale=None):
    want, _ = reference.attention(q, k, v, mask.to_dense(), bias, scale)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-2 if q.dtype == torch.bfloat16 else 2e-5)


@pytest.fixture
def only_short(monkeypatch):
    """From its call on, the long way is closed."""
    module = __import__("sys").modules[sparse_attention.__module__]

    def close():
        monkeypatch.setattr(module, "_first_attention", lambda *a: pytest.fail("a repeated call took the long way"))

    return close


def test_a_repeated_call_is_short_and_the_same(only_short):
    (q, k, v), mask = inputs(), window()
    first, first_lse = sparse_attention(q, k, v, mask, return_lse=True)
    only_short()
    out, lse = sparse_attention(q, k, v, mask, return_lse=True)
    assert torch.equal(out, first)
    assert torch.equal(lse, first_lse)
    assert (out.stride(), lse.stride()) == (first.stride(), first_lse.stride())
    assert torch.equal(sparse_attention(q, k, v, mask), first)
    others = inputs(7)
    assert_right(sparse_attention(*others, mask, scale=2), *others, mask, scale=2)


@pytest.mark.parametrize("shape", [(N, N), (2, 1, N), (1, N), (1, 2, 1, N), ()])
def test_a_repeated_call_takes_a_bias(shape, only_short):
    (q, k, v), mask = inputs(), window()
    sparse_attention(q, k, v, mask)
    only_short()
    bias = torch.randn(shape)
    assert_right(sparse_attention(q, k, v, mask, bias), q, k, v, mask, bias)
    if shape == (N, N):
        assert_right(sparse_attention(q, k, v, mask, bias.mT), q, k, v, mask, bias.mT)


def test_changed_strides_dtypes_shapes_and_threads_are_noticed():
    (q, k, v), mask = inputs(), window()
    sparse_attention(q, k, v, mask)
    strided = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert_right(sparse_attention(*strided, mask), q, k, v, mask)
    halves = [t.bfloat16() for t in (q, k, v)]
    assert_right(sparse_attention(*halves, mask), *halves, mask)
    assert_right(sparse_attention(q, k, v, mask), q, k, v, mask)
    bigger = inputs(3, batch=2, heads=4)
    assert_right(sparse_attention(*bigger, mask), *bigger, mask)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert_right(sparse_attention(q, k, v, mask), q, k, v, mask)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q, k, v[:, :, :8]), ValueError, "v has shape (1, 2, 8, 32), allowed: that of k"),
        (lambda q, k, v: (q, k.double(), v), TypeError, "k has dtype torch.float64, allowed: q's dtype"),
        (lambda q, k, v: (q, k, v.to("meta")), ValueError, "v is on meta, allowed: q's device cpu"),
        (lambda q, k, v: (q.numpy(), k, v), TypeError, "q is ndarray, allowed: a tensor"),
        (lambda q, k, v: (q, k, None), TypeError, "v is NoneType, allowed: a tensor"),
        (lambda q, k, v: (q[:, :, :9], k, v), ValueError, "mask is for 48 x 48 positions, allowed: 9 x 48"),
    ],
)
def test_bad_input_after_a_good_call_gets_the_same_line(change, error, message):
    (q, k, v), mask = inputs(), window()
    sparse_attention(q, k, v, mask)
    with pytest.raises(error) as caught:
        sparse_attention(*change(q, k, v), mask)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bias", [torch.ones(N, 9), torch.ones(N, N).long(), 3.0])
def test_a_bad_bias_after_a_good_call(bias):
    (q, k, v), mask = inputs(), window()
    sparse_attention(q, k, v, mask)
    with pytest.raises((TypeError, ValueError), match="sparse_attention: bias"):
        sparse_attention(q, k, v, mask, bias)


@pytest.mark.parametrize("capacity", [None, "max"])
def test_updates_reach_repeated_calls(capacity):
    q, k, v = inputs()
    mask = stof.SparseMask.from_dense(torch.rand(N, N) < 0.2, capacity=capacity)
    for seed in range(3):
        sparse_attention(q, k, v, mask)
        mask.update_(torch.rand(N, N, generator=torch.Generator().manual_seed(seed)) < 0.5)
        assert_right(sparse_attention(q, k, v, mask), q, k, v, mask)


def test_gradients_are_still_refused():
    (q, k, v), mask = inputs(), window()
    sparse_attention(q, k, v, mask)
    q.requires_grad_()
    with pytest.raises(NotImplementedError, match="forward only"):
        sparse_attention(q, k, v, mask).sum().backward()
    with torch.no_grad():
        assert not sparse_attention(q, k, v, mask).requires_grad


def test_copies_of_a_mask_do_not_point_into_it():
    (q, k, v), mask = inputs(), window()
    want = sparse_attention(q, k, v, mask)
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert not other.calls
        assert other.name == mask.name
        assert torch.equal(sparse_attention(q, k, v, other), want)


def test_a_packed_call_keeps_its_lists():
    (q, k, v), mask = inputs(), window()
    want = sparse_attention(q, k, v, mask)
    packed, attend, _ = next(iter(mask.calls.values()))
    del mask
    gc.collect()
    _ = [torch.full((64,), 77, dtype=torch.int32) for _ in range(64)]  # what was freed would be overwritten
    assert torch.equal(attend(q, k, v, packed), want)


def test_recorded_graphs_hold_tensors_and_no_packed_call():
    (q, k, v), mask = inputs(), window()
    sparse_attention(q, k, v, mask)
    graph = make_fx(lambda q, k, v: sparse_attention(q, k, v, mask))(q, k, v)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert "stof.sparse_attention.default" in called
    assert not any("attend" in name for name in called)


def test_packed_must_be_what_pack_call_returned():
    (q, k, v), mask = inputs(), window()
    sparse_attention(q, k, v, mask)
    packed, attend, _ = next(iter(mask.calls.values()))
    for wrong in (torch.zeros(3, dtype=torch.int64), torch.zeros_like(packed), packed.float()):
        with pytest.raises(RuntimeError, match="attend: packed"):
            attend(q, k, v, wrong)
    with pytest.raises(RuntimeError, match="not the call that was packed"):
        attend(q[:, :1], k, v, packed)


def test_the_schema_holds():
    (q, k, v), mask = inputs(), window()
    sparse_attention(q, k, v, mask)
    packed = next(iter(mask.calls.values()))[0]
    for op in (torch.ops.stof.attend.default, torch.ops.stof.attend_lse.default):
        torch.library.opcheck(op, (q, k, v, packed, torch.randn(N, N), 0.2), test_utils="test_schema")


def test_fake_tensors_go_the_long_way():
    (q, k, v), mask = inputs(), window()
    want = sparse_attention(q, k, v, mask)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = sparse_attention(*(mode.from_tensor(t) for t in (q, k, v)), mask)
    assert (fake.shape, fake.stride(), fake.dtype) == (want.shape, want.stride(), want.dtype)
