"""Compiles one generated Triton kernel, here or in a process of its own; imports nothing but Triton, so that it starts fast.

As a script, called with the folder of Triton's cache, it answers one JSON task per line of its input with one JSON line: the
kernel's name in that cache, or an error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

stored: dict[str, str] = {}
"""Names in Triton's cache of kernels that other processes have compiled, by their task as JSON."""


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
    if (found := _found(source, stored.get(json.dumps(task), ""))) is not None:
        return found
    options = {"num_warps": task["warps"], "num_stages": task["stages"]}
    if task["overlap"]:
        options["launch_pdl"] = True
    return triton.compile(source, target=GPUTarget("cuda", task["arch"], 32), options=options)


def _found(source: Any, name: str) -> Any:
    """What another process has put into Triton's cache under this name, or None.

    Asking by the source instead would compile it again wherever the two processes' settings differ in anything that Triton
    counts in, such as paths that PyTorch sets in the process that uses it.
    """
    from triton.compiler import CompiledKernel
    from triton.runtime.cache import get_cache_manager

    group = get_cache_manager(name).get_group(f"{source.name[:150]}.json") if name else None
    return CompiledKernel(source, group, name) if group else None


def _prepare(task: dict[str, Any]) -> dict[str, str]:
    try:
        kernel = compiled(task)
    except Exception as error:
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        return {"error": last[:300]}
    try:
        # The launcher is compiled too, by a C compiler, and kept on disk. It needs the driver's library but no device.
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)
    except Exception:
        pass  # then it is compiled where it is used
    return {"name": kernel.hash}


if __name__ == "__main__":
    # What compilers print is no answer, and what lies beside this file hides no module.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    import triton  # here, so that the first task does not wait for it

    triton.knobs.cache.dir = sys.argv[1]
    for line in sys.stdin:
        print(json.dumps(_prepare(json.loads(line))), file=answers, flush=True)
