"""Builds and loads the CUDA libraries of reimplemented competitors: one folder of ``csrc`` each, apart from our own kernels.

A library is made like ours (`kernels.build`): nvcc, PyTorch's stable ABI, addressed by the digest of sources, flags and
compiler, so one binary serves torch 2.11 and later and is built where there is no GPU. It is looked for in
``baselines/lib/NAME-TARGET`` inside the package (a machine without nvcc gets it there), then in the user's cache, then built.

``python -m stof_kernels.baselines.native NAME TARGET [FOLDER]`` builds one; with FOLDER it is copied to FOLDER/NAME-TARGET.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stof_kernels import settings
from stof_kernels.kernels.build import TARGETS, BuildError, Target, compiler_version, cuda_target, torch_dir
from stof_kernels.provenance import PACKAGE_ROOT, normalized_source, source_files

CSRC = "baselines/csrc"
MANIFEST = "manifest.json"
_loaded: dict[str, str] = {}
_lock = threading.Lock()


class Missing(BuildError):
    """There is neither a built library nor a compiler; the message is one line that says what to do."""


def sources(name: str) -> tuple[str, ...]:
    """Package-relative files and folders that the library ``name`` is made of, also what its numbers depend on."""
    return (f"{CSRC}/{name}", f"{CSRC}/common")


def units(name: str) -> list[str]:
    """Package-relative translation units: every .cu and .cpp file of the folder."""
    folder = PACKAGE_ROOT / CSRC / name
    found = sorted(path for path in folder.glob("*") if path.suffix in (".cu", ".cpp"))
    if not found:
        known = sorted({path.parent.name for path in (PACKAGE_ROOT / CSRC).glob("*/*.cu")})
        raise BuildError(f"no competitor {name!r} has CUDA sources; known are {', '.join(known)}")
    return [path.relative_to(PACKAGE_ROOT).as_posix() for path in found]


def _target(target: str) -> Target:
    if target not in TARGETS or target == "cpu":
        raise BuildError(f"no CUDA target {target!r}; known are {', '.join(t for t in TARGETS if t != 'cpu')}")
    return TARGETS[target]


def source_digest(name: str, target: str) -> str:
    """Twelve hex digits over sources and flags; needs no compiler. Comments and layout do not count."""
    entry = _target(target)
    parts = [repr((entry.flags, entry.link_flags, units(name))), platform.machine()]
    for path in source_files(sources(name)):
        parts += [path.relative_to(PACKAGE_ROOT).as_posix(), normalized_source(path)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _compiler(target: str) -> tuple[str, str]:
    """nvcc's command and version. Raises BuildError if it does not run."""
    entry = _target(target)
    command = entry.compiler()
    return command, compiler_version(command, entry.install, entry.version_line)


def library_dir(name: str, target: str) -> Path:
    """Folder of the cache that holds, or would hold, the library. Raises BuildError without a compiler."""
    digest = hashlib.sha256(f"{source_digest(name, target)}\0{_compiler(target)[1]}".encode()).hexdigest()[:12]
    return settings.cache_dir() / "lib" / f"{name}-{target}-{digest}"


def library_file(name: str) -> str:
    """Name of the library's file."""
    return f"libstof_{name}.so"


def _matches(folder: Path, name: str, target: str) -> bool:
    """Whether ``folder`` holds a whole library of the present sources."""
    manifest = folder / MANIFEST
    if not (manifest.is_file() and (folder / library_file(name)).is_file()):
        return False
    return json.loads(manifest.read_text(encoding="utf-8")).get("source_digest") == source_digest(name, target)


def find(name: str, target: str) -> Path | None:
    """The library if it exists, in the package or in the cache; None if it must be built."""
    candidates = [PACKAGE_ROOT / "baselines" / "lib" / f"{name}-{target}"]
    try:
        candidates.append(library_dir(name, target))
    except BuildError:
        # Without a compiler its version is unknown: any library of the same sources and flags will do.
        candidates += sorted((settings.cache_dir() / "lib").glob(f"{name}-{target}-*"))
    return next((folder / library_file(name) for folder in candidates if _matches(folder, name, target)), None)


def build(name: str, target: str) -> Path:
    """Path of the library; compiles it if the cache does not have it.

    Raises BuildError. Safe to run from several processes at once and to kill: a library is made aside and renamed when whole.
    """
    folder = library_dir(name, target)
    if _matches(folder, name, target):
        return folder / library_file(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        log = _compile(name, target, aside)
        made_of = {
            "name": name,
            "target": target,
            "source_digest": source_digest(name, target),
            "compiler": _compiler(target)[1],
            "flags": [*_target(target).flags, *_target(target).link_flags],
            "units": units(name),
        }
        (aside / MANIFEST).write_text(json.dumps(made_of, indent=1) + "\n", encoding="utf-8")
        (aside / "build.log").write_text(log, encoding="utf-8")  # registers and spills of every kernel
        if folder.exists():  # another process was faster, or left it damaged
            if _matches(folder, name, target):
                return folder / library_file(name)
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder / library_file(name)


def _compile(name: str, target: str, into: Path) -> str:
    """Compiles and links in ``into``; returns what the compiler printed."""
    entry, torch = _target(target), torch_dir()
    command = shlex.split(_compiler(target)[0])
    # Relative paths and the map keep this machine's folders out of the binary.
    include = [f"-I{CSRC}/{name}", f"-I{CSRC}", "-isystem", str(torch / "include")]
    prefix_map = f"{entry.host_option}-ffile-prefix-map={torch}=torch"

    def compile_one(unit: str) -> tuple[str, str]:
        made = str(into / f"{Path(unit).stem}_{Path(unit).suffix[1:]}.o")
        return made, _run([*command, *entry.flags, *include, prefix_map, "-c", unit, "-o", made], name)

    with ThreadPoolExecutor(settings.max_build_jobs()) as pool:
        done = list(pool.map(compile_one, units(name)))
    objects, logs = [made for made, _ in done], [log for _, log in done]
    # To the host's linker alone: nvcc writes the folders that it is given itself into the binary.
    link = [*command, *objects, "-o", str(into / library_file(name)), f"-Xlinker=-L{torch / 'lib'}", *entry.link_flags]
    logs.append(_run(link, name))
    for made in objects:
        Path(made).unlink()
    return "\n".join(logs)


def _run(command: list[str], name: str) -> str:
    run = subprocess.run(command, cwd=PACKAGE_ROOT, capture_output=True, text=True, check=False)
    said = run.stdout + run.stderr
    if run.returncode:
        print(said, file=sys.stderr)
        first = next((line for line in said.splitlines() if "error" in line), "no message")
        raise BuildError(f"compiling the kernels of {name} failed: {first}")
    return said


def load(name: str, capability: tuple[int, int]) -> None:
    """Makes ``torch.ops.stof_NAME`` available, once per process, for a card of this compute capability.

    Builds the library if there is none, with one line on stderr. Raises `Missing` where that needs a compiler and there is
    none, and BuildError for a card below 8.0 or if it does not compile.
    """
    with _lock:
        if name in _loaded:
            return
        import torch

        target = cuda_target(capability)
        path = find(name, target)
        if path is None:
            try:
                _compiler(target)
            except BuildError:
                raise Missing(
                    f"the {target} library of {name} is not built and there is no nvcc: {_target(target).install}, "
                    f"or copy a built baselines/lib/{name}-{target} here"
                ) from None
            print(f"stof-kernels: compiling {name} for {target}, about 30 s ...", file=sys.stderr, flush=True)
            path = build(name, target)
        torch.ops.load_library(str(path))
        _loaded[name] = target


def main(arguments: list[str]) -> int:
    """Build one library, and copy it to a folder if one is named."""
    if len(arguments) not in (2, 3):
        print("usage: python -m stof_kernels.baselines.native NAME TARGET [FOLDER]", file=sys.stderr)
        return 2
    name, target = arguments[:2]
    try:
        library = build(name, target)
    except BuildError as error:
        print(f"stof-kernels: {error}", file=sys.stderr)
        return 2
    if len(arguments) == 3:
        folder = Path(arguments[2]) / f"{name}-{target}"
        folder.mkdir(parents=True, exist_ok=True)
        for part in (library, library.with_name(MANIFEST)):
            shutil.copy2(part, folder / part.name)
        library = folder / library.name
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
