"""Compiles the kernels, once per digest of sources, flags and compiler, into the user's cache.

Importing this module and asking for a digest needs neither torch nor a GPU. The library uses PyTorch's stable ABI only,
so the digest says nothing about the torch version: one binary serves torch 2.11 and later under any Python.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import settings
from ..provenance import PACKAGE_ROOT, normalized_source, source_files
from . import instances

CSRC = "kernels/csrc"  # relative to the package
LIBRARY = "libstof.so"
MANIFEST = "manifest.json"


class BuildError(RuntimeError):
    """The kernels could not be built; the message is one line that says what to do."""


@dataclass(frozen=True)
class Unit:
    """One object file: a source below ``csrc`` with flags of its own; ``name`` tells several from one source apart."""

    source: str
    name: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What a library is built from, and with what.

    ``sources`` are the files and folders below ``csrc`` that its compilation sees and its digest covers. ``compiler``
    returns the command and reads the environment when called; ``install`` says how to get that compiler.
    """

    compiler: Callable[[], str]
    install: str
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    units: tuple[Unit, ...]
    sources: tuple[str, ...]
    seconds: int  # a rough duration for the line of progress
    generated: Callable[[], dict[str, str]] = dict  # further sources: name below csrc/generated -> text
    host_option: str = ""  # what the compiler wants before an option of the host compiler
    version_line: int = 0  # which line of its --version tells versions apart


def _instruction_sets() -> tuple[Unit, ...]:
    """The CPU kernels, once per instruction set; the library picks one when it is loaded."""
    source = "attention/cpu/variant.cpp"
    flags = {"baseline": ()}
    if platform.machine().lower() in {"x86_64", "amd64"}:
        flags["avx2"] = ("-mavx2", "-mfma", "-mbmi")
        flags["avx512"] = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mbmi")
    return tuple(Unit(source, f"variant_{name}", (f"-DSTOF_ISA={name}", *extra)) for name, extra in flags.items())


_CPU_BINDINGS = ("bindings/library.cpp", "bindings/attention_cpu.cpp", "bindings/build_cells_cpu.cpp")

# The oldest torch that the binary must load into.
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"

TARGETS: dict[str, Target] = {
    "cpu": Target(
        compiler=settings.cxx,
        install="install a C++17 compiler (Debian and Ubuntu: apt install g++) or name one in CXX",
        flags=(
            *("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", _STABLE_ABI),
            # a * b + c may become one instruction; nothing else about floating point is relaxed.
            *("-ffp-contract=fast", "-fno-math-errno"),
        ),
        link_flags=("-shared", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"),
        units=(
            *(Unit(source, Path(source).stem) for source in _CPU_BINDINGS),
            Unit("attention/cpu/driver.cpp", "driver"),
            Unit("format/cpu/build_cells.cpp", "build_cells"),
            *_instruction_sets(),
        ),
        sources=("attention/cpu", "format/cpu", "bindings/check.h", *_CPU_BINDINGS),
        seconds=15,
    ),
}


def nvcc() -> str:
    """CUDA compiler: of CUDA_HOME, on PATH, or of the ``nvidia-cuda-nvcc`` wheel; plain ``nvcc`` if there is none."""
    home = settings.cuda_home()
    if home is not None:
        return shlex.quote(str(home / "bin" / "nvcc"))
    found = shutil.which("nvcc")
    if found is None:
        spec = importlib.util.find_spec("nvidia")
        folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
        found = next((str(p) for folder in folders for p in sorted(Path(folder).glob("*/bin/nvcc"))), None)
    return shlex.quote(found) if found else "nvcc"


_CUDA_BINDINGS = ("bindings/attention_cuda.cpp", "bindings/format_cuda.cpp")
_CUDA_SOURCES = (
    *("attention/cuda/dispatch.cpp", "attention/cuda/combine.cu", "attention/cuda/row_wise.cu"),
    *(f"format/cuda/{name}.cu" for name in ("build_cells", "build_blocks", "build_layout", "schedule")),
)


def _cuda(architecture: str, code: tuple[str, ...], *more_flags: str) -> Target:
    sources = functools.partial(instances.sources, architecture)
    return Target(
        compiler=nvcc,
        install="install the CUDA toolkit, pip install nvidia-cuda-nvcc nvidia-cuda-runtime, or set CUDA_HOME",
        flags=(
            *("-std=c++17", "-O3", "-DUSE_CUDA", _STABLE_ABI, "-Xcompiler=-fPIC,-fvisibility=hidden"),
            "-Xptxas=-v",  # registers and spills, for the log
            *(f"-gencode=arch={virtual},code={real}" for virtual, real in (pair.split(":") for pair in code)),
            *more_flags,
        ),
        # The runtime is linked in: the process may hold another one. -lcuda is not needed.
        link_flags=("-shared", "-cudart=static", "-Xlinker=--no-as-needed", "-ltorch"),
        units=(
            *(Unit(source, Path(source).stem) for source in (*_CUDA_SOURCES, *_CUDA_BINDINGS)),
            *((Unit("attention/cuda/hopper_maps.cu", "hopper_maps"),) if architecture == "sm_90a" else ()),
            *(Unit(f"generated/{name}", Path(name).stem) for name in sources()),
        ),
        sources=("attention/cuda", "format/cuda", "bindings/check.h", "bindings/cuda_common.h", *_CUDA_BINDINGS),
        seconds=60,
        generated=sources,
        host_option="-Xcompiler=",
        version_line=-1,
    )


TARGETS |= {
    # The oldest also carries its portable form, which the driver compiles for cards that are in no table.
    "sm_80": _cuda("sm_80", ("compute_80:sm_80", "compute_80:compute_80")),
    "sm_89": _cuda("sm_89", ("compute_89:sm_89",)),
    "sm_90a": _cuda("sm_90a", ("compute_90a:sm_90a",), "-DSTOF_HOPPER_TARGET"),
}


def cuda_target(capability: tuple[int, int]) -> str:
    """The target for a card of this compute capability. Raises BuildError below 8.0."""
    if capability < (8, 0):
        raise BuildError(
            f"the CUDA kernels need compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
        )
    return {(8, 9): "sm_89", (9, 0): "sm_90a"}.get(tuple(capability), "sm_80")


def target_of(name: str) -> Target:
    """The target's table entry, or a BuildError that names the known ones."""
    try:
        return TARGETS[name]
    except KeyError:
        raise BuildError(f"no build target {name!r}; known are {', '.join(TARGETS)}") from None


@functools.cache
def compiler_version(command: str, install: str, line: int = 0) -> str:
    """What the compiler says about itself, in the given line, and (where it can say so) the machine it compiles for."""
    said = []
    for question in ("--version", "-dumpmachine") if line == 0 else ("--version",):
        try:
            run = subprocess.run([*shlex.split(command), question], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
            reason = "not found" if isinstance(error, FileNotFoundError) else "does not run"
            raise BuildError(f"building the kernels: compiler {command!r} {reason}; {install}") from None
        said.append(run.stdout.splitlines()[line].strip() if run.stdout else "")
    return ", ".join(said)


def _sources(target: Target) -> list[Path]:
    return source_files(f"{CSRC}/{name}" for name in target.sources)


def source_digest(name: str) -> str:
    """Twelve hex digits over sources and flags; needs no compiler. Comments and layout do not count."""
    target = target_of(name)
    parts = [repr((target.flags, target.link_flags, target.units)), platform.machine()]
    for path in _sources(target):
        parts += [path.relative_to(PACKAGE_ROOT).as_posix(), normalized_source(path)]
    for item in sorted(target.generated().items()):
        parts += item
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def digest(target: str = "cpu") -> str:
    """Twelve hex digits that name the library of ``target``: its sources, flags and compiler version."""
    entry = target_of(target)
    version = compiler_version(entry.compiler(), entry.install, entry.version_line)
    return hashlib.sha256(f"{source_digest(target)}\0{version}".encode()).hexdigest()[:12]


def manifest(target: str = "cpu") -> dict[str, object]:
    """What the library of ``target`` is made of: digests, compiler, flags, sources; no path of this machine."""
    entry = target_of(target)
    return {
        "target": target,
        "digest": digest(target),
        "source_digest": source_digest(target),
        "compiler": compiler_version(entry.compiler(), entry.install, entry.version_line),
        "flags": [*entry.flags, *entry.link_flags],
        "units": {unit.name: [unit.source, *unit.flags] for unit in entry.units},
        "sources": [path.relative_to(PACKAGE_ROOT).as_posix() for path in _sources(entry)],
    }


def library_dir(target: str = "cpu") -> Path:
    """Folder of the cache that holds, or would hold, the library of ``target``."""
    return settings.cache_dir() / "lib" / f"{target}-{digest(target)}"


def _work_dir(target: str) -> Path:
    """Folder that keeps the staged sources and object files of ``target`` from one build to the next."""
    return settings.cache_dir() / "work" / target


def build_log(target: str) -> Path:
    """What the compiler printed when ``target`` was last compiled."""
    return _work_dir(target) / "build.log"


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds a whole library. It is renamed into place as a whole, so this only guards deletions."""
    return (folder / LIBRARY).is_file() and (folder / MANIFEST).is_file()


def build(target: str = "cpu", *, progress: Callable[[str], object] = print, force: bool = False) -> Path:
    """Path of the library of ``target``; compiles it if the cache does not have it.

    ``progress`` receives one line if anything is compiled. ``force`` compiles everything anew. Safe to call
    from several processes at once, and to kill at any time. Raises BuildError.
    """
    folder = library_dir(target)
    if is_complete(folder) and not force:
        return folder / LIBRARY
    with _lock(settings.cache_dir() / "work" / f"{target}.lock") as lock:
        if force or not is_complete(folder):  # another process may have built it while this one waited
            progress(f"stof-kernels: compiling the {target} kernels, about {target_of(target).seconds} s ...")
            if force:
                shutil.rmtree(_work_dir(target), ignore_errors=True)
            _compile(target, folder, lock)
    return folder / LIBRARY


@contextmanager
def _lock(path: Path) -> Iterator[int]:
    """Holds an advisory lock and yields its descriptor; the system drops the lock when its last holder dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    except OSError as error:
        raise BuildError(
            f"building the kernels: the cache {settings.cache_dir()} cannot be written ({error.strerror}); "
            "name another folder in STOF_CACHE_DIR"
        ) from None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def _compile(target: str, folder: Path, lock: int) -> None:
    work = _work_dir(target)
    _stage(target_of(target), work / "csrc")
    (work / "build.ninja").write_text(_ninja_file(target), encoding="utf-8")
    _run_ninja(target, work, lock)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{target}-*.tmp"):  # of a builder that was killed: we hold the lock
        shutil.rmtree(leftover)
    aside = folder.parent / f".{folder.name}.tmp"
    aside.mkdir()
    shutil.copy2(work / LIBRARY, aside / LIBRARY)
    (aside / MANIFEST).write_text(json.dumps(manifest(target), indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        # Processes that have the old file open keep it; the name is free for a moment only.
        folder.rename(aside.parent / f".{folder.name}.old.tmp")
    aside.rename(folder)
    shutil.rmtree(aside.parent / f".{folder.name}.old.tmp", ignore_errors=True)


def _stage(target: Target, to: Path) -> None:
    """Copies the target's sources, touching only files whose content changed.

    ninja judges by time stamps; those of an installed package or a git checkout say nothing about content. Relative
    paths also keep the machine's folders out of the binary.
    """
    root = PACKAGE_ROOT / CSRC
    wanted = {path.relative_to(root): path.read_bytes() for path in _sources(target)}
    wanted |= {Path("generated") / name: text.encode() for name, text in target.generated().items()}
    for old in [path for path in to.rglob("*") if path.is_file()]:
        if old.relative_to(to) not in wanted:
            old.unlink()
    for name, content in wanted.items():
        copy = to / name
        if not copy.is_file() or copy.read_bytes() != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)


def _ninja_file(target: str) -> str:
    entry = target_of(target)
    torch = torch_dir()
    compiler = entry.compiler()
    # Torch's headers name themselves in error messages; the map keeps this machine's folder out of the binary.
    prefix_map = f"{entry.host_option}-ffile-prefix-map={shlex.quote(str(torch))}=torch"
    common = f"-Icsrc -isystem {shlex.quote(str(torch / 'include'))} {prefix_map}"
    # Past nvcc, which would write the folder into the library.
    linker = "-Xlinker=" if entry.host_option else ""
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compiler} {shlex.join(entry.flags)} $flags {common} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {compiler} $in -o $out {linker}-L{shlex.quote(str(torch / 'lib'))} {shlex.join(entry.link_flags)}",
        "  description = $out",
    ]
    for unit in entry.units:
        lines += [f"build obj/{unit.name}.o: compile csrc/{unit.source}", f"  flags = {shlex.join(unit.flags)}"]
    objects = " ".join(f"obj/{unit.name}.o" for unit in entry.units)
    lines += [f"build {LIBRARY}: link {objects}", f"default {LIBRARY}", ""]
    return "\n".join(lines)


def _run_ninja(target: str, work: Path, lock: int) -> None:
    log = build_log(target)
    command = [ninja(), "-C", str(work), "-j", str(settings.max_build_jobs()), "-v"]
    with log.open("w", encoding="utf-8") as out:
        # ninja holds the lock too: if this process is killed, the next builder waits until its compilers are done.
        run = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False, pass_fds=(lock,))
    if run.returncode:
        raise BuildError(f"compiling the {target} kernels failed; the compiler's output is in {log}")


def torch_dir() -> Path:
    """Folder of the installed torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("building the kernels: torch is not installed in this Python; pip install 'torch>=2.11'")
    return Path(next(iter(spec.submodule_search_locations)))


def ninja() -> str:
    """The ninja program: beside this Python (the ``ninja`` package puts it there), or on PATH."""
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("ninja")
    if found is None:
        raise BuildError("building the kernels: 'ninja' not found; pip install ninja")
    return found
