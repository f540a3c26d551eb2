"""Several measuring jobs on one device: they prepare side by side, and each is checked and timed alone. No torch.

A readers-writer lock of files. A job that builds, compiles or cleans up holds it shared, so that nothing of that kind happens
while another one, which holds it exclusively, takes times or memory. Off unless ``STOF_SHARED_DEVICE`` names a folder.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from stof_kernels import settings

TOGETHER = frozenset(
    {
        "torch_native",
        "sdpa",
        "torch_compile",
        "torch_compile_reduce_overhead",
        "torch_compile_no_mha_boundary",
        "flex_attention",
        "stof_mha_only",
    }
)
"""Whole-model methods that may be prepared beside others. Any other may choose kernels by their time, so it is alone for it."""


class Turns:
    """What one process holds of the lock in ``folder``; without a folder nothing is locked and nobody else is there.

    Whoever waits to be alone comes before those who would prepare: else a job that comes back from its turn would make the
    others wait for its next preparation.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._files: tuple[IO[str], IO[str]] | None = None  # the device, and whether somebody asks to be alone on it
        self._own: Path | None = None
        self._is_alone = False

    @property
    def active(self) -> bool:
        """Whether this process takes turns with others."""
        return self._files is not None

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Take part, with the right to prepare. Inside itself it does nothing."""
        if self._folder is None or self.active:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            device, asking = (stack.enter_context(open(self._folder / name, "a")) for name in ("device", "asking"))
            self._own = self._folder / f"job-{os.getpid()}-{id(self)}"
            present = stack.enter_context(open(self._own, "a"))
            fcntl.flock(present, fcntl.LOCK_EX)
            self._files = device, asking
            try:
                self._prepare()
                yield
            finally:
                self._own.unlink(missing_ok=True)
                # A child that was forked meanwhile has the files open too, so closing them would not be enough.
                for file in (device, asking, present):
                    fcntl.flock(file, fcntl.LOCK_UN)
                self._files = self._own = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody prepares or measures, and keep it so; afterwards wait for the right to prepare again."""
        if self._files is None or self._is_alone:
            yield
            return
        device, asking = self._files
        fcntl.flock(device, fcntl.LOCK_UN)  # the others could not become alone either while this one waits
        fcntl.flock(asking, fcntl.LOCK_SH)
        fcntl.flock(device, fcntl.LOCK_EX)
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False
            fcntl.flock(device, fcntl.LOCK_UN)
            fcntl.flock(asking, fcntl.LOCK_UN)
            self._prepare()

    def others(self) -> int:
        """How many other processes take part now."""
        if self._folder is None or not self.active:
            return 0
        return sum(_is_held(path) for path in self._folder.glob("job-*") if path != self._own)

    def _prepare(self) -> None:
        device, asking = self._files  # type: ignore[misc]
        fcntl.flock(asking, fcntl.LOCK_EX)  # while anybody is alone or waits for it, this does not return
        fcntl.flock(device, fcntl.LOCK_SH)
        fcntl.flock(asking, fcntl.LOCK_UN)


@cache
def turns() -> Turns:
    """This process's."""
    return Turns(settings.shared_device())


def _is_held(path: Path) -> bool:
    """Whether a living process holds the file: a killed one left it, unlocked."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False
