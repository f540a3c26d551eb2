"""Bolt's kernels, the very sources, run lane by lane on the CPU by simt/simt.h: indices, barriers, slots, edges, epilogues.

What a GPU adds is speed and the exact rounding of its tensor cores; those are in test_cuda_bolt.py.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
from emulation import SIMT, emulated_library

from stof_kernels.baselines.bolt_compiler import templates
from stof_kernels.provenance import PACKAGE_ROOT

CSRC = PACKAGE_ROOT / "baselines/csrc/bolt"
GUARD = 256  # elements before and behind every output that nothing may touch
LINEAR, BIAS, RELU, GELU = range(4)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return emulated_library(tmp_path_factory.mktemp("simt_bolt"), [SIMT / "bolt.cpp"], [CSRC])


@pytest.fixture(params=["ascending", "descending"])
def emulated(library, request):
    library.set_descending(request.param == "descending")
    return library


def pointer(array):
    assert array.flags["C_CONTIGUOUS"]
    return array.ctypes.data_as(ctypes.c_void_p)


class Guarded:
    """An array of NaN between guards."""

    def __init__(self, *shape):
        count = math.prod(shape)
        self._all = np.full(count + 2 * GUARD, np.nan, np.float16)
        self.array = self._all[GUARD : GUARD + count].reshape(shape)

    def check(self):
        edges = np.concatenate((self._all[:GUARD], self._all[-GUARD:]))
        assert np.isnan(edges).all(), "written outside of the array"
        return self.array


def draw(*shape, seed=0, scale=1.0):
    """Numbers whose neighbours in memory are NaN, so that reading outside shows."""
    count = math.prod(shape)
    padded = np.full(count + 2 * GUARD, np.nan, np.float16)
    values = scale * np.random.default_rng(seed + count).standard_normal(count)
    padded[GUARD : GUARD + count] = values.astype(np.float16)
    return padded[GUARD : GUARD + count].reshape(shape)


def finish(total, bias, epilogue):
    total = total if epilogue == LINEAR else total + bias
    if epilogue == RELU:
        return np.maximum(total, 0)
    if epilogue == GELU:
        return 0.5 * total * (1 + np.vectorize(math.erf)(total / math.sqrt(2)))
    return total


def error(out, want):
    return np.linalg.norm(out.astype(np.float64) - want) / np.linalg.norm(want)


def check_gemm(emulated, candidate, m, n, k, batch=1, epilogue=LINEAR):
    a, b, bias = draw(batch, m, k), draw(batch, n, k, seed=1), draw(n, seed=2)
    out = Guarded(batch, m, n)
    given = bias if epilogue != LINEAR else np.full(n, np.nan, np.float16)
    code = emulated.gemm(*map(pointer, (a, b, given, out.array)), m, n, k, batch, epilogue, candidate)
    assert code == 0
    want = finish(a.astype(np.float64) @ b.astype(np.float64).swapaxes(1, 2), bias.astype(np.float64), epilogue)
    assert error(out.check(), want) < 4e-4


def test_python_and_kernels_have_one_list(library):
    rows = (ctypes.c_int * (9 * 64))()
    count = library.candidates(rows)
    found = [tuple(rows[9 * i : 9 * i + 9]) for i in range(count)]
    assert found == [
        (*t.block, t.stages, *t.warps, t.instruction[2], templates.shared_bytes(t)) for t in templates.TEMPLATES
    ]
    kernels = (ctypes.c_int * (4 * 64))()
    count = library.persistent_kernels(kernels)
    found = [tuple(kernels[4 * i : 4 * i + 4]) for i in range(count)]
    want = [(k.n0, k.n1, int(k.residence == "shared memory"), k.shared_bytes) for k in templates.PERSISTENT]
    assert found == want


@pytest.mark.parametrize("candidate", range(len(templates.TEMPLATES)))
def test_every_template_is_right(library, candidate):
    """Two tiles and an edge along m and n; more tiles along k than there are stages, the last of 8."""
    template = templates.TEMPLATES[candidate]
    library.set_descending(candidate % 2)
    tile_m, tile_n, tile_k = template.block
    check_gemm(library, candidate, tile_m + 5, tile_n // 2 + 8, (template.stages + 1) * tile_k + 8, 1, candidate % 4)


@pytest.mark.parametrize("epilogue", range(4))
@pytest.mark.parametrize("candidate", [5, 6, 16])
def test_epilogues(emulated, candidate, epilogue):
    check_gemm(emulated, candidate, 70, 72, 72, epilogue=epilogue)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 8), (64, 64, 32), (65, 72, 64), (3, 200, 24), (129, 8, 104)])
def test_edges_of_a_batch(emulated, m, n, k):
    for candidate in (5, 16):
        check_gemm(emulated, candidate, m, n, k, batch=3)


@pytest.mark.parametrize("n", [64, 136, 200, 328, 400, 584])
def test_swizzled_blocks_meet_every_tile_once(library, n):
    check_gemm(library, 5, 130, n, 40)
    grid = (ctypes.c_int * 4)()
    library.grid(130, n, 1, 64, 64, grid)
    across = -(-n // 64)
    log = 3 if across >= 6 else 2 if across >= 3 else across - 1
    assert list(grid) == [3 << log, -(-across // (1 << log)), 1, log]
    library.grid(130, n, 5, 64, 64, grid)
    assert list(grid) == [3, across, 5, 0]


@pytest.mark.parametrize("kernel", templates.PERSISTENT, ids=str)
def test_persistent_kernels_are_right(library, kernel):
    number = templates.PERSISTENT.index(kernel)
    library.set_descending(number % 2)
    m, k, first, second = 75, 72 + 32 * (number % 3), RELU + number % 2, number % 4
    a, b0, b1 = draw(m, k), draw(kernel.n0, k, seed=1, scale=0.1), draw(kernel.n1, kernel.n0, seed=2, scale=0.1)
    bias0, bias1 = draw(kernel.n0, seed=3), draw(kernel.n1, seed=4)
    out = Guarded(m, kernel.n1)
    code = library.persistent(
        *map(pointer, (a, b0, bias0, b1, bias1, out.array)), m, k, first, second,
        kernel.n0, kernel.n1, int(kernel.residence == "shared memory"),
    )  # fmt: skip
    assert code == 0
    a, b0, b1, bias0, bias1 = (x.astype(np.float64) for x in (a, b0, b1, bias0, bias1))
    inner = finish(a @ b0.T, bias0, first).astype(np.float16).astype(np.float64)
    assert error(out.check(), finish(inner @ b1.T, bias1, second)) < 4e-4
