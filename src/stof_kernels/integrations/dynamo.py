"""``torch.compile(model, backend="stof")``: the fusion engine behind PyTorch's own front door.

from stof_kernels.integrations import dynamo
dynamo.register()                                 # an installed package registers itself through its entry point
fast = torch.compile(model, backend="stof", dynamic=False)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor, fx

from ..fusion import SearchSettings, compile_graph

NAME = "stof"


def backend(
    graph_module: fx.GraphModule, example_inputs: list[Tensor], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend function; ``options`` are those of `SearchSettings` (``torch.compile(..., options={"budget_s": 10})``).

    Raises ValueError for an unknown option.
    """
    allowed = [f.name for f in fields(SearchSettings)]
    for name in options or {}:
        if name not in allowed:
            raise ValueError(f'backend="stof": option {name!r} is unknown, allowed: {", ".join(allowed)}')
    return compile_graph(graph_module, example_inputs, **(options or {}))


def register() -> None:
    """Make the name known to torch.compile in this process; calling it again does no harm."""
    import torch._dynamo

    if NAME not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(name=NAME, compiler_fn=backend)
