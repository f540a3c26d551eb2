"""Bolt (MLSys 2022), reimplemented, in whole models: products by profiled templates, the rest of the graph by Inductor.

Attention is two batched products with the scale, the mask and the softmax between them on scores in memory, never a fused
kernel. Inductor stands for TVM's own code. Layers of one input (Q, K and V) are one product. The templates are CUTLASS 2's by
their parameters, rebuilt; they are compiled once per architecture, which is no part of the tuning time; profiling and compiling
the model are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .. import native
from ..registry import Unsupported
from .registry import ModelReady, Subject, model_method

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..bolt_compiler.patterns import Report
    from ..bolt_compiler.profiler import Data, Profiler

_DEPENDS = (
    "baselines/bolt_compiler",
    "baselines/cuda_timing.py",
    "integrations/layout.py",
    "fusion/capture.py",
    "fusion/inputs.py",
    *native.sources("bolt"),
)


@model_method(
    "bolt",
    experiments=("end_to_end", "tuning_cost"),
    depends=_DEPENDS,
    devices=("cuda",),
    tuned=True,
    reimplemented=True,
)
def bolt(subject: Subject) -> ModelReady:
    """Candidates are timed with random data, the product's own epilogue and its own batch."""
    from ..bolt_compiler.profiler import AS_BOLT

    return tuned(subject, AS_BOLT)


@model_method(
    "bolt_as_upstream",
    label="Bolt (reimpl.), profiled as upstream",
    rank=64,
    experiments=(),
    depends=_DEPENDS,
    devices=("cuda",),
    tuned=True,
    reimplemented=True,
)
def bolt_as_upstream(subject: Subject) -> ModelReady:
    """The same with candidates timed on zeros, without epilogue and batch, as TVM does: to study the effect, in no figure."""
    from ..bolt_compiler.profiler import AS_UPSTREAM

    return tuned(subject, AS_UPSTREAM)


def tuned(subject: Subject, data: Data) -> ModelReady:
    """The model captured, rewritten with picked templates and compiled; ``Unsupported`` for other types than fp16."""
    import torch

    from ..bolt_compiler import operators
    from ..bolt_compiler.profiler import Profiler

    dtype = subject.problem.dtype
    if dtype != "float16":
        raise Unsupported(f"Bolt's list of templates is for float16, not {dtype}")
    operators.load()
    torch._dynamo.reset()
    began = time.perf_counter()
    profiler = Profiler(data)
    run, report = compiled(subject, profiler)
    run()
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    return ModelReady(run, took, note=note_of(report, profiler))


def compiled(
    subject: Subject, profiler: Profiler, compile_rest: Callable | None = None
) -> tuple[Callable[[], Tensor], Report]:
    """One forward pass, and what became of the graph; ``compile_rest(graph)`` compiles what is not Bolt's."""
    import torch

    from stof_kernels.fusion.capture import CaptureError, capture
    from stof_kernels.integrations.layout import keep_bias_in_rows
    from stof_kernels.integrations.variants import NATIVE

    from ..bolt_compiler.patterns import rewrite

    model, given = subject.model(NATIVE), subject.inputs(NATIVE)
    keep_bias_in_rows(model)
    try:
        captured = capture(model, (), given)
    except CaptureError as reason:
        raise Unsupported(str(reason)) from None
    report = rewrite(captured.graph_module, profiler)
    if compile_rest is None:
        program = torch.compile(captured.graph_module, dynamic=False, fullgraph=True)
    else:
        program = compile_rest(captured.graph_module)
    signature = captured.signature

    def run() -> Tensor:
        with torch.no_grad():
            return captured.unflatten(program(*signature.tensors((), given))).last_hidden_state

    return run, report


def note_of(report: Report, profiler: Profiler) -> str:
    """One line: what runs, what was timed, and what was left to the other compiler."""
    left = "".join(f"; left to Inductor: {count} {what}" for what, count in sorted(report.left.items()))
    picks = ", ".join(sorted(map(str, profiler.picks.values())))
    return (
        f"{report}; {profiler.timed} candidates timed in {profiler.seconds:.1f} s; picked: {picks}"
        f"{left}; library of templates compiled before"
    )
