"""Imports go one way: masks, planner -> kernels -> formats -> ops -> ...; nothing imports the measuring side."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from stof_kernels.provenance import PACKAGE_ROOT

_MEASURED = {"masks", "planner", "kernels", "formats", "ops", "fusion", "integrations", "provenance", "settings"}
ALLOWED = {
    "provenance": set(),
    "settings": set(),
    "masks": set(),
    "planner": set(),
    "kernels": {"masks", "planner", "provenance", "settings"},
    "formats": {"masks", "planner", "kernels"},
    "ops": {"masks", "planner", "kernels", "formats"},
    "fusion": {"masks", "planner", "kernels", "formats", "ops", "provenance", "settings"},
    "integrations": {"masks", "planner", "kernels", "formats", "ops", "fusion", "provenance", "settings"},
    "baselines": _MEASURED,
    "benchmarking": {"baselines", *_MEASURED},
    "figures": {"masks", "baselines", "benchmarking", "provenance"},
}
TORCH_FREE = ["masks", "planner", "baselines", "benchmarking", "figures", "provenance", "settings", "kernels.build"]


def layer_of(module: tuple[str, ...]) -> str:
    return module[0] if module else "__init__"


def imported_layers(path) -> set[str]:
    here = path.relative_to(PACKAGE_ROOT).with_suffix("").parts
    package = here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module or "").split(".")) if node.module else base
            found |= {layer_of(target)} if target and target[0] else {a.name for a in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                parts = name.split(".")
                if parts[0] == "stof_kernels":
                    found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
    return found - {layer_of(here), "__version__"}


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_only_layers_below_it(layer):
    root = PACKAGE_ROOT / layer
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]
    assert files
    for path in files:
        extra = imported_layers(path) - ALLOWED[layer]
        public = {"SparseMask", "sparse_attention", "plan"} if "ops" in ALLOWED[layer] else set()
        assert not extra - public, f"{path.relative_to(PACKAGE_ROOT)} imports {sorted(extra)}"


def test_every_module_belongs_to_a_layer():
    tops = {
        p.stem for p in PACKAGE_ROOT.iterdir() if p.suffix == ".py" or (p.is_dir() and (p / "__init__.py").exists())
    }
    assert tops - {"__init__"} <= set(ALLOWED)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_parts_that_plan_and_plot_do_not_wait_for_torch(module):
    code = f"import sys, stof_kernels.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
