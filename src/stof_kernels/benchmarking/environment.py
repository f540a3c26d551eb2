"""The machine and software that a number was measured on, without anything that names a host, a user or a path."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from stof_kernels import settings
from stof_kernels.provenance import REPOSITORY_ROOT

_PACKAGES = ("torch", "triton", "stof-kernels", "flash-attn-4")
_SMI_FIELDS = ("name", "driver_version", "power.limit", "clocks.max.sm", "clocks.sm", "clocks.mem", "memory.total")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter, without importing them."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: str) -> dict[str, Any]:
    """What runs the numbers: GPU (as the driver reports it, with clocks in MHz and power limit in W) or CPU, and threads."""
    return _gpu() if device == "cuda" else _cpu()


def one_assembler() -> None:
    """Let this process and Inductor's workers take the same ptxas: torch's own, as the workers do; a set path is kept.

    Its version is part of Triton's key of a compiled kernel. A process that asks Triton for it before the path is set keeps
    that of Triton's ptxas, so under torch 2.11 it finds nothing of what the workers compiled: max-autotune compiles each
    candidate again, one after the other, while the device falls idle (on an H200 105 s instead of 29, and a slower pick).

    It is also the sounder one there: Triton 3.6's ptxas, 12.8.93, makes some kernels of two wgmma products without a loop add
    the second one's descriptor to a uniform register that nothing has written, which reads shared memory out of bounds.
    """
    import torch

    ptxas = Path(torch.__file__).parent / "bin" / "ptxas"
    if os.access(ptxas, os.X_OK):
        settings.name_ptxas(ptxas)


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "device": "cpu",
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found: dict[str, Any] = {
        "device": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    smi = _smi(str(properties.uuid) if hasattr(properties, "uuid") else "0")
    return found | {name.replace(".", "_"): value for name, value in smi.items() if name != "name"}


def arch(machine: dict[str, Any]) -> str:
    """The build target of a GPU: ``sm_89``, from 9.0 on with the suffix of the architecture's own instructions."""
    major, _, minor = machine.get("capability", "").partition(".")
    return f"sm_{major}{minor}{'a' if major.isdigit() and int(major) >= 9 else ''}"


def _smi(which: str) -> dict[str, str]:
    """The driver's view of one GPU; empty where nvidia-smi is missing or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return {}
    which = which if which.isdigit() or which.startswith("GPU-") else f"GPU-{which}"
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.strip().split(",")]
    return dict(zip(_SMI_FIELDS, values, strict=True)) if len(values) == len(_SMI_FIELDS) else {}


def git_commit() -> str | None:
    """The checkout's commit; None where its tracked files are changed or this is no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY_ROOT:
            return None  # installed inside some other repository
        return None if git("status", "--porcelain", "--untracked-files=no") else git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def new_run() -> dict[str, str]:
    """Anonymous id and UTC date of a run that starts now."""
    return {"run_id": uuid.uuid4().hex[:12], "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}
