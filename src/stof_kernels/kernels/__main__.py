"""``python -m stof_kernels.kernels TARGET ... | all``: compile targets anew and report registers and spills of every kernel.

Exits with 1 if an attention kernel spills registers or the assembler takes a warpgroup's products apart, with 2 if something
does not compile.
"""

from __future__ import annotations

import re
import sys
import time

from .build import TARGETS, BuildError, build, build_log

_KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SERIALIZED = re.compile(r"\((C75\d\d)\).*wgmma.*in the function '(\S+)'")


def report(log: str) -> list[tuple[str, str, int, int]]:
    """(kernel, architecture, registers, bytes spilled) of each kernel in the assembler's verbose output."""
    found, name, arch, spilled = [], "", "", 0
    for line in log.splitlines():
        if entry := _KERNEL.search(line):
            name, arch, spilled = entry[1], entry[2], 0
        elif spill := _SPILL.search(line):
            spilled = int(spill[1]) + int(spill[2])
        elif (used := _REGISTERS.search(line)) and name:
            found.append((name, arch, int(used[1]), spilled))
            name = ""
    return found


def serialized(log: str) -> list[tuple[str, str]]:
    """(kernel, the assembler's message number) of each kernel whose wgmma products it makes wait for each other."""
    return [(found[2], found[1]) for found in map(_SERIALIZED.search, log.splitlines()) if found]


def compile_target(target: str) -> int:
    """Build one target from nothing and print what came of it; returns how many attention kernels spill, and how often the
    assembler says that it takes products apart."""
    start = time.monotonic()
    build(target, progress=lambda line: print(line, flush=True), force=True)
    log = build_log(target).read_text(encoding="utf-8")
    kernels, apart = report(log), serialized(log)
    attention = [k for k in kernels if re.search("block_wise|row_wise|hopper", k[0])]
    spilling = [k for k in attention if k[3]]
    for name, arch, registers, spilled in spilling:
        print(f"{target}: {name} ({arch}) spills {spilled} bytes with {registers} registers")
    for name, message in apart:
        print(f"{target}: products of {name} wait for each other ({message})")
    most = max((k[2] for k in attention), default=0)
    print(
        f"{target}: {time.monotonic() - start:.0f} s, {len(kernels)} CUDA kernels, {len(attention)} of attention with at most "
        f"{most} registers, {len(spilling)} of them spill",
        flush=True,
    )
    return len(spilling) + len(apart)


def main(names: list[str]) -> int:
    """Compile the named targets; ``all`` is every CUDA target."""
    targets = [t for t in TARGETS if t != "cpu"] if names == ["all"] else names
    if not targets:
        print(f"usage: python -m stof_kernels.kernels TARGET ... | all; targets: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    try:
        return 1 if sum([compile_target(target) for target in targets]) else 0
    except BuildError as error:
        print(f"stof-kernels: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
