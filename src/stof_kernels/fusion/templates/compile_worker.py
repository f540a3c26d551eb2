"""Compiles one generated Triton kernel, here or in a process of its own; imports nothing but Triton, so that it starts fast.

As a script it answers one JSON task per line of its input with one JSON line: null, or the first line of an error.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any


@lru_cache(maxsize=4096)
def module_at(path: str) -> ModuleType:
    """The module of a generated file."""
    spec = importlib.util.spec_from_file_location(f"stof_kernels_generated_{path.rsplit('_', 1)[-1][:-3]}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(task: dict[str, Any]) -> Any:
    """The compiled kernel of a task, from Triton's disk cache if any process has compiled it before.

    ``path`` is the file, ``signature`` the arguments' types in order ("constexpr" for constants), ``constants`` their values,
    ``aligned`` the positions of pointers and integers that are multiples of 16, ``arch`` the compute capability as in 90.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        module_at(task["path"]).kernel,
        signature={name: kind for name, kind in task["signature"]},
        constexprs=dict(task["constants"]),
        attrs={(i,): [["tt.divisibility", 16]] for i in task["aligned"]},
    )
    options = {"num_warps": task["warps"], "num_stages": task["stages"]}
    if task["overlap"]:
        options["launch_pdl"] = True
    return triton.compile(source, target=GPUTarget("cuda", task["arch"], 32), options=options)


def _prepare(task: dict[str, Any]) -> str | None:
    try:
        kernel = compiled(task)
    except Exception as error:
        return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)[:300]
    try:
        # The launcher is compiled too, by a C compiler, and kept on disk. It needs the driver's library but no device.
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)
    except Exception:
        pass  # then it is compiled where it is used
    return None


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a compiler prints is no answer
    import triton  # noqa: F401  (so that the first task does not wait for it)

    for line in sys.stdin:
        print(json.dumps(_prepare(json.loads(line))), file=answers, flush=True)
