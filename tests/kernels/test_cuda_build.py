"""The CUDA targets: what is generated, which card gets which, and main tiles that compile without register spills."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stof_kernels import settings
from stof_kernels.kernels import instances
from stof_kernels.kernels.__main__ import main, report, serialized
from stof_kernels.kernels.build import (
    CSRC,
    PACKAGE_ROOT,
    TARGETS,
    BuildError,
    cuda_target,
    digest,
    nvcc,
    source_digest,
    target_of,
)
from stof_kernels.kernels.loader import find

CUDA_TARGETS = ("sm_80", "sm_89", "sm_90a")
# Opt-in shared memory of a block; sm_80's library also runs on cards of 8.6, which have as little as sm_89.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_89": 99 * 1024, "sm_90a": 227 * 1024}
needs_nvcc = pytest.mark.skipif(shutil.which(shlex.split(nvcc())[0]) is None, reason="no nvcc")


@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_every_head_dim_has_a_kernel_that_fits(target):
    units = instances.instances(target)
    for shape in instances.SHAPES:
        assert any(unit.tile.shape == shape for unit in units) == (target == "sm_90a" or "hopper" not in shape)
    wide = {(unit.tile.dim, unit.dtype) for unit in units if unit.tile.shape == "wide"}
    assert wide == {(dim, dtype) for dim in (32, 64, 96, 128, 192, 256) for dtype in ("fp16", "bf16")}
    for unit in units:
        # 256 bytes: what the kernel holds beside its ring.
        assert unit.tile.shared_bytes + 256 <= SHARED_LIMIT[target], unit.name
        assert unit.tile.q_tile == (128 if unit.tile.shape in ("large", "hopper_pair") else 64)


def test_generated_names_agree_with_the_table():
    texts = instances.sources("sm_90a")
    defined = re.findall(r"STOF_(?:BLOCK_WISE|HOPPER|HOPPER_SPLIT)\((\w+),", "\n".join(texts.values()))
    table = texts["block_wise_table.cpp"]
    assert len(defined) == len(set(defined)) == len(re.findall(r"\{Shape::", table))
    assert all(f"&{name}}}" in table for name in defined)


def test_a_card_gets_its_target():
    cards = {(8, 0): "sm_80", (8, 6): "sm_80", (8, 9): "sm_89", (9, 0): "sm_90a", (10, 0): "sm_80", (12, 0): "sm_80"}
    assert {card: cuda_target(card) for card in cards} == cards
    with pytest.raises(BuildError, match=r"compute capability 8.0 or newer, this GPU has 7.5"):
        cuda_target((7, 5))
    assert "compute_80,code=compute_80" in " ".join(TARGETS["sm_80"].flags)


def test_targets_have_digests_of_their_own():
    assert len({source_digest(target) for target in ("cpu", *CUDA_TARGETS)}) == 4


def test_without_nvcc_one_line_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="not found; install the CUDA toolkit, pip install nvidia-cuda-nvcc") as caught:
        digest("sm_80")
    assert "\n" not in str(caught.value)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_main_tiles_do_not_spill(target, tmp_path):
    entry = target_of(target)
    texts = {name: text for name, text in instances.sources(target, main_only=True).items() if name.endswith(".cu")}

    def compile_one(item):
        name, text = item
        (tmp_path / name).write_text(text)
        command = [
            *shlex.split(entry.compiler()),
            *entry.flags,
            f"-I{PACKAGE_ROOT / CSRC}",
            "-c",
            name,
            "-o",
            f"{name}.o",
        ]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        return name, re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stdout + run.stderr)

    with ThreadPoolExecutor(settings.max_build_jobs()) as pool:
        reports = list(pool.map(compile_one, texts.items()))
    assert all(spills for _, spills in reports)
    spilling = {name: spills for name, spills in reports if any(pair != ("0", "0") for pair in spills)}
    assert not spilling


PORTABLE = """
import torch
from stof_kernels.kernels import loader, raw
raw.load()
loader.load("sm_80")
raw._cuda_ready = True
import test_cuda_attention as checks
for dim in (64, 128, 256):
    q, k, v = checks.draw(1, 4, 2, 150, 700, dim, torch.float16)
    keep = torch.rand(1, 1, 150, 700, device="cuda") < 0.3
    expected = checks.reference(q, k, v, keep)
    for kernel in checks.KERNELS:
        if checks.exists(kernel, dim):
            checks.assert_right(checks.attend(q, k, v, keep, kernel), expected, torch.float16)
print("right")
"""


@pytest.mark.gpu
@pytest.mark.slow
def test_the_oldest_target_runs_on_newer_cards():
    """Its portable code is compiled by the driver; tiles are those of a card with little shared memory."""
    if find("sm_80") is None and shutil.which(shlex.split(nvcc())[0]) is None:
        pytest.skip("no sm_80 library and no nvcc")
    run = subprocess.run([sys.executable, "-c", PORTABLE], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.stdout.strip() == "right", run.stderr


def test_report_reads_registers_and_spills_of_each_kernel():
    log = """
ptxas info    : Compiling entry function '_Z10block_wiseA' for 'sm_90a'
ptxas info    : Function properties for _Z10block_wiseA
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z8row_wiseB' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""
    assert report(log) == [("_Z10block_wiseA", "sm_90a", 128, 16), ("_Z8row_wiseB", "sm_90a", 40, 0)]


def test_products_that_wait_for_each_other_are_named():
    log = (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma "
        "instructions defining accumulator registers in the function '_Z13hopper_kernelB'\n"
        "ptxas info    : Used 168 registers\n"
    )
    assert serialized(log) == [("_Z13hopper_kernelB", "C7515")]


def test_compiling_an_unknown_target_is_one_line(capsys):
    assert main(["sm_99"]) == 2
    assert capsys.readouterr().err == "stof-kernels: no build target 'sm_99'; known are cpu, sm_80, sm_89, sm_90a\n"
