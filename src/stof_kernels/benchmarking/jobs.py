"""What every script of the workflow runs inside: a log that catches everything, one line for an error, no orphans.

No torch.
"""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_ORPHAN_POLL_S = 1.0


@contextmanager
def job(log: str | os.PathLike[str]) -> Iterator[None]:
    """Run a job whose output goes to the file ``log``, by file descriptor, so that what a compiler or C++ prints is caught too.

    What Python prints to standard output is progress: it reaches the terminal as well. An exception becomes one line on the
    terminal, its traceback goes to the log, and the process exits with status 1.
    """
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    _die_with_snakemake()
    with open(path, "w", encoding="utf-8", buffering=1) as file, os.fdopen(os.dup(2), "w", buffering=1) as terminal:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        faulthandler.enable()
        stdout, sys.stdout = sys.stdout, _Tee(file, terminal)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            print(f"{one_line(error)} (log: {path})", file=terminal)
            raise SystemExit(1) from None
        finally:
            sys.stdout = stdout
            sys.stderr.flush()


def one_line(error: BaseException) -> str:
    """The error's first line; errors that are not ours are preceded by their type."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    known = type(error).__module__.startswith("stof_kernels")
    return first if known and first else f"{type(error).__name__}: {first}".rstrip(": ")


class _Tee(io.TextIOBase):
    """Text stream that writes to several, line by line."""

    def __init__(self, *streams: TextIO):
        self._streams = streams

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """Standard output's descriptor, for those who pass the stream on to another process: the log."""
        return 1

    def write(self, text: str) -> int:
        """Write to all."""
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush all."""
        for stream in self._streams:
            stream.flush()


def _die_with_snakemake() -> None:
    """End this process soon after the Snakemake that started it has gone.

    After kill -9 a measuring job would otherwise live on, and disturb the job that takes its place. Snakemake starts scripts
    through a shell, so the process to watch is the nearest ancestor that runs Snakemake; without one, nothing is watched.
    """
    watched = _snakemake_ancestor()
    if watched:
        threading.Thread(target=_watch, args=(watched,), daemon=True).start()


def _watch(watched: tuple[int, str]) -> None:
    idle = threading.Event()
    while _started(watched[0]) == watched[1]:
        idle.wait(_ORPHAN_POLL_S)
    os._exit(1)


def _snakemake_ancestor() -> tuple[int, str] | None:
    """Process id and start time of the nearest ancestor whose command line names Snakemake's entry point."""
    pid = os.getppid()
    while pid > 1:
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        if any(Path(os.fsdecode(a)).name in ("snakemake", "__main__.py") and b"snakemake" in a for a in arguments):
            return pid, _started(pid)
        pid = int(stat.rpartition(")")[2].split()[1])
    return None


def _started(pid: int) -> str:
    """Start time of a live process, which tells it from a later one of the same id; empty if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
