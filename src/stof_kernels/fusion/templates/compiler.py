"""A pool of processes that compile Triton kernels ahead of their first launch, into Triton's cache on disk."""

from __future__ import annotations

import importlib.util
import itertools
import json
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

from ... import settings
from . import compile_worker

_MOST = 32


class CompilerPool:
    """``submit`` a task of `Launch.task`; the future's result is None, or the first line of the compiler's error.

    Tasks of a lower ``rank`` go first, equal tasks are one. Where no process can be started everything is compiled where it is
    launched, and submitting does nothing.
    """

    def __init__(self, processes: int | None = None):
        count = min(_MOST, settings.max_build_jobs()) if processes is None else processes
        self._tasks: queue.PriorityQueue = queue.PriorityQueue()
        self._number = itertools.count()
        self._futures: dict[str, Future] = {}
        self._began: dict[Future, float] = {}
        folder = _cache_dir() if count else ""
        count = count if folder else 0
        self.lost = 0  # tasks that no process could answer
        self._workers = [worker for worker in (_start(folder) for _ in range(count)) if worker is not None]
        self.threads = [threading.Thread(target=self._serve, args=(w,), daemon=True) for w in self._workers]
        for thread in self.threads:
            thread.start()

    def submit(self, task: dict[str, Any], rank: float = 0.0) -> Future:
        """Ask for a kernel; asking again returns the same future."""
        text = json.dumps(task)
        future = self._futures.get(text)
        if future is None:
            future = self._futures[text] = Future()
            if self._workers:
                self._tasks.put((rank, next(self._number), text, future))
            else:
                future.set_result(None)
        return future

    def wait(self, future: Future, limit_s: float) -> str | None:
        """The future's result, or a reason of its own once a process has worked on it for so many seconds."""
        while True:
            began = self._began.get(future)
            left = limit_s if began is None else began + limit_s - time.perf_counter()
            try:
                return future.result(timeout=max(0.0, left))
            except TimeoutError:
                if future in self._began and time.perf_counter() - self._began[future] >= limit_s:
                    return f"its compiler was not done after {limit_s:g} s"

    def _serve(self, worker: subprocess.Popen) -> None:
        while True:
            _, _, text, future = self._tasks.get()
            if future is None:
                break
            self._began[future] = time.perf_counter()
            try:
                worker.stdin.write(text + "\n")
                worker.stdin.flush()
                answer = json.loads(worker.stdout.readline())
            except (OSError, ValueError):
                self.lost += 1
                answer = {}  # the process is gone: compiled where it is launched
            if "name" in answer:
                compile_worker.stored[text] = answer["name"]
            future.set_result(answer.get("error"))

    def close(self) -> None:
        """End the processes; what waits is dropped."""
        dropped = []
        try:
            while True:
                dropped.append(self._tasks.get_nowait())
        except queue.Empty:
            pass
        for _, _, _, future in dropped:
            if future is not None:
                future.set_result(None)
        for _ in self._workers:
            self._tasks.put((-1.0, next(self._number), "", None))
        for worker in self._workers:
            worker.kill()
            worker.wait()
        for thread in self.threads:
            thread.join()

    def __enter__(self) -> CompilerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _cache_dir() -> str:
    """Where this process looks for compiled kernels; empty without Triton."""
    if importlib.util.find_spec("triton") is None:
        return ""
    import triton

    return str(triton.knobs.cache.dir)


def _start(folder: str) -> subprocess.Popen | None:
    """A process that compiles into this folder."""
    try:
        return subprocess.Popen(
            [sys.executable, compile_worker.__file__, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError:
        return None
