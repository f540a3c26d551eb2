"""The public operator against its float64 specification on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stof_kernels as stof
from stof_kernels.ops import reference

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def make(shape, dtype, seed, layout=0):
    """Unit-normal tensor of a shape (B, H, L, D) in one of several memory layouts."""
    generator = torch.Generator().manual_seed(seed)
    b, h, n, d = shape
    if layout == 1:  # (B, L, H, D) memory, as models make it
        return torch.randn(b, n, h, d, generator=generator).to(dtype).transpose(1, 2)
    if layout == 2:  # last stride is not 1
        return torch.randn(b, h, d, n, generator=generator).to(dtype).transpose(2, 3)
    if layout == 3:  # a slice that starts in the middle of wider rows
        return torch.randn(b, h, n, d + 3, generator=generator).to(dtype)[..., 2 : d + 2]
    return torch.randn(shape, generator=generator).to(dtype)


@st.composite
def problems(draw):
    heads_kv, groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    return {
        "batch": draw(st.integers(1, 2)),
        "heads": heads_kv * groups,
        "kv_heads": heads_kv,
        "q_len": draw(st.integers(0, 90)),
        "kv_len": draw(st.integers(0, 150)),
        "dim": 8 * draw(st.integers(1, 32)) if draw(st.booleans()) else draw(st.sampled_from([32, 64, 128])),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "keep": draw(st.sampled_from([0.0, 0.03, 0.5, 1.0])),
        "mask_batch": draw(st.booleans()),
        "mask_heads": draw(st.booleans()),
        "grain": draw(st.sampled_from([1, 16, 40])),
        "bias": draw(st.sampled_from(["none", "full", "head", "row", "float32", "-inf"])),
        "scale": draw(st.sampled_from([None, 0.3, 1.0])),
        "layout": draw(st.integers(0, 3)),
        "seed": draw(st.integers(0, 2**31)),
    }


def bias_of(p):
    shape = {"head": (p["heads"], 1, p["kv_len"]), "row": (1, p["q_len"], 1)}.get(
        p["bias"], (p["batch"], p["heads"], p["q_len"], p["kv_len"])
    )
    if p["bias"] == "none":
        return None
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(p["seed"] + 9))
    if p["bias"] == "-inf":
        bias = bias.masked_fill(bias > 0.5, -torch.inf)
    return bias if p["bias"] == "float32" else bias.to(p["dtype"])


def keep_of(p):
    g = p["grain"]
    rows, cols = -(-p["q_len"] // g), -(-p["kv_len"] // g)
    planes = (p["batch"] if p["mask_batch"] else 1, p["heads"] if p["mask_heads"] else 1)
    coarse = torch.rand(*planes, rows, cols, generator=torch.Generator().manual_seed(p["seed"] + 5)) < p["keep"]
    return coarse.repeat_interleave(g, 2).repeat_interleave(g, 3)[:, :, : p["q_len"], : p["kv_len"]]


@settings(max_examples=250, deadline=None)
@given(problems())
def test_any_problem_equals_the_reference(p):
    q = make((p["batch"], p["heads"], p["q_len"], p["dim"]), p["dtype"], p["seed"], p["layout"])
    k = make((p["batch"], p["kv_heads"], p["kv_len"], p["dim"]), p["dtype"], p["seed"] + 1, p["layout"])
    v = make((p["batch"], p["kv_heads"], p["kv_len"], p["dim"]), p["dtype"], p["seed"] + 2, (p["layout"] + 1) % 4)
    keep, bias = keep_of(p), bias_of(p)
    out, lse = stof.sparse_attention(q, k, v, stof.SparseMask.from_dense(keep), bias, p["scale"], return_lse=True)
    want, want_lse = reference.attention(q, k, v, keep, bias, p["scale"])
    assert out.dtype == p["dtype"]
    assert lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double(), want, rtol=0, atol=TOLERANCE[p["dtype"]])
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("family", stof.masks.FAMILIES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_mask_family(family, dtype):
    q, k, v = (make((2, 4, 200, 64), dtype, s) for s in range(3))
    mask = stof.SparseMask.from_pattern(stof.masks.get(family, 200), 200, 200)
    want, _ = reference.attention(q, k, v, mask.to_dense())
    torch.testing.assert_close(stof.sparse_attention(q, k, v, mask).double(), want, rtol=0, atol=TOLERANCE[dtype])


def test_bool_tensor_is_a_mask_and_agrees_with_sdpa():
    q, k, v = (make((2, 3, 50, 32), torch.float32, s) for s in range(3))
    keep = torch.rand(2, 1, 50, 50) < 0.5
    keep[..., 0] = True
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    torch.testing.assert_close(stof.sparse_attention(q, k, v, keep), want, rtol=1e-5, atol=1e-5)
    padding = keep[:, :, :1]
    torch.testing.assert_close(
        stof.sparse_attention(q, k, v, padding),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=padding),
        rtol=1e-5,
        atol=1e-5,
    )


def test_rows_without_keys_are_zero_and_never_nan():
    q, k, v = (make((1, 2, 70, 64), torch.float32, s) for s in range(3))
    keep = torch.rand(70, 70) < 0.2
    keep[10:30] = False
    bias = torch.zeros(70, 70)
    bias[40] = -torch.inf
    out, lse = stof.sparse_attention(q, k, v, keep, bias, return_lse=True)
    for rows in (slice(10, 30), slice(40, 41)):
        assert (out[:, :, rows] == 0).all()
        assert (lse[:, :, rows] == -torch.inf).all()
    assert not out.isnan().any()


def test_bias_is_read_only_where_the_mask_keeps():
    q, k, v = (make((1, 2, 40, 32), torch.float32, s) for s in range(3))
    keep = torch.rand(40, 40) < 0.5
    bias = torch.randn(40, 40)
    clean = stof.sparse_attention(q, k, v, keep, bias)
    poisoned = stof.sparse_attention(q, k, v, keep, bias.masked_fill(~keep, torch.nan))
    assert torch.equal(clean, poisoned)


def test_large_scores_do_not_overflow():
    q, k, v = (make((1, 1, 64, 64), torch.float32, s) for s in range(3))
    out, lse = stof.sparse_attention(q * 30, k * 30, v, torch.ones(64, 64).bool(), return_lse=True)
    want, want_lse = reference.attention(q * 30, k * 30, v, torch.ones(64, 64).bool())
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-3)


def test_same_bits_for_any_thread_count():
    q, k, v = (make((1, 4, 333, 64), torch.float32, s) for s in range(3))
    mask = stof.SparseMask.from_pattern(stof.masks.get("bigbird", 333), 333, 333)
    plan = stof.plan(q, k, mask).config.words
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, before):
            torch.set_num_threads(threads)
            assert stof.plan(q, k, mask).config.words == plan
            outs.append(stof.sparse_attention(q, k, v, mask))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_overflowed_mask_poisons_the_output():
    q, k, v = (make((1, 2, 160, 32), torch.float32, s) for s in range(3))
    mask = stof.SparseMask.from_dense(torch.eye(160).bool(), capacity=20)
    assert not stof.sparse_attention(q, k, v, mask).isnan().any()
    mask.update_(torch.ones(160, 160).bool())
    out, lse = stof.sparse_attention(q, k, v, mask, return_lse=True)
    assert out.isnan().all()
    assert lse.isnan().all()
    with pytest.raises(ValueError, match="do not fit the fixed capacity of 20 cells"):
        mask.check()


def test_explain_shows_kernel_and_copies():
    q, k, _ = (make((1, 2, 64, 32), torch.float32, s) for s in range(3))
    mask = stof.SparseMask.from_pattern(stof.masks.causal(), 64, 64)
    assert "copy" not in stof.plan(q, k, mask).explain()
    strided = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert "q has strides" in stof.plan(strided, k, mask).explain()
    assert "Equation 1" in stof.plan(q, k, mask, policy="paper").explain()


def test_backward_is_one_clear_line():
    q, k, v = (make((1, 1, 20, 32), torch.float32, s).requires_grad_() for s in range(3))
    out = stof.sparse_attention(q, k, v, torch.ones(20, 20).bool())
    with pytest.raises(NotImplementedError, match="forward only"):
        out.sum().backward()


Q = torch.randn(2, 4, 16, 32)
FULL = torch.ones(16, 16).bool()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1], Q, Q, FULL), TypeError, "q is list, allowed: a tensor"),
        (lambda f: f(Q[0], Q, Q, FULL), ValueError, "q has shape (4, 16, 32), allowed: 4 dimensions"),
        (lambda f: f(Q.half(), Q.half(), Q.half(), FULL), TypeError, "q has dtype torch.float16 on cpu, allowed"),
        (lambda f: f(Q, Q.double(), Q, FULL), TypeError, "k has dtype torch.float64, allowed: q's dtype torch.float32"),
        (lambda f: f(Q, Q.to("meta"), Q, FULL), ValueError, "k is on meta, allowed: q's device cpu"),
        (lambda f: f(Q[..., :12], Q[..., :12], Q[..., :12], FULL), ValueError, "head dim of q is 12, allowed: 8 to 256"),
        (lambda f: f(Q, Q[:1], Q[:1], FULL), ValueError, "k has shape (1, 4, 16, 32), allowed: (2, Hkv, Lk, 32)"),
        (lambda f: f(Q, Q, Q[:, :, :8], FULL), ValueError, "v has shape (2, 4, 8, 32), allowed: that of k"),
        (lambda f: f(Q, Q[:, :3], Q[:, :3], FULL), ValueError, "k has 3 heads, allowed: a divisor of q's 4 heads"),
        (lambda f: f(Q, Q, Q, FULL.float()), TypeError, "dtype torch.float32, allowed: torch.bool"),
        (lambda f: f(Q, Q, Q, FULL[:8]), ValueError, "mask has shape (8, 16), allowed: broadcastable to (2, 4, 16, 16)"),
        (lambda f: f(Q, Q, Q, None), TypeError, "mask is NoneType, allowed: a SparseMask or a bool tensor"),
        (lambda f: f(Q, Q, Q, stof.SparseMask.from_dense(FULL[:8])), ValueError, "mask is for 8 x 16 positions"),
        (lambda f: f(Q, Q, Q, stof.SparseMask.from_dense(FULL.repeat(3, 1, 1, 1))), ValueError, "(batch, heads) (3, 1)"),
        (lambda f: f(Q, Q, Q, FULL, bias=torch.ones(16, 15)), ValueError, "bias has shape (16, 15), allowed: broadcastable"),
        (lambda f: f(Q, Q, Q, FULL, bias=torch.ones(16, 16).long()), TypeError, "bias has dtype torch.int64, allowed"),
        (lambda f: f(Q, Q, Q, FULL, bias=3.0), TypeError, "bias is float, allowed: a tensor or None"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error) as caught:
        call(stof.sparse_attention)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
