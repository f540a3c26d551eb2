"""Compile SPLAT's kernels, no card needed: ``splat_compile.py KERNELS.py CAPABILITY FLAG=VALUE...`` prints what the code uses.

A process of its own, because Triton decides at its first import whether it compiles or interprets.
"""

from __future__ import annotations

import importlib.util
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FLAGS = {"MAPPED": 0, "STRIDED": 0, "FROM_ZERO": 0, "GROUPED": 0, "PIECES": 1, "SIMT": 0, "D": 64, "BD": 64}
HALF = {"q_ptr", "k_ptr", "v_ptr", "values_ptr", "probs_ptr", "scores_ptr", "out_ptr"}


def ptx(kernel, warps: int, capability: int, **constants: int) -> str:
    names = kernel.arg_names
    known = {n: v for n, v in (FLAGS | constants).items() if n in names}
    kinds = {
        n: "constexpr" if n in known else "*fp16" if n in HALF else "*i32" if n.endswith("_ptr") else "i32"
        for n in names
    }
    kinds |= {"scale": "fp32"} if "scale" in names else {}
    places = {(names.index(n),): v for n, v in known.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    source = ASTSource(kernel, kinds, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["ptx"]


def main(path: str, capability: str, *flags: str) -> None:
    spec = importlib.util.spec_from_file_location("kernels", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    given = {name: int(value) for name, value in (flag.split("=") for flag in flags)}
    found = {
        "sddmm": ptx(
            kernels.sddmm, 2, int(capability), BM=64, BN=64, ALIGN=16 if given.get("FROM_ZERO") else 1, **given
        ),
        "softmax": ptx(kernels.softmax, 4, int(capability), BM=1, BN=1024, **given),
        "spmm": ptx(kernels.spmm, 2, int(capability), BM=64, BK=64, **given),
    }
    for name, text in found.items():
        for mark in ("mma.sync", "wgmma", "st.global.v4", "cp.async.cg"):
            if mark in text:
                print(f"{name}:{mark}")


main(*sys.argv[1:])
