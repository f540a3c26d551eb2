"""The operator under torch.compile, fake tensors and opcheck."""

from __future__ import annotations

import pytest
import torch

import stof_kernels as stof
from stof_kernels.kernels import raw

PLAN = torch.full((4,), -1)


def inputs(seed=0, heads=2, kv_heads=2, n=48, dim=32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, n, dim, generator=g)
    k, v = (torch.randn(1, kv_heads, n, dim, generator=g) for _ in range(2))
    return q, k, v


def attend(q, k, v, mask):
    return stof.sparse_attention(q * 1.0, k, v, mask) + 1.0


def test_fullgraph_compiles_and_agrees():
    q, k, v = inputs()
    mask = stof.SparseMask.from_pattern(stof.masks.causal(), 48, 48).prepare(q, k)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, mask), attend(q, k, v, mask), rtol=0, atol=0)


@pytest.mark.slow
def test_inductor_compiles_and_agrees():
    q, k, v = inputs()
    mask = stof.SparseMask.from_pattern(stof.masks.causal(), 48, 48)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, mask), attend(q, k, v, mask), rtol=1e-6, atol=1e-6)


def test_a_new_mask_of_the_same_class_does_not_recompile():
    q, k, v = inputs(n=200)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for width in (20, 21, 25, 30):
        mask = stof.SparseMask.from_pattern(stof.masks.sliding_window(width), 200, 200)
        torch.testing.assert_close(compiled(q, k, v, mask), attend(q, k, v, mask), rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck_passes(return_lse, with_bias):
    q, k, v = inputs(heads=4, kv_heads=2)
    mask = stof.SparseMask.from_pattern(stof.masks.sliding_window(5), 48, 48)
    bias = torch.randn(1, 4, 48, 48) if with_bias else None
    args = (q, k, v, bias, mask.strip_ptr, mask.cell_col, mask.cell_slot, mask.cell_bits, mask.counts, PLAN)
    args = (*args, 48, 48, 1, 1, 0.2, return_lse)
    raw.sparse_attention(*args)  # loads the library
    torch.library.opcheck(torch.ops.stof.sparse_attention.default, args)


def test_fake_kernel_has_the_real_shapes_and_strides():
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = inputs(heads=4, kv_heads=2)
    mask = stof.SparseMask.from_pattern(stof.masks.causal(), 48, 48)
    real = stof.sparse_attention(q, k, v, mask, return_lse=True)
    args = [q, k, v, None, mask.strip_ptr, mask.cell_col, mask.cell_slot, mask.cell_bits, mask.counts, PLAN]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) if t is not None else None for t in args]
        fake = torch.ops.stof.sparse_attention.default(*fakes, 48, 48, 1, 1, 0.2, True)
    for f, r in zip(fake, real, strict=True):
        assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


class Attention(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return attend(q, k, v, mask)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_takes_masks(strict):
    q, k, v = inputs(n=200)
    first, second = (stof.SparseMask.from_pattern(stof.masks.sliding_window(w), 200, 200) for w in (20, 24))
    exported = torch.export.export(Attention(), (q, k, v, first), strict=strict)
    for mask in (first, second):
        torch.testing.assert_close(exported.module()(q, k, v, mask), attend(q, k, v, mask), rtol=1e-6, atol=1e-6)


def test_an_exported_model_is_saved_with_its_mask(tmp_path):
    q, k, v = inputs(n=200)
    mask = stof.SparseMask.from_pattern(stof.masks.get("bigbird", 200), 200, 200)
    torch.export.save(torch.export.export(Attention(), (q, k, v, mask)), tmp_path / "attention.pt2")
    back = torch.export.load(tmp_path / "attention.pt2").module()
    torch.testing.assert_close(back(q, k, v, mask), attend(q, k, v, mask), rtol=1e-6, atol=1e-6)
