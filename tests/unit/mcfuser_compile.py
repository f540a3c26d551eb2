"""Compile generated kernels of MCFuser for a compute capability and print what their code contains; needs no card.

Usage: mcfuser_compile.py CAPABILITY STEP EXPRESSION TILES WARPS STAGES, tiles as 128x64x64x64, without Triton's interpreter.
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stof_kernels.baselines.mcfuser_planner.chain import Tiles, attention_chain
from stof_kernels.baselines.mcfuser_planner.codegen import Layout
from stof_kernels.baselines.mcfuser_planner.expressions import parse
from stof_kernels.baselines.mcfuser_planner.kernels import Kernel
from stof_kernels.baselines.mcfuser_planner.pruning import Candidate

capability, step, expression, tiles, warps, stages = sys.argv[1:]
chain = attention_chain(2, 12, 1024, 1024, 64, step=step)
heads = (12 * 1024 * 64, 1024 * 64, 64, 1)
strides = (("A", heads), ("B", (*heads[:2], 1, 64)), ("M", (0, 0, 1024, 1)), ("D", heads), ("E", heads))
candidate = Candidate(parse(expression), Tiles(*map(int, tiles.split("x"))), chain)
function = Kernel(candidate, Layout(strides, 12, 1, 0.125)).function
names = function.arg_names
aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(names))}
source = ASTSource(function, dict.fromkeys(names, "*fp16"), {}, aligned)
options = {"num_warps": int(warps), "num_stages": int(stages)}
compiled = triton.compile(source, target=GPUTarget("cuda", int(capability), 32), options=options)
ptx = compiled.asm["ptx"]
marks = ("mma.sync", "wgmma", "cp.async", "ld.global.v4", "st.global.v4", "ex2.approx")
print(compiled.metadata.shared, *(mark for mark in marks if mark in ptx))
