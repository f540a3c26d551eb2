from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_lists import BLOCK_WISE, DEFAULT, ROW_WISE, attend, lists_of, reference

from stof_kernels.kernels import loader, raw

PLANS = {"default": DEFAULT, "row_wise": ROW_WISE, "block_wise": BLOCK_WISE, "short_steps": (1, 16, 16, 0)}
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
SINGLE = 2e-5  # worst absolute error in float32, of out and of lse


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def use_instruction_set():
    library = ctypes.CDLL(str(loader.load()))
    library.stof_cpu_instruction_set.restype = ctypes.c_char_p
    library.stof_cpu_use_instruction_set.restype = ctypes.c_bool
    before = library.stof_cpu_instruction_set()

    def use(name: str) -> None:
        if not library.stof_cpu_use_instruction_set(name.encode()):
            pytest.skip(f"this machine has no {name}")

    yield use
    library.stof_cpu_use_instruction_set(before)


def strided(shape: tuple[int, ...], layout: str, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal values of this shape, in memory laid out as ``layout`` says; memory around them is NaN."""
    b, h, n, d = shape
    values = torch.randn(shape, generator=generator).to(dtype)
    if layout == "contiguous":
        return values
    if layout == "expanded":
        return values[:1, :1].expand(shape) if b and h else values
    if layout == "tokens_first":  # (B, L, H, D) memory, as projections give it
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "dim_first":  # the last stride is not 1
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    odd = torch.full((b, h, n + 2, d + 3), torch.nan, dtype=dtype)
    inside = odd[:, :, 1 : n + 1, 1 : d + 1]
    inside.copy_(values)
    return inside


LAYOUTS = ("contiguous", "tokens_first", "dim_first", "odd", "expanded")


@st.composite
def problems(draw):
    """A random call: every size residue, layout, bias and mask kind has its turn."""
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * groups
    q_len, kv_len = draw(st.integers(0, 70)), draw(st.integers(0, 150))
    dim = 8 * draw(st.integers(1, 32))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    q = strided((batch, heads, q_len, dim), draw(st.sampled_from(LAYOUTS)), dtype, generator)
    k = strided((batch, kv_heads, kv_len, dim), draw(st.sampled_from(LAYOUTS)), dtype, generator)
    v = strided((batch, kv_heads, kv_len, dim), draw(st.sampled_from(LAYOUTS)), dtype, generator)
    planes = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])))
    share = draw(st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]))
    keep = torch.rand((*planes, q_len, kv_len), generator=generator) < share
    if draw(st.booleans()):  # whole cells and empty rows
        keep[..., 16:32] = True
        keep[..., ::7, :] = False
    bias = draw(st.sampled_from([None, "full", "row", "key", "per_head", "scalar"]))
    if bias is not None:
        shape = {
            "full": (batch, heads, q_len, kv_len),
            "row": (1, 1, q_len, 1),
            "key": (batch, 1, 1, kv_len),
            "per_head": (1, heads, q_len, kv_len),
            "scalar": (1, 1, 1, 1),
        }[bias]
        bias = torch.randn(shape, generator=generator).to(draw(st.sampled_from([dtype, torch.float32])))
        bias[torch.rand(shape, generator=generator) < 0.1] = -torch.inf
        if draw(st.booleans()) and keep.shape == bias.shape:
            bias[~keep] = torch.nan  # never read where the mask removes
    scale = draw(st.sampled_from([dim**-0.5, 1.0, -0.25]))
    return q, k, v, keep, bias, scale


def assert_close(out, lse, want, want_lse, dtype):
    assert not out.isnan().any()
    assert not lse.isnan().any()
    empty = want_lse.isneginf()
    torch.testing.assert_close(lse.isneginf(), empty)
    assert (out[empty] == 0).all()
    torch.testing.assert_close(lse[~empty].double(), want_lse[~empty], atol=SINGLE, rtol=0)
    # The result of bfloat16 is rounded once, to 8 bits.
    rounding = 0.0 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(out.double(), want, atol=SINGLE, rtol=rounding)


@settings(max_examples=150, deadline=None)
@given(problem=problems(), plan=st.sampled_from(sorted(PLANS)))
def test_equals_reference(problem, plan):
    q, k, v, keep, bias, scale = problem
    out, lse = attend(q, k, v, lists_of(keep.numpy(), padding=3), bias, scale, PLANS[plan])
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert lse.dtype == torch.float32
    assert lse.shape == q.shape[:3]
    assert out.transpose(1, 2).is_contiguous()
    assert_close(out, lse, *reference(q, k, v, keep, bias, scale), q.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set(use_instruction_set, name, dtype):
    use_instruction_set(name)
    generator = torch.Generator().manual_seed(1)
    for dim in (8, 24, 64, 80, 256):
        q, k, v = (torch.randn(1, 2, n, dim, generator=generator).to(dtype) for n in (45, 77, 77))
        keep = torch.rand(1, 1, 45, 77, generator=generator) < 0.4
        bias = torch.randn(1, 1, 45, 77, generator=generator)
        want = reference(q, k, v, keep, bias, dim**-0.5)
        for plan in (ROW_WISE, BLOCK_WISE):
            assert_close(*attend(q, k, v, lists_of(keep.numpy()), bias, dim**-0.5, plan), *want, dtype)


@pytest.mark.parametrize("plan", [ROW_WISE, BLOCK_WISE])
def test_accurate_with_large_scores(plan):
    # Unit normal inputs without scaling: scores beyond 60, where one float32 has a spacing of 4e-6.
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 2, 256, 256, generator=generator) for _ in range(3))
    keep = torch.ones(1, 1, 256, 256, dtype=torch.bool)
    assert_close(*attend(q, k, v, lists_of(keep.numpy()), None, 1.0, plan), *reference(q, k, v, keep), q.dtype)


@pytest.mark.parametrize("plan", [ROW_WISE, BLOCK_WISE])
def test_extreme_scores_stay_finite(plan):
    q, k = torch.full((1, 1, 20, 64), 1e15), torch.full((1, 1, 40, 64), 1e15)
    k[:, :, ::2] = -1e15
    v = torch.randn(1, 1, 40, 64)
    keep = torch.ones(1, 1, 20, 40, dtype=torch.bool)
    out, lse = attend(q, k, v, lists_of(keep.numpy()), plan=plan)
    torch.testing.assert_close(out, v[:, :, 1::2].mean(2, keepdim=True).expand_as(out))
    assert lse.isfinite().all()


@pytest.mark.parametrize("plan", [ROW_WISE, BLOCK_WISE])
def test_removed_keys_may_hold_nan(plan):
    # Keys that no query of the mask attends, in cells of their own, are never read.
    keep = torch.zeros(1, 1, 32, 64, dtype=torch.bool)
    keep[..., 16:32] = True
    q, k, v = torch.randn(1, 1, 32, 16), torch.randn(1, 1, 64, 16), torch.randn(1, 1, 64, 16)
    want = attend(q, k, v, lists_of(keep.numpy()), plan=plan)
    for t in (k, v):
        t[:, :, :16] = t[:, :, 32:] = torch.nan
    got = attend(q, k, v, lists_of(keep.numpy()), plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("plan", [ROW_WISE, BLOCK_WISE])
def test_bits_do_not_depend_on_threads(plan):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, 300, 40, generator=generator) for _ in range(3))
    keep = torch.rand(2, 1, 300, 300, generator=generator) < 0.2
    keep[:, :, :9] = True  # long strips beside short ones
    lists = lists_of(keep.numpy())
    results = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        results.append(attend(q, k, v, lists, plan=plan))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_without_lse():
    q, k = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 9, 8)
    lists = lists_of(np.ones((1, 1, 5, 9), dtype=bool))
    out, lse = attend(q, k, k, lists, return_lse=False)
    assert lse.shape == (0,)
    assert torch.equal(out, attend(q, k, k, lists)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overflow_poisons_everything(dtype):
    q = torch.randn(2, 2, 20, 8, dtype=dtype)
    lists = lists_of(np.ones((1, 1, 20, 20), dtype=bool))
    lists.counts[3] = 1
    out, lse = attend(q, q, q, lists)
    assert out.isnan().all()
    assert lse.isnan().all()


def good_call():
    q, k, v = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 33, 16), torch.randn(2, 2, 33, 16)
    return {"q": q, "k": k, "v": v, "lists": lists_of(np.ones((1, 1, 20, 33), dtype=bool))}


BAD = {
    "dtype": (lambda c: c.update(q=c["q"].double()), "q has dtype Double.*Float or BFloat16"),
    "mixed": (lambda c: c.update(k=c["k"].bfloat16()), "k has dtype BFloat16.*q's, Float"),
    "dim": (lambda c: c.update(q=c["q"][..., :12], k=c["k"][..., :12], v=c["v"][..., :12]), "head dim is 12"),
    "batch": (lambda c: c.update(k=c["k"][:1]), r"k has shape \(1, 2, 33, 16\)"),
    "value": (lambda c: c.update(v=c["v"][:, :, 1:]), r"v has shape \(2, 2, 32, 16\)"),
    "heads": (lambda c: c.update(q=c["q"][:, :3]), "3 heads.*multiple of the 2 heads"),
    "rank": (lambda c: c.update(q=c["q"][0]), r"q has shape \(4, 20, 16\)"),
    "bias": (lambda c: c.update(bias=torch.randn(2, 4, 20, 32)), r"bias has shape .*broadcastable to \(2, 4, 20, 33\)"),
    "bias_dtype": (lambda c: c.update(bias=torch.randn(2, 4, 20, 33).half()), "bias has dtype Half"),
    "planes": (lambda c: setattr(c["lists"], "heads", 3), "mask_heads is 3.*1 or the heads of q, 4"),
    "ptr": (lambda c: setattr(c["lists"], "ptr", c["lists"].ptr[:-1]), r"ptr has shape \(2\), it must be \(3\)"),
    "bits": (lambda c: setattr(c["lists"], "bits", c["lists"].bits.int()), "bits has dtype Int, it must be Short"),
    "col": (lambda c: c["lists"].col.__setitem__(1, 3), r"corrupt mask: col\[1\] is 3, allowed are 0 to 2"),
    "slot": (lambda c: c["lists"].slot.__setitem__(2, 9), r"corrupt mask: slot\[2\] is 9"),
    "full_tail": (lambda c: c["lists"].slot.__setitem__(2, -1), r"corrupt mask: slot\[2\] is -1, .* past the last"),
    "bits_tail": (lambda c: c["lists"].bits.__setitem__((1, 4), -1), r"corrupt mask: slot\[5\] is 1, .* past the last"),
    "order": (lambda c: c["lists"].ptr.__setitem__(1, 7), "corrupt mask: ptr must not decrease"),
    "listed": (lambda c: c["lists"].ptr.__setitem__(2, 99), "corrupt mask: ptr lists 99 cells"),
    "kernel": (lambda c: c.update(plan=(2, 0, 0, 0)), r"plan\[0\] is 2"),
    "chunk": (lambda c: c.update(plan=(1, 16, 40, 0)), r"plan\[2\] .* is 40"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_arguments_get_one_line(case):
    call = good_call()
    attend(**call)
    spoil, message = BAD[case]
    spoil(call)
    with pytest.raises(RuntimeError, match=message) as error:
        attend(**call)
    assert "\n" not in str(error.value)


def test_opcheck():
    call = good_call()
    lists = call["lists"]
    tensors = (lists.ptr, lists.col, lists.slot, lists.bits, lists.counts, torch.tensor(BLOCK_WISE))
    raw.load()
    for bias, return_lse in ((None, True), (torch.randn(1, 4, 20, 33), False)):
        args = (call["q"], call["k"], call["v"], bias, *tensors, 20, 33, 1, 1, 0.25, return_lse)
        torch.library.opcheck(torch.ops.stof.sparse_attention.default, args)


def test_compiled_graph_equals_eager():
    call = good_call()

    def layer(q, k, v):
        out, lse = attend(q * 2, k, v, call["lists"])
        return out + 1, lse

    inputs = call["q"], call["k"], call["v"]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), layer(*inputs), strict=True):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


def test_backward_raises_one_line():
    call = good_call()
    call["q"].requires_grad_()
    out, _ = attend(**call)
    with pytest.raises(NotImplementedError, match="forward only"):
        out.sum().backward()
    with torch.no_grad():
        assert not attend(**call)[0].requires_grad


def test_default_plan_takes_the_cheaper_kernel():
    q, k, v = (torch.randn(1, 2, 128, 64) for _ in range(3))
    thin, dense = np.eye(128, dtype=bool)[None, None], np.ones((1, 1, 128, 128), dtype=bool)
    thin[..., ::7] = True
    for keep, cheaper, other in ((thin, ROW_WISE, BLOCK_WISE), (dense, BLOCK_WISE, ROW_WISE)):
        out = attend(q, k, v, lists_of(keep))[0]
        assert torch.equal(out, attend(q, k, v, lists_of(keep), plan=cheaper)[0])
        assert not torch.equal(out, attend(q, k, v, lists_of(keep), plan=other)[0])
