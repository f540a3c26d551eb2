"""Bolt's light-weight profiler: every template that fits the device is timed on the product at hand, the fastest is kept.

Upstream times each candidate as its own program: one launch to warm up, 100 launches, the host's clock, matrices of zeros,
the plain epilogue and batch 1 whatever the product is. `AS_UPSTREAM` keeps these data, `AS_BOLT` has random numbers, the
product's own epilogue and batch. Both time between events, and short kernels in a CUDA graph, so that none is hidden by its
launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf, isfinite

import torch
from torch import Tensor

from ..cuda_timing import between_events, device_is_usable, recorded
from .problem import Gemm, Pair
from .templates import PERSISTENT, TEMPLATES, PersistentKernel, default_template, feasible

_LAUNCHES, _IN_GRAPH = 100, 20
_SHORT_S = 1e-4  # what takes longer keeps the device busy while the host launches the next
_LONGEST_S = 0.05  # of one candidate: a product that takes long is launched less often
_RESERVED = 1024  # bytes of shared memory that the system takes of a block's


@dataclass(frozen=True)
class Data:
    """What candidates are timed with."""

    zeros: bool = False
    own_epilogue: bool = True
    own_batch: bool = True

    def of(self, gemm: Gemm) -> Gemm:
        """The product that is timed in the place of ``gemm``."""
        plain = gemm if self.own_epilogue else replace(gemm, epilogue="linear")
        return plain if self.own_batch else replace(plain, batch=0)


AS_BOLT = Data()
AS_UPSTREAM = Data(zeros=True, own_epilogue=False, own_batch=False)
Measure = Callable[[Callable[[], object]], float]


@dataclass
class Pick:
    """The chosen template of one product; ``seconds`` of each candidate by number, infinity where ``problems`` says why."""

    gemm: Gemm
    candidate: int
    seconds: dict[int, float] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """Seconds of the chosen template."""
        return self.seconds.get(self.candidate, inf)

    def __str__(self) -> str:
        return f"{self.gemm}: {TEMPLATES[self.candidate]}"


class Profiler:
    """Picks templates for one device and keeps them by product.

    ``measure(call)`` gives seconds, ``shared_limit`` is the shared memory that a block may have, in bytes.
    ``picks``, ``pairs`` and ``seconds`` say what was measured and how long all of that took.
    """

    def __init__(
        self,
        data: Data = AS_BOLT,
        *,
        measure: Measure | None = None,
        shared_limit: int | None = None,
        device: str = "cuda",
    ):
        self.data, self.device = data, device
        self._measure = measure or seconds_of
        self._limit = shared_limit_of(device) if shared_limit is None else shared_limit
        self.picks: dict[Gemm, Pick] = {}
        self.pairs: dict[Pair, dict[PersistentKernel, float]] = {}
        self.seconds = 0.0

    @property
    def timed(self) -> int:
        """Candidates of plain products that were timed or found impossible."""
        return sum(len(pick.seconds) for pick in self.picks.values())

    def pick(self, gemm: Gemm) -> Pick:
        """The fastest template, measured at the first call for this product."""
        key = self.data.of(gemm)
        if key not in self.picks:
            began = time.perf_counter()
            self.picks[key] = self._profile(key)
            self.seconds += time.perf_counter() - began
        return replace(self.picks[key], gemm=gemm)

    def _profile(self, gemm: Gemm) -> Pick:
        a, b, bias = self._operands(gemm)
        pick = Pick(gemm, default_template(self._limit))
        fits = set(feasible(self._limit))
        for number in range(len(TEMPLATES)):
            pick.seconds[number] = inf
            if number not in fits:
                pick.problems[number] = f"more than {self._limit} bytes of shared memory"
                continue
            try:
                pick.seconds[number] = self._measure(
                    lambda n=number: torch.ops.stof_bolt.gemm.default(a, b, bias, gemm.number, n)
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                pick.problems[number] = str(error).splitlines()[0]
                if not device_is_usable(self.device):
                    raise RuntimeError(
                        f"bolt: after {TEMPLATES[number]} of {gemm} the device is unusable in this process: "
                        f"{pick.problems[number]}"
                    ) from error
        if not any(map(isfinite, pick.seconds.values())):
            raise RuntimeError(f"bolt: no template runs {gemm}: {pick.problems[pick.candidate]}")
        pick.candidate = min(pick.seconds, key=pick.seconds.__getitem__)
        return pick

    def pick_pair(self, pair: Pair, kernels: tuple[PersistentKernel, ...]) -> PersistentKernel | None:
        """The fastest of the persistent kernels that residence allows, or None where the two products apart are faster."""
        apart = self.pick(pair.first).best + self.pick(pair.second).best
        if pair not in self.pairs:
            began = time.perf_counter()
            self.pairs[pair] = {
                kernel: self._time_pair(pair, kernel) for kernel in kernels if kernel.shared_bytes <= self._limit
            }
            self.seconds += time.perf_counter() - began
        found = self.pairs[pair]
        best = min(found, key=found.__getitem__, default=None)
        return best if best is not None and found[best] < apart else None

    def _time_pair(self, pair: Pair, kernel: PersistentKernel) -> float:
        first, second, number = pair.first, pair.second, PERSISTENT.index(kernel)
        a, b0, bias0 = self._operands(first)
        _, b1, bias1 = self._operands(second)
        call = torch.ops.stof_bolt.persistent.default
        return self._measure(lambda: call(a, b0, bias0, first.number, b1, bias1, second.number, number))

    def _operands(self, gemm: Gemm) -> tuple[Tensor, Tensor, Tensor | None]:
        batch = (gemm.batch,) if gemm.batch else ()
        a, b = self._draw(*batch, gemm.m, gemm.k), self._draw(*batch, gemm.n, gemm.k)
        return a, b, None if gemm.epilogue == "linear" else self._draw(gemm.n)

    def _draw(self, *shape: int) -> Tensor:
        make = torch.zeros if self.data.zeros else torch.randn
        return make(shape, dtype=torch.float16, device=self.device)


def shared_limit_of(device: str) -> int:
    """Bytes of shared memory that one block can have; 163 KiB, an A100's, where there is no GPU."""
    if not device.startswith("cuda"):
        return 163 * 1024
    found = torch.cuda.get_device_properties(torch.device(device))
    return getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_multiprocessor - _RESERVED)


def seconds_of(call: Callable[[], object]) -> float:
    """Device seconds of one launch: the mean of 100 after one that warms up, of fewer where they would take long.

    Short ones are replays of a CUDA graph, so that the host's time per launch does not count.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        once = max(1e-6 * between_events(call), 1e-7)
        if once > _SHORT_S:
            return 1e-6 * between_events(call, max(1, min(_LAUNCHES, int(_LONGEST_S / once))))
        graph = recorded(call, _IN_GRAPH)
        return 1e-6 * between_events(graph.replay, _LAUNCHES // _IN_GRAPH) / _IN_GRAPH
