"""What tuners of reimplemented systems share on a CUDA device: times between events, launches as a graph, a broken device.

No torch is imported until a function runs: Snakemake reads this folder while it parses.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def between_events(call: Callable[[], object], times: int = 1) -> float:
    """Mean microseconds of one of ``times`` calls, by events around all of them on the current stream."""
    import torch

    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / times


def recorded(call: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    """``times`` calls on the current stream, which is not the default one, as a graph that has been replayed once.

    Raises what the call raises, with the capture ended. Unlike ``torch.cuda.graph`` it does not collect garbage first, which
    takes longer than the short kernels that are timed so.
    """
    import torch

    graph = torch.cuda.CUDAGraph()
    with _no_collection():
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(times):
                call()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what went wrong has invalidated the capture
                graph.capture_end()
            raise
        graph.capture_end()
    graph.replay()
    return graph


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected inside: a kernel of Triton's that goes may unload its module, which ends a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def device_is_usable(device: torch.device | str) -> bool:
    """False once a CUDA error has left the process without its GPU: nothing later can be measured in it."""
    import torch

    if torch.device(device).type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
