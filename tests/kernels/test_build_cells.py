from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_lists import lists_of

from stof_kernels.kernels import raw


def assert_same_lists(keep: torch.Tensor) -> None:
    want = lists_of(keep.numpy())
    got = raw.build_cells(keep)
    for tensor, expected in zip(got, (want.ptr, want.col, want.slot, want.bits, want.counts), strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 70), st.integers(0, 70)),
    share=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    seed=st.integers(0, 2**31),
)
def test_lists_equal_the_definition(shape, share, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    b, h, q, k = shape
    keep = torch.rand(shape, generator=generator) < share
    if layout == "transposed":
        keep = (torch.rand((b, h, k, q), generator=generator) < share).mT
    elif layout == "sliced":
        keep = (torch.rand((b, h, q, 2 * k + 1), generator=generator) < share)[..., 1::2]
    elif layout == "expanded":
        keep = (torch.rand((1, 1, q, 1), generator=generator) < share).expand(shape)
    assert_same_lists(keep)


def test_full_cells_touch_neither_edge():
    # 40 x 40: the last strip has 8 queries and may be full; the last key cell has 8 keys and may not.
    ptr, col, slot, bits, counts = raw.build_cells(torch.ones(1, 1, 40, 40, dtype=torch.bool))
    assert ptr.tolist() == [0, 3, 6, 9]
    assert col.tolist() == [0, 1, 2] * 3
    assert slot.tolist() == [-1, -1, 0, -1, -1, 1, -1, -1, 2]
    assert bits[0].tolist() == [255] * 16
    assert bits[2].tolist() == [255] * 8 + [0] * 8
    assert counts.tolist() == [9, 3, 1600, 0]


def test_the_top_bit_is_the_sign():
    keep = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    keep[..., 3, 15] = True
    assert raw.build_cells(keep)[3][0, 3].item() == -(2**15)


def test_lists_do_not_depend_on_threads():
    keep = torch.from_numpy(np.random.default_rng(5).random((2, 2, 333, 500)) < 0.02)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            results.append(raw.build_cells(keep))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.ones(1, 1, 4, 4), "keep has dtype Float, it must be Bool"),
        (torch.ones(4, 4, dtype=torch.bool), r"keep has shape \(4, 4\)"),
    ],
)
def test_bad_masks_get_one_line(keep, message):
    with pytest.raises(RuntimeError, match=message) as error:
        raw.build_cells(keep)
    assert "\n" not in str(error.value)


def test_opcheck():
    raw.load()
    keep = torch.from_numpy(np.random.default_rng(6).random((1, 2, 40, 50)) < 0.3)
    torch.library.opcheck(torch.ops.stof.build_cells.default, (keep,))
