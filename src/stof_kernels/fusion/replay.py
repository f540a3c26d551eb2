"""A program behind CUDA graphs: inputs are copied in, the whole model is one launch, results are copied out.

Masks are read where they are, so a mask that is updated in place is seen; another mask has launches of its own and gets its own
graph when it comes a second time. Weights are read where they are too; where a parameter's memory was exchanged the graph is
captured again and the call repeated.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .assemble import Program

_MOST_GRAPHS = 4
_PLAN_WORDS = 64  # a tensor on the CPU is read by launches: up to so many numbers are part of a graph's key


@dataclass
class _Graph:
    """A captured call: its results, what it reads where it is, kept alive by these references, and where weights were."""

    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]
    kept: list[Tensor]
    addresses: list[int]


class Replay:
    """``program(*inputs)`` by replays. ``kept`` are positions of inputs that are read where they are (masks, weights).

    Results are fresh tensors. Calls from several threads wait for each other, and from several streams are ordered. Inside a
    capture of the caller's own the program runs as it is, so that it becomes part of the caller's graph.
    """

    def __init__(self, program: Program, device: torch.device, kept: Sequence[int] = ()):
        self._program, self._device = program, device
        self._kept = frozenset(kept)
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        self._buffers: dict[int, Tensor] | None = None
        self._pool = None
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        self._capturing: torch.cuda.Stream | None = None
        self.captures = 0

    @property
    def weights(self) -> list[Tensor]:
        """The model's own tensors that the program reads."""
        return self._program.weights

    @staticmethod
    def refuses(inputs: Sequence[Tensor], kept: Sequence[int] = ()) -> str | None:
        """Why calls with such inputs cannot be replayed, or None."""
        for i, t in enumerate(inputs):
            if t.device.type != "cuda" and (i not in kept or t.numel() > _PLAN_WORDS):
                return f"input {i} is on {t.device}"
        return None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The program's results for new values of its inputs."""
        if torch.cuda.is_current_stream_capturing():
            return self._program(*inputs)
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            key = self._key(inputs)
            found = self._graphs.get(key)
            if found is None:
                if not self._worth(key):
                    return self._program(*inputs)
                found = self._captured(key, inputs)
            constants = self._program.constants.current(inputs)
            results = self._run(found, inputs)
            # Looked at while the device is busy: the memory that was read is kept alive by the graph, and the pool too.
            if [t.data_ptr() for t in (*self._program.weights, *constants)] != found.addresses:
                self._graphs.clear()
                results = self._run(self._captured(key, inputs), inputs)
            return results

    def _key(self, inputs: Sequence[Tensor]) -> tuple:
        found = []
        for i in self._kept:
            t = inputs[i]
            found.append(tuple(t.tolist()) if t.device.type == "cpu" else (i, t.data_ptr(), t.shape))
        return tuple(found)

    def _worth(self, key: tuple) -> bool:
        """Whether to capture: the first mask at once, others when they come again."""
        if not self._graphs or key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > 4 * _MOST_GRAPHS:
            self._seen.popitem(last=False)
        return False

    def _run(self, found: _Graph, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        buffers = self._buffers
        if buffers:
            torch._foreach_copy_(list(buffers.values()), [inputs[i] for i in buffers])
        found.graph.replay()
        return tuple(t.clone() for t in found.outputs)

    def _captured(self, key: tuple, inputs: Sequence[Tensor]) -> _Graph:
        # What lives as long as the graph must be writable in later calls, whichever mode this one is in.
        with torch.inference_mode(False), torch.no_grad():
            return self._capture(key, inputs)

    def _capture(self, key: tuple, inputs: Sequence[Tensor]) -> _Graph:
        """Raises what PyTorch raises where something in the program cannot be captured."""
        if self._buffers is None:
            # What stays must not lie in a far larger block that calls before have left, which then could not go back.
            torch.cuda.empty_cache()
            self._buffers = {i: t.clone() for i, t in enumerate(inputs) if i not in self._kept}
        program, weights = self._program, [w.detach() for w in self._program.weights]
        flat = [self._buffers.get(i, t) for i, t in enumerate(inputs)]
        constants = program.constants.current(inputs)
        while len(self._graphs) >= _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        # What one graph leaves free of the pool serves the next one only on the stream that it was allocated on.
        self._capturing = self._capturing or torch.cuda.Stream()
        graph, stream, current = torch.cuda.CUDAGraph(), self._capturing, torch.cuda.current_stream()
        with no_workspaces():
            if not self.captures:
                self._buffered_copy(inputs)
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    program.function(*flat, *weights, *constants)
                stream.synchronize()
        if not self.captures:
            # What the calls before have left in the allocator would be held twice.
            torch.cuda.empty_cache()
        stream.wait_stream(current)
        with no_workspaces(), torch.cuda.stream(stream):
            outputs = capture(graph, lambda: program.function(*flat, *weights, *constants), self._pool)
        current.wait_stream(stream)
        self._pool = graph.pool()
        self.captures += 1
        kept = [*(inputs[i] for i in sorted(self._kept)), *weights, *constants]
        found = _Graph(graph, tuple(outputs), kept, [t.data_ptr() for t in (*weights, *constants)])
        self._graphs[key] = found
        return found

    def _buffered_copy(self, inputs: Sequence[Tensor]) -> None:
        for i, buffer in self._buffers.items():
            buffer.copy_(inputs[i])


@contextlib.contextmanager
def no_workspaces() -> Iterator[None]:
    """cuBLAS keeps tens of megabytes for every stream that it was used on; those of other streams and of this block go."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def capture(graph: torch.cuda.CUDAGraph, call: Callable[[], Any], pool: tuple | None = None) -> Any:
    """Record ``call()`` on the current stream and return its result; without torch.cuda.graph's collection of garbage.

    Raises what the call raises, with the capture ended.
    """
    graph.capture_begin(*(() if pool is None else (pool,)), capture_error_mode="thread_local")
    try:
        result = call()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # what went wrong has invalidated the capture
            graph.capture_end()
        raise
    graph.capture_end()
    return result
