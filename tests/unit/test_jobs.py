"""What the workflow's scripts run inside: where output goes, what an error looks like, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from stof_kernels.benchmarking.jobs import one_line


def run(body: str, log: Path) -> subprocess.CompletedProcess[str]:
    inside = textwrap.indent(textwrap.dedent(body), "    ")
    code = f"import os, sys\nfrom stof_kernels.benchmarking.jobs import job\nwith job({str(log)!r}):\n{inside}\n"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_progress_reaches_terminal_and_log_and_the_rest_the_log_alone(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "job.log"
    done = run(
        """
        print("one cell done", flush=True)
        print("a warning", file=sys.stderr)
        os.write(1, b"from C++\\n")
        os.system("echo from a compiler; echo and its errors >&2")
        """,
        log,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "one cell done\n")
    text = log.read_text(encoding="utf-8")
    for line in ("one cell done", "a warning", "from C++", "from a compiler", "and its errors"):
        assert text.count(f"{line}\n") == 1


def test_an_error_is_one_line_and_its_traceback_is_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    done = run("raise ValueError('mask: got 3, allowed: 4\\nsecond line')", log)
    assert done.returncode == 1
    assert done.stderr == f"ValueError: mask: got 3, allowed: 4 (log: {log})\n"
    assert "Traceback (most recent call last)" in log.read_text(encoding="utf-8")


def test_errors_of_ours_need_no_type(tmp_path: Path) -> None:
    from stof_kernels.benchmarking.targets import TargetError

    assert one_line(TargetError("gpu 'x' is unknown")) == "gpu 'x' is unknown"
    assert one_line(ValueError("")) == "ValueError"
    assert one_line(KeyError("a")) == "KeyError: 'a'"


def test_output_after_the_job_goes_where_it_went_before(tmp_path: Path) -> None:
    done = run("raise SystemExit(3)", tmp_path / "job.log")
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_job_ends_with_its_snakemake(tmp_path: Path) -> None:
    """Snakemake starts a script through a shell; neither tells the script when Snakemake is killed."""
    log, pid_file = tmp_path / "job.log", tmp_path / "pid"
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\nfrom pathlib import Path\nfrom stof_kernels.benchmarking.jobs import job\n"
        f"with job({str(log)!r}):\n    Path({str(pid_file)!r}).write_text(str(os.getpid()))\n    time.sleep(60)\n"
    )
    parent = tmp_path / "snakemake"
    parent.write_text(f"import os\nos.system('{sys.executable} {script}; true')\n")
    started = subprocess.Popen([sys.executable, str(parent)])
    try:
        deadline = time.monotonic() + 30
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job = int(pid_file.read_text())
        started.send_signal(signal.SIGKILL)
        started.wait()
        while time.monotonic() < deadline:
            try:
                os.kill(job, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
        raise AssertionError("the job outlived its Snakemake")
    finally:
        started.kill()
