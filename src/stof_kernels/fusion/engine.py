"""`optimize`: capture, search (or a cached plan), assemble, check against the model, fall back where it does not fit."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import blocks, cache, finals
from .assemble import Built, Program, assemble
from .capture import Captured, CaptureError, capture, capture_graph
from .costs import Clock, DeviceMeter, time_us
from .graph import OpGraph, build
from .inputs import Mismatch
from .plan import BlockPlan, Choice, FusionPlan
from .reasons import first_line
from .replay import Replay
from .scheme import FusionScheme
from .search import Progress, Search, SearchSettings
from .templates.compiler import CompilerPool

# How far a tuned model may be from the model in its own precision, relative to the largest output.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


_SEARCH_SHARE = 0.9  # of a budget, from the capture on; the rest is for checking and capturing the plan


class FallbackWarning(UserWarning):
    """A call or a model runs as it is instead of tuned; the text says why."""


class Optimized(nn.Module):
    """A model with a fusion plan for the shapes it was tuned for; anything else runs the model itself, with a warning.

    ``plan`` is what the search decided (None if the model could not be captured), ``fallbacks`` counts calls that ran the model
    by reason. Weights are the model's own: state_dict, load_state_dict and in-place changes work as on the model. Replacing a
    parameter by another object is not seen.
    """

    def __init__(
        self, model: nn.Module, captured: Captured | None, program: Program | Replay | None, plan: FusionPlan | None
    ):
        super().__init__()
        self.model = model
        self.plan = plan
        self.fallbacks: Counter[str] = Counter()
        self._captured, self._program = captured, program
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        reason = self._unfit()
        if reason is None:
            try:
                flat = self._captured.signature.tensors(args, kwargs)
            except Mismatch as difference:
                reason = str(difference)
            else:
                if not torch.is_grad_enabled():
                    return self._captured.unflatten(self._program(*flat))
                if not self._wants_gradients(flat):
                    with torch.no_grad():
                        return self._captured.unflatten(self._program(*flat))
                reason = "gradients are wanted, the tuned model is forward only"
        return self._run_model(reason, args, kwargs)

    def _unfit(self) -> str | None:
        if self._program is None:
            return self.plan.why if self.plan is not None else "the model could not be captured"
        if self.model.training:
            return "the model is in training mode"
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return "autocast is on, the tuned model has fixed dtypes"
        return None

    def _wants_gradients(self, flat: list[Tensor]) -> bool:
        return any(t.requires_grad for t in (*flat, *self._program.weights))

    def _run_model(self, reason: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.fallbacks[reason] += 1
        if self.fallbacks[reason] == 1 and self._program is not None:
            warnings.warn(f"stof.optimize: running the model as it is: {reason}", FallbackWarning, stacklevel=3)
        return self.model(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's own, under the model's own names."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model; the tuned calls see the new weights."""
        return self.model.load_state_dict(*args, **kwargs)


def optimize(
    model: nn.Module,
    example_inputs: Sequence[Any] | dict[str, Any],
    budget_s: float = 30.0,
    seed: int = 0,
    use_cache: bool = True,
    templates: tuple[str, ...] | None = None,
    progress: Progress | bool = False,
) -> Optimized:
    """The model with the operators around its attention fused, by a plan that a two-stage search finds for these inputs.

    ``example_inputs`` are positional arguments (a tuple or list) or keyword arguments (a dict) of one call, masks included; the
    plan holds for their shapes and dtypes, other calls run the model itself. The search takes about ``budget_s`` seconds at
    most, draws by ``seed`` and is skipped where the disk cache has a plan for this graph, device and code. ``templates``
    restricts the ways to run a segment; ``progress`` is True (lines to stderr) or a function of one line.

    Never raises for a model that cannot be captured or tuned: it warns in one line and runs the model as it is. Raises
    TypeError for arguments of the wrong kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model is {type(model).__name__}, allowed: a torch.nn.Module")
    if not isinstance(example_inputs, (tuple, list, dict)):
        raise TypeError(f"optimize: example_inputs is {type(example_inputs).__name__}, allowed: a tuple, list or dict")
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (tuple(example_inputs), {})
    settings = SearchSettings(budget_s=budget_s, seed=seed, templates=templates)
    clock = Clock(_SEARCH_SHARE * settings.budget_s)
    try:
        with _collection_paused(), contextlib.ExitStack() as stack:
            # Where a search is certain its compilers start while the model is captured.
            pool = None if use_cache or not _on_cuda((args, kwargs)) else stack.enter_context(CompilerPool())
            captured = capture(model, args, kwargs)
            with clock.on("planning"):
                captured.signature.plan_masks(args, kwargs)
            flat = captured.signature.tensors(args, kwargs)
            with torch.no_grad():
                program, plan = tune(
                    captured, flat, settings, clock, use_cache, _line(progress), lambda: model(*args, **kwargs), pool
                )
    except CaptureError as error:
        warnings.warn(f"stof.optimize: running the model as it is: {error}", FallbackWarning, stacklevel=2)
        return Optimized(model, None, None, None)
    if plan.use == "model":
        warnings.warn(f"stof.optimize: running the model as it is: {plan.why}", FallbackWarning, stacklevel=2)
    return Optimized(model, captured, program, plan)


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """No garbage collection meanwhile: with a model's and a compiler's objects in memory each one takes a second."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def compile_graph(
    graph_module: fx.GraphModule, inputs: list[Tensor], use_cache: bool = True, **options: Any
) -> Callable[..., tuple[Tensor, ...]]:
    """What ``torch.compile(backend="stof")`` calls for each graph; anything that does not fit runs the graph as it is."""
    if any(not isinstance(t, Tensor) for t in inputs):
        return _as_it_is(graph_module, "its sizes are symbolic, allowed: torch.compile(..., dynamic=False)")
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _as_it_is(graph_module, "gradients are wanted, the tuned graph is forward only")
    settings = SearchSettings(**options)
    clock = Clock(_SEARCH_SHARE * settings.budget_s)
    try:
        captured = capture_graph(graph_module, inputs)
        with torch.no_grad():
            program, plan = tune(
                captured, inputs, settings, clock, use_cache, _line(False), lambda: graph_module(*inputs)
            )
    except CaptureError as error:
        return _as_it_is(graph_module, str(error))
    if program is None:
        return _as_it_is(graph_module, plan.why)

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return program(*flat)

    return run


def _as_it_is(graph_module: fx.GraphModule, reason: str) -> Callable[..., Any]:
    warnings.warn(f'torch.compile(backend="stof"): running the graph as it is: {reason}', FallbackWarning, stacklevel=3)
    return graph_module.forward


def tune(
    captured: Captured,
    flat: list[Tensor],
    settings: SearchSettings,
    clock: Clock,
    use_cache: bool,
    progress: Progress,
    reference: Callable[[], Any],
    pool: CompilerPool | None = None,
) -> tuple[Program | Replay | None, FusionPlan]:
    """The program of the best plan and the plan; the program is None where the model as it is should run.

    A plan is kept only if its outputs agree with the eager operators' and it is no slower than ``reference()``, the model. On
    CUDA it is replayed as one graph where its inputs allow. A search uses the ``pool`` if there is one.
    """
    graph = build(captured)
    depends = cache.dependencies(graph, asdict(settings))
    plan = cache.load(depends) if use_cache else None
    if plan is not None and not _covers(graph, plan):
        plan = None
    fresh, built, near = plan is None, {}, {}
    if fresh:
        plan, built, near = search(graph, flat, settings, clock, progress, pool)
    program = None
    if plan.use == "plan":
        deadline = time.perf_counter() + min(finals.MOST_S, clock.budget - clock.elapsed)
        program, plan = _accept(graph, plan, built, flat, reference if fresh else None, progress, near, deadline)
    if fresh and use_cache:
        cache.store(depends, plan)
    return program, plan


def search(
    graph: OpGraph,
    flat: list[Tensor],
    settings: SearchSettings,
    clock: Clock,
    progress: Progress = lambda line: None,
    pool: CompilerPool | None = None,
) -> tuple[FusionPlan, Built, finals.Finalists]:
    """A new search over a graph, with costs measured on the tensors that these inputs lead to, and what it built.

    Last the choices that cost nearly the same as the plan's, for a comparison inside the whole model.
    """
    parts = blocks.split(graph)
    with contextlib.ExitStack() as stack:
        if pool is None and _on_cuda(flat):
            pool = stack.enter_context(CompilerPool())
        values = record(graph, parts, flat)
        meter = DeviceMeter(graph, values, clock, pool)
        try:
            found = Search(graph, parts, settings, meter, clock, progress)
            plan = found.run()
        finally:
            meter.close()
    plan.counts["refused"] = len(meter.refused)
    for what, why in meter.refused.items():
        progress(f"refused: {what}: {why}")
    return plan, meter.built, {key: finals.finalists(space) for key, space in found.spaces.items() if space.measured}


def _on_cuda(inputs: Any) -> bool:
    """Whether a tensor anywhere in the inputs is on a GPU."""
    return any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(inputs))


def record(graph: OpGraph, parts: list[blocks.Block], flat: list[Tensor]) -> dict[fx.Node, Tensor]:
    """Values of everything that the first layer of each block reads, from one eager run of the captured graph."""
    wanted = {node for part in parts for i in part.layer(0) for node in graph.ops[i].inputs}
    kept: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if node in wanted:
                kept[node] = value
            return value

    with torch.no_grad():
        Recorder(graph.graph_module).run(*flat)
    return kept


def eager_plan(graph: OpGraph) -> FusionPlan:
    """Every operator by itself: what all else is compared with."""
    n = len(graph.ops)
    return FusionPlan([BlockPlan(0, n, 1, FusionScheme.unfused(n).encode(), (Choice(),) * n)] if n else [])


def _covers(graph: OpGraph, plan: FusionPlan) -> bool:
    at = 0
    for block in plan.blocks:
        if block.start != at:
            return False
        at += block.period * block.count
    return at == len(graph.ops)


def _accept(
    graph: OpGraph,
    plan: FusionPlan,
    built: Built,
    flat: list[Tensor],
    reference: Callable[[], Any] | None,
    progress: Progress,
    near: finals.Finalists,
    deadline: float,
) -> tuple[Program | Replay | None, FusionPlan]:
    """The plan's program if it is right and not slower than the model, else the reason in the plan.

    On CUDA choices ``near`` the plan's are compared in the program first, until ``deadline``.
    """
    eager = assemble(graph, eager_plan(graph))
    device = next((t.device for t in flat if t.device.type == "cuda"), flat[0].device if flat else torch.device("cpu"))
    try:
        compare = device.type == "cuda" and time.perf_counter() < deadline
        program = assemble(graph, plan, built, {key for key in near if len(near[key]) > 1} if compare else ())
        if near and compare:
            plan = finals.compared(plan, program, near, built, flat, deadline, progress)
        wrong = _difference(program(*flat), eager(*flat))
    except Exception as error:
        # A cached plan may name a compiler that is gone, or memory may not suffice: the eager operators always run.
        wrong = f"the plan could not be built: {first_line(error)}"
    del eager
    if wrong is not None:
        plan.use, plan.why = "model", wrong
        return None, plan
    if device.type == "cuda":
        program = _replayed(graph, program, device, flat, progress)
    if reference is not None:
        tuned, model = (time_us(run, [], device) for run in (lambda: program(*flat), reference))
        plan.seconds["tuned_call"], plan.seconds["model_call"] = tuned / 1e6, model / 1e6
        if tuned > model:
            plan.use, plan.why = "model", f"no plan was faster ({tuned:.0f} us tuned, {model:.0f} us as it is)"
            return None, plan
    return program, plan


def _replayed(
    graph: OpGraph, program: Program, device: torch.device, flat: list[Tensor], progress: Progress
) -> Program | Replay:
    """The program behind CUDA graphs, or as it is where it cannot be captured."""
    signature = graph.captured.signature
    kept = signature.mask_positions if signature is not None else _kept(graph.captured, flat)
    reason = Replay.refuses(flat, kept)
    if reason is None:
        replay = Replay(program, device, kept)
        try:
            replay(*flat)
            return replay
        except Exception as error:
            torch.cuda.synchronize(device)
            reason = first_line(error)
    progress(f"no CUDA graph: {reason}")
    return program


def _kept(captured: Captured, flat: list[Tensor]) -> list[int]:
    """Inputs of a graph of Dynamo's that are read where they are: weights, and what is on the CPU."""
    names = [node.name for node in captured.graph_module.graph.nodes if node.op == "placeholder"]
    return [i for i, name in enumerate(names) if name in captured.weights or flat[i].device.type == "cpu"]


def _difference(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> str | None:
    for a, b in zip(got, want, strict=True):
        if not a.is_floating_point():
            continue
        scale = b.abs().max().nan_to_num().clamp(min=1.0) if b.numel() else 1.0
        wide = torch.float64 if b.dtype in (torch.float32, torch.float64) else torch.float32
        error = float((a.to(wide) - b.to(wide)).abs().max() / scale) if a.numel() else 0.0
        if not error <= _TOLERANCE.get(a.dtype, 1e-3):
            return f"the tuned outputs differ by {error:.1e} of their range"
    return None


def _line(progress: Progress | bool) -> Progress:
    if callable(progress):
        return progress
    if not progress:
        return lambda line: None
    began = time.perf_counter()
    return lambda line: print(
        f"stof.optimize {time.perf_counter() - began:5.1f} s  {line}", file=sys.stderr, flush=True
    )
