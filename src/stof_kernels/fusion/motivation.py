"""Pairs of operators fused or apart, tuned alone or together: the question behind STOF's Figures 3 and 4.

Figure 3 compares the best single kernel of a pair with the best kernels of its two operators. Figure 4 runs the fused kernel
with the parameters that were best for one operator alone and with those that are best for the pair.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from .blocks import Block
from .capture import capture
from .costs import Clock, DeviceMeter, OutOfTime
from .engine import record
from .graph import OpGraph, build
from .plan import Choice
from .segments import Segment, cut
from .templates import TEMPLATES, Setting
from .templates.compiler import CompilerPool

OPERATORS = ("bias_layernorm", "gemm_layernorm", "gemm_gemm")
METHODS = ("detached", "fused", "tuned_individually", "tuned_after_fusion")
SIZES = tuple((batch, seq_len, hidden) for batch in (1, 8) for seq_len in (128, 4096) for hidden in (512, 1024))
"""(batch, sequence length, hidden) of the eight published sizes, in their order."""


@dataclass(frozen=True)
class Outcome:
    """One way to run a pair: microseconds that the search saw, or None; ``how`` names the kernels or says why there are none.

    ``run()`` is one call on the pair's input, for a timer to measure.
    """

    us: float | None
    how: str
    run: Callable[[], object] | None = field(default=None, compare=False)


class _Pair(nn.Module):
    """The two operators of a pair; LayerNorm is over the hidden dimension, per row."""

    def __init__(self, operator: str, hidden: int, inner: int):
        super().__init__()
        self.operator = operator
        if operator == "bias_layernorm":
            self.bias = nn.Parameter(torch.empty(hidden))
        else:
            sizes = (inner, hidden) if operator == "gemm_layernorm" else (hidden, inner)
            self.first = nn.Linear(*sizes)
        self.second = nn.Linear(inner, hidden) if operator == "gemm_gemm" else nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.bias if self.operator == "bias_layernorm" else self.first(x))


def pair(
    operator: str,
    batch: int,
    seq_len: int,
    hidden: int,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    wide: bool = False,
) -> tuple[OpGraph, list[Tensor]]:
    """The captured pair and its input, drawn from ``seed``.

    ``bias_layernorm``: x + bias, LayerNorm. ``gemm_layernorm``: hidden -> hidden (``wide``: 4 hidden -> hidden), LayerNorm.
    ``gemm_gemm``: hidden -> 4 hidden -> hidden. ValueError for another operator.
    """
    if operator not in OPERATORS:
        raise ValueError(f"motivation: operator {operator!r}, allowed: {', '.join(OPERATORS)}")
    inner = 4 * hidden if wide or operator == "gemm_gemm" else hidden
    generator = torch.Generator().manual_seed(seed)
    module = _Pair(operator, hidden, inner).eval().requires_grad_(False)
    for parameter in module.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    width = inner if operator == "gemm_layernorm" else hidden
    x = torch.randn(batch, seq_len, width, generator=generator).to(device, dtype)
    return build(capture(module.to(device, dtype), (x,))), [x]


def measure(
    graph: OpGraph,
    inputs: list[Tensor],
    budget_s: float = 20.0,
    most: int = 24,
    seed: int = 0,
    methods: Sequence[str] = METHODS,
) -> dict[str, Outcome]:
    """The named `METHODS` on a captured pair: up to ``most`` candidates per segment, within about ``budget_s`` seconds.

    What a method cannot do without (each operator alone, one fused kernel that runs) is measured whatever it takes; the budget
    ends what comes after. Every candidate is compared with the operators one by one before it counts; segments that no named
    method needs are not measured. ValueError for another method.
    """
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"motivation: method {name!r}, allowed: {', '.join(METHODS)}")
    values = record(graph, [Block(0, len(graph.ops), 1)], inputs)
    parts, whole = [cut(graph, [i]) for i in range(len(graph.ops))], cut(graph, range(len(graph.ops)))
    on_cuda = whole.device.type == "cuda"
    with CompilerPool(processes=None if on_cuda else 0) as pool:
        meter = DeviceMeter(graph, values, Clock(budget_s), pool if on_cuda else None)
        return _Ways(meter, parts, whole, values, most, seed).named(set(methods))


@dataclass(frozen=True)
class _Ways:
    """Measures the ways to run a pair: its ``parts`` are the two operators, ``whole`` is both."""

    meter: DeviceMeter
    parts: list[Segment]
    whole: Segment
    values: dict[fx.Node, Tensor]
    most: int
    seed: int

    def named(self, methods: set[str]) -> dict[str, Outcome]:
        """Outcomes of these `METHODS`."""
        found: dict[str, Outcome] = {}
        rest = [name for name in METHODS[1:] if name in methods]
        needed, winner = {"eager"}, None  # what every operator alone has to be measured with
        if rest:
            table = self._table(self.whole, lambda ran: bool(ran - {"eager"}))
            fused = {choice: us for choice, us in table.items() if choice.template != "eager"}
            winner = _best(fused)
            needed |= {winner[0].template} if winner and "tuned_individually" in rest else set()
        if "detached" in methods or len(needed) > 1:
            alone = [self._table(part, (needed & _able(part)).issubset) for part in self.parts]
        if "detached" in methods:
            found["detached"] = self._detached([_best(table) for table in alone])
        for name in rest:
            if winner is None:
                found[name] = Outcome(None, self._why_not(self.whole))
            elif name == "tuned_individually":
                found[name] = self._individually(alone, fused, winner[0].template)
            else:
                found[name] = Outcome(winner[1], str(winner[0]), self._runner(self.whole, winner[0]))
        return found

    def _table(self, segment: Segment, enough: Callable[[set[str]], bool]) -> dict[Choice, float]:
        """Measured microseconds of up to ``most`` candidates, eager and each template's default first.

        The budget ends it once the templates that have run are ``enough``.
        """
        first, rest = [("eager", ())], []
        for name in sorted(_able(segment) - {"eager"}, key=list(TEMPLATES).index):
            settings = TEMPLATES[name].settings(segment)
            first.append((name, settings[0]))
            rest += [(name, s) for s in settings[1:]]
        random.Random(f"{self.seed} {segment.key}").shuffle(rest)
        candidates = (first + rest)[: self.most]
        self.meter.prepare(segment, candidates, rank=0.0)
        found: dict[Choice, float] = {}
        for name, setting in candidates:
            done = enough({choice.template for choice in found})
            try:
                with self.meter.clock.unlimited() if not done and _quick(segment, name) else nullcontext():
                    cost = self.meter.cost(segment, name, setting)
            except OutOfTime:
                if done:
                    break
                continue
            if math.isfinite(cost):
                found[Choice(name, setting)] = cost
        return found

    def _runner(self, segment: Segment, choice: Choice) -> Callable[[], object]:
        run = self.meter.built[segment.key, choice.template, choice.setting]
        tensors = [self.values[node] for node in segment.sources]
        return lambda: run(*tensors)

    def _detached(self, bests: list[tuple[Choice, float] | None]) -> Outcome:
        for part, best in zip(self.parts, bests, strict=True):
            if best is None:
                return Outcome(None, self._why_not(part))
        runs = [self._runner(part, choice) for part, (choice, _) in zip(self.parts, bests, strict=True)]
        how = " then ".join(str(choice) for choice, _ in bests)
        return Outcome(sum(us for _, us in bests), how, lambda: [run() for run in runs][-1])

    def _individually(self, alone: list[dict[Choice, float]], fused: dict[Choice, float], template: str) -> Outcome:
        """The winning template with the parameters that were best for one operator alone, the slower one if it has any."""
        for table in sorted(alone, key=lambda t: -min(t.values(), default=0.0)):
            own = {choice: us for choice, us in table.items() if choice.template == template}
            if not own:
                continue
            settings = TEMPLATES[template].settings(self.whole)
            choice = Choice(template, _nearest(min(own, key=own.__getitem__).setting, settings))
            with self.meter.clock.unlimited():
                us = fused.get(choice) or self.meter.cost(self.whole, template, choice.setting)
            if math.isfinite(us):
                return Outcome(us, str(choice), self._runner(self.whole, choice))
            return Outcome(None, f"{choice} does not run")
        return Outcome(None, f"{template} runs neither operator alone, so it has no parameters of one")

    def _why_not(self, segment: Segment) -> str:
        """Why nothing that was tried on a segment runs, and what could not be tried."""
        tried = [why for what, why in self.meter.refused.items() if what.startswith(f"{segment} by ")]
        unable = [f"{name}: {why}" for name, t in TEMPLATES.items() if (why := t.supports(segment)) is not None]
        return "; ".join(tried + unable)


def _quick(segment: Segment, template: str) -> bool:
    """Whether a template may be waited for: on CUDA not Inductor, which would take the seconds of all others."""
    return template != "inductor" or segment.device.type != "cuda"


def _able(segment: Segment) -> set[str]:
    """Names of the templates that support a segment."""
    return {name for name, template in TEMPLATES.items() if template.supports(segment) is None}


def _best(table: dict[Choice, float]) -> tuple[Choice, float] | None:
    return min(table.items(), key=lambda item: item[1], default=None)


def _nearest(wanted: Setting, settings: list[Setting]) -> Setting:
    """The setting that shares most parameters with ``wanted``; what only the fused kernel needs is forced."""
    return max(settings, key=lambda s: len(set(s) & set(wanted)))
