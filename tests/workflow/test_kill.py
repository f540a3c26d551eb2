"""kill -9 in the middle of a measurement, and the run after it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stof_kernels.benchmarking.measurement import read_rows

pytestmark = pytest.mark.slow

JOURNAL = Path("results/journal/cpu/mha/torch_native.jsonl")
TABLE = Path("results/measured/cpu/mha/torch_native.csv")
SLOW = """
gpu: cpu
experiments:
  mha:
    heads: 2
    head_dim: 16
    masks: [causal, longformer]
    methods: [torch_native]
    sizes:
      cpu: [{batch: 1, seq_len: [32, 48, 64]}]
    timing:
      cpu: {min_samples: 2, max_samples: 1000000, budget_s: 0.4, warmup: 1}
"""
CELLS = 6


def wait_for_cells(repo, number: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        journal = repo.path / JOURNAL
        if journal.exists() and journal.read_bytes().count(b"\n") > number:  # the first line says what it is about
            return
        time.sleep(0.05)
    raise AssertionError(f"no {number} finished cells within a minute")


def finished_cells(repo) -> int:
    return (repo.path / JOURNAL).read_bytes().count(b"\n") - 1


def live_jobs(repo) -> list[int]:
    """Processes that run a script of this copy."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.joinpath("cwd").resolve() == repo.path and b".bench.py" in entry.joinpath("cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("whom", ["everything", "snakemake alone"])
def test_killed_run_resumes(repo, whom: str) -> None:
    (repo.path / "slow.yaml").write_text(SLOW, encoding="utf-8")
    arguments = ("bench_mha", "--configfile", "slow.yaml")
    started = repo.start("snakemake", *arguments, start_new_session=True)
    wait_for_cells(repo, 2)
    if whom == "everything":
        os.killpg(started.pid, signal.SIGKILL)
    else:
        started.kill()
    started.wait()
    for _ in range(100):  # a measuring job whose Snakemake is gone ends by itself
        if not live_jobs(repo):
            break
        time.sleep(0.1)
    assert not live_jobs(repo)
    before = finished_cells(repo)
    assert 2 <= before < CELLS
    assert not (repo.path / TABLE).exists()

    # Snakemake alone stops at the lock that the killed run left.
    locked = repo.snakemake(*arguments, status=1)
    assert "LockException" in locked
    output = repo.run("workflow/run.sh", *arguments)
    assert "clearing the lock of a run that was killed" in output
    assert output.count("finished before, kept") == before
    assert output.count(": finished before, kept") + output.count(" us (") == CELLS
    assert len([row for row in read_rows(repo.path / TABLE) if row.metric == "device_time"]) == CELLS


def test_half_written_table_never_counts(repo) -> None:
    """A job that dies between writing and reporting leaves a table that Snakemake knows to be unfinished."""
    (repo.path / "slow.yaml").write_text(SLOW.replace("0.4", "0.2"), encoding="utf-8")
    started = repo.start("snakemake", "bench_mha", "--configfile", "slow.yaml", start_new_session=True)
    wait_for_cells(repo, 1)
    (repo.path / TABLE).parent.mkdir(parents=True, exist_ok=True)
    (repo.path / TABLE).write_text("experiment,gpu,method\nmha,cpu,tor", encoding="utf-8")
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    repo.snakemake("--unlock", "--configfile", "slow.yaml")
    assert repo.planned("bench_mha", "--configfile", "slow.yaml") == {"bench": 1, "bench_mha": 1}
    repo.snakemake("bench_mha", "--configfile", "slow.yaml")
    assert len([row for row in read_rows(repo.path / TABLE) if row.metric == "device_time"]) == CELLS


@contextmanager
def measuring(repo, *command: str) -> Iterator[subprocess.Popen]:
    """The slow measurement under way by ``command``, its first cell finished; killed at the end."""
    (repo.path / "slow.yaml").write_text(SLOW, encoding="utf-8")
    running = repo.start(*command, "bench_mha", "--configfile", "slow.yaml", start_new_session=True)
    try:
        wait_for_cells(repo, 1)
        yield running
        assert running.poll() is None
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def test_two_makes_do_not_run_at_once(repo) -> None:
    with measuring(repo, "workflow/run.sh"):
        output = repo.run("workflow/run.sh", "bench_mha", "--configfile", "slow.yaml", status=1)
        assert output == "make: another make runs the workflow in this folder; wait for it to end\n"


def test_make_respects_a_snakemake_that_still_runs(repo) -> None:
    with measuring(repo, "snakemake") as running:
        output = repo.run("workflow/run.sh", "bench_mha", "--configfile", "slow.yaml", status=1)
        assert "Snakemake already runs in this folder" in output
        assert str(running.pid) in output
