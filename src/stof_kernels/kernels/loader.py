"""Finds, or builds, the library and loads it into this process."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from .. import settings
from .build import LIBRARY, MANIFEST, BuildError, build, is_complete, library_dir, source_digest

_loaded: dict[str, Path] = {}
_lock = threading.Lock()


def find(target: str = "cpu") -> Path | None:
    """The library of ``target`` if it exists: in the package, then in the cache. None if it must be built."""
    packaged = Path(__file__).parent / "lib" / target
    if _matches(packaged, target):
        return packaged / LIBRARY
    try:
        folder = library_dir(target)
    except BuildError:
        # Without a compiler its version is unknown: any library of the same sources and flags will do.
        candidates = sorted((settings.cache_dir() / "lib").glob(f"{target}-*"))
        return next((folder / LIBRARY for folder in candidates if _matches(folder, target)), None)
    return folder / LIBRARY if is_complete(folder) else None


def _matches(folder: Path, target: str) -> bool:
    """Whether ``folder`` holds a whole library of the present sources."""
    if not is_complete(folder):
        return False
    made_of = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return made_of.get("source_digest") == source_digest(target)


def load(target: str = "cpu") -> Path:
    """Loads the library of ``target`` once per process and returns its path; builds it if there is none.

    The first build prints one line to stderr. Raises BuildError.
    """
    with _lock:
        if target not in _loaded:
            import torch

            path = find(target) or build(target, progress=lambda line: print(line, file=sys.stderr, flush=True))
            torch.ops.load_library(str(path))
            _loaded[target] = path
        return _loaded[target]
