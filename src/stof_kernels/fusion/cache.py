"""Plans on disk, by everything that they depend on. Writers replace whole files; a damaged file is as good as none."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import provenance, settings
from .graph import OpGraph
from .plan import FusionPlan
from .repeats import op_key

_FORMAT = 1


def dependencies(graph: OpGraph, search: dict[str, Any]) -> dict[str, Any]:
    """What a plan is valid for: the graph's structure, the device, the code, the versions and the search's settings."""
    device = next(
        (n.meta["val"].device for op in graph.ops for n in op.outputs if isinstance(n.meta.get("val"), torch.Tensor)),
        torch.device("cpu"),
    )
    structure = hashlib.sha256("\n".join(op_key(op, graph) for op in graph.ops).encode()).hexdigest()
    return {
        "format": _FORMAT,
        "graph": structure,
        "dataflow": hashlib.sha256(_dataflow(graph).encode()).hexdigest(),
        "device": _device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "code": _code(),
        "search": search,
    }


def _dataflow(graph: OpGraph) -> str:
    """Which operator reads which."""
    producer = graph.producer_index()
    return ";".join(",".join(str(producer.get(node, "-")) for node in op.inputs) for op in graph.ops)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@lru_cache(maxsize=1)
def _code() -> str:
    return provenance.code_digest(["fusion"])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def path_of(depends: dict[str, Any]) -> Path:
    """The file of a plan with these dependencies."""
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]
    return settings.cache_dir() / "plans" / f"{digest}.json"


def load(depends: dict[str, Any]) -> FusionPlan | None:
    """The cached plan, or None where there is none or its file is damaged, foreign or of other dependencies."""
    try:
        text = path_of(depends).read_text(encoding="utf-8")
        data = json.loads(text)
        if data["depends"] != json.loads(json.dumps(depends)) or data["checksum"] != _checksum(data["plan"]):
            return None
        return FusionPlan.from_json(data["plan"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store(depends: dict[str, Any], plan: FusionPlan) -> None:
    """Write a plan, whole or not at all; where the folder cannot be written the plan is just not kept."""
    path, data = path_of(depends), json.loads(json.dumps(plan.to_json()))
    text = json.dumps({"depends": depends, "checksum": _checksum(data), "plan": data}, indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError:
        return


def _checksum(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
