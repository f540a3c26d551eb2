"""Where a number comes from: digests of the code that produced it and the environment it ran in.

This module imports nothing else of the package, so that every layer may use it.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parent
REPOSITORY_ROOT = PACKAGE_ROOT.parent.parent

_C_SUFFIXES = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"}
# A string or character literal is kept as it is; a comment becomes one space.
_C_TOKENS = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|//[^\n]*|/\*.*?\*/', re.DOTALL)


def normalized_source(path: Path) -> str:
    """Text of a source file without what cannot change its behaviour: comments, layout and docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tree = ast.parse(text, filename=str(path))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                _drop_docstring(node)
        return _canonical(tree)
    if path.suffix in _C_SUFFIXES:
        bare = _C_TOKENS.sub(lambda m: " " if m.group().startswith(("//", "/*")) else m.group(), text)
        # Preprocessor lines end at their newline, so only runs of blanks inside a line are folded.
        lines = (" ".join(line.split()) for line in bare.splitlines())
        return "\n".join(line for line in lines if line)
    return text


def _drop_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        node.body = node.body[1:] or [ast.Pass()]


def _canonical(node: object) -> str:
    """A syntax tree as text that is the same under every Python version: fields that hold nothing are left out.

    `ast.dump` writes them, and each version has some that the others lack.
    """
    if isinstance(node, ast.AST):
        fields = ((name, getattr(node, name, None)) for name in node._fields)
        held = [f"{name}={_canonical(value)}" for name, value in fields if value is not None and value != []]
        return f"{type(node).__name__}({','.join(held)})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return repr(node)


def source_files(names: Iterable[str]) -> list[Path]:
    """Files behind package-relative names: a module ``benchmarking/timing.py`` or a folder ``masks``."""
    found: set[Path] = set()
    for name in names:
        path = PACKAGE_ROOT / name
        if path.is_dir():
            found.update(p for p in path.rglob("*") if p.suffix in _C_SUFFIXES | {".py"})
        elif path.is_file():
            found.add(path)
        else:
            raise FileNotFoundError(f"code digest: {name!r} is neither a file nor a folder of {PACKAGE_ROOT.name}")
    return sorted(found)


def code_digest(names: Iterable[str]) -> str:
    """Twelve hex digits over the normalized sources named by package-relative files or folders.

    A comment, docstring or layout edit leaves the digest as it is; any other edit changes it.
    """
    digest = hashlib.sha256()
    for path in source_files(names):
        digest.update(path.relative_to(PACKAGE_ROOT).as_posix().encode())
        digest.update(b"\0")
        digest.update(normalized_source(path).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:12]
