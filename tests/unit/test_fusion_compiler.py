"""Triton kernels compiled ahead for a card that need not be there, by processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest
import torch

from stof_kernels.fusion.templates import compile_worker, library
from stof_kernels.fusion.templates.compiler import CompilerPool
from stof_kernels.fusion.templates.library import Launch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SOURCE = """
@triton.jit
def kernel(x_ptr, o_ptr, count, N: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(o_ptr + at, gelu(tl.load(x_ptr + at, mask=at < count).to(tl.float32)), mask=at < count)
"""
BROKEN = SOURCE.replace("gelu(", "no_such_function(")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton_cache"))
    return tmp_path


def compilers(monkeypatch, processes):
    """A pool whose processes compile; this one keeps interpreting, as for all other tests, in what it has loaded."""
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        return CompilerPool(processes)


def launch(source=SOURCE, monkeypatch=None):
    """As for an H100: what is expected are half-precision pointers and a count that is no multiple of 16."""
    monkeypatch.setattr(library, "arch_of", lambda device: 90)
    arguments = [torch.float16, torch.float32, 1000]
    return Launch(source, torch.device("cuda"), arguments, {"N": 128, "UNUSED": 3}, warps=4)


def test_a_task_says_all_that_a_compiler_needs(monkeypatch):
    task = launch(monkeypatch=monkeypatch).task
    types = [("x_ptr", "*fp16"), ("o_ptr", "*fp32"), ("count", "i32"), ("N", "constexpr"), ("OVERLAP", "constexpr")]
    assert task["signature"] == types
    assert task["constants"] == [("N", 128), ("OVERLAP", 1)]
    assert task["aligned"] == [0, 1]
    assert (task["arch"], task["warps"], task["overlap"]) == (90, 4, True)
    assert json.loads(json.dumps(task))["path"] == task["path"]


def test_processes_compile_into_the_cache_on_disk(monkeypatch, folder):
    task = launch(monkeypatch=monkeypatch).task
    with compilers(monkeypatch, 2) as pool:
        first, again = pool.submit(task), pool.submit(task)
        failing = pool.submit(launch(BROKEN, monkeypatch).task)
        assert first is again
        assert first.result(timeout=120) is None
        assert "no_such_function" in failing.result(timeout=120)
        workers = pool._workers
    assert all(worker.poll() is not None for worker in workers)
    (ptx,) = (folder / "triton_cache").rglob("kernel.ptx")
    text = ptx.read_text()
    assert "sm_90" in text
    assert "griddepcontrol.wait" in text


OTHER_SETTINGS = """
import json, sys, torch, triton
from stof_kernels.fusion.templates import compile_worker
from stof_kernels.fusion.templates.compiler import CompilerPool
task = json.loads(sys.argv[1])
with CompilerPool(1) as pool:
    reason = pool.submit(task).result(timeout=120)
triton.knobs.compilation.always_compile = True  # Triton's own look-up would compile again
triton.compile = None
print(reason, compile_worker.compiled(task).metadata.num_warps)
"""


def test_what_another_process_has_compiled_is_found_whatever_this_one_has_set(monkeypatch, folder):
    task = json.dumps(launch(monkeypatch=monkeypatch).task)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", OTHER_SETTINGS, task], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == ["None", "4"], done.stderr


def test_without_processes_nothing_is_compiled_ahead(monkeypatch, folder):
    with CompilerPool(processes=0) as pool:
        assert pool.submit(launch(monkeypatch=monkeypatch).task).result(timeout=1) is None
    assert not (folder / "triton_cache").exists()


def test_a_process_that_dies_costs_only_the_time(monkeypatch):
    pool = compilers(monkeypatch, 1)
    for worker in pool._workers:
        worker.kill()
        worker.wait()
    assert pool.submit(launch(monkeypatch=monkeypatch).task).result(timeout=20) is None
    pool.close()


def test_a_compiler_that_does_not_end_is_not_waited_for():
    pool = CompilerPool(processes=0)
    never, answered = Future(), Future()
    pool._began[never] = time.perf_counter()
    answered.set_result("reason")
    assert pool.wait(answered, 9.0) == "reason"
    assert pool.wait(never, 0.05) == "its compiler was not done after 0.05 s"
    pool.close()


def test_what_waits_when_a_pool_ends_is_dropped(monkeypatch):
    pool = compilers(monkeypatch, 1)
    task = launch(monkeypatch=monkeypatch).task
    futures = [pool.submit({**task, "warps": w}, rank=float(w)) for w in (1, 2, 4, 8)]
    pool.close()
    assert all(future.result(timeout=5) is None for future in futures)


def test_the_worker_starts_without_torch():
    code = (
        "import sys, runpy; sys.argv = ['w', 'cache']; import io; sys.stdin = io.StringIO('');"
        f"runpy.run_path({compile_worker.__file__!r}, run_name='__main__'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=True)
    assert "False" in done.stderr + done.stdout
