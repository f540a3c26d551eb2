"""Generated kernels as modules: Triton reads a kernel's source from a file, so each text is a file in the cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from functools import lru_cache
from types import ModuleType

from ... import settings
from .rows import HELPERS

_HEAD = "import triton\nimport triton.language as tl\n\n"


@lru_cache(maxsize=4096)
def load(source: str) -> ModuleType:
    """The module of a generated kernel, written once per text and whole at once, so that writers cannot disturb readers."""
    text = f"{_HEAD}{HELPERS}\n\n{source}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:20]
    folder = settings.cache_dir() / "triton"
    path = folder / f"k_{digest}.py"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    spec = importlib.util.spec_from_file_location(f"stof_kernels_generated_{digest}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
