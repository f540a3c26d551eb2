"""Which GPUs an experiment is about, and where the numbers of each come from: measured here or recorded before.

Resolved once per run, by the process that plans it, without torch. Jobs that a cluster runs elsewhere get the decision handed
over (`hand_over`, `handed_over`), because what is present on their machine may differ.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MEASURED, RECORDED = "measured", "recorded"
GPU_SOURCES = ("auto", "measure", "recorded")
HANDOVER_VARIABLE = "STOF_RESOLVED_TARGETS"
"""Environment variable between the planning process and its jobs on other machines; not a user setting."""

# CUdevice_attribute of the CUDA driver API.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


class TargetError(ValueError):
    """A GPU or source that cannot be had. The message is one line: what was asked, what is allowed."""


@dataclass(frozen=True)
class Device:
    """A CUDA device as its driver describes it; ``capability`` is (major, minor)."""

    name: str
    capability: tuple[int, int]

    @property
    def arch(self) -> str:
        """Compiler target, ``sm_89`` for example; from 9.0 on with the suffix of the architecture's own instructions."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    @property
    def short_name(self) -> str:
        """Name for paths and rows: ``NVIDIA GeForce RTX 4070 Ti`` gives ``rtx_4070_ti``."""
        words = [w for w in re.split(r"[^a-z0-9]+", self.name.lower()) if w not in ("", "nvidia", "geforce")]
        return "_".join(words) or "cuda"


@dataclass(frozen=True)
class Target:
    """One GPU (or the CPU) of the experiment; ``why`` says how ``source`` was decided."""

    name: str
    label: str
    source: str  # MEASURED or RECORDED
    device: str  # cuda or cpu
    arch: str  # what the extension is built for: sm_89, ... or cpu
    present: bool
    why: str

    def __str__(self) -> str:
        return f"gpu {self.name}: {self.why}"


@functools.cache
def present_device() -> Device | None:
    """The first CUDA device that the driver shows (CUDA_VISIBLE_DEVICES applies), or None."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), 0) or driver.cuDeviceGetName(name, 256, handle):
        return None
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle):
            return None
        capability.append(value.value)
    return Device(name.value.decode(), (capability[0], capability[1]))


def gpu_names(gpu: object) -> list[str]:
    """The config's ``gpu`` as names: a name, a number, a comma list or a list of these gives lower-case strings, each once."""
    parts = gpu if isinstance(gpu, (list, tuple)) else [gpu]
    names: list[str] = []
    for part in parts:
        if not isinstance(part, (str, int)) or isinstance(part, bool):
            raise TargetError(f"config gpu: got {gpu!r}, allowed: a name, a number, or a list of them")
        names += [name.strip().lower() for name in str(part).split(",") if name.strip()]
    if not names:
        raise TargetError(f"config gpu: got {gpu!r}, which names no GPU")
    return list(dict.fromkeys(names))


def resolve(
    gpu: object,
    source: str,
    gpus: Mapping[str, Mapping[str, str]],
    *,
    device: Device | None = None,
    elsewhere: bool = False,
) -> list[Target]:
    """One Target per configured GPU, in the config's order.

    gpu, source, gpus: the config's keys. device: the CUDA device that is here, from `present_device`. elsewhere: jobs run on
    other machines, so that ``source: measure`` is checked by each job instead. TargetError for an unknown name, and for
    ``measure`` on hardware that is not here.
    """
    if source not in GPU_SOURCES:
        raise TargetError(f"config source: got {source!r}, allowed: {', '.join(GPU_SOURCES)}")
    here = _name_of(device, gpus) if device else None
    table = dict(gpus)
    if device and here not in table:
        table[here] = {"label": device.name, "device": "cuda", "arch": device.arch}
    targets: dict[str, Target] = {}
    for asked in gpu_names(gpu):
        name = (here or "cpu") if asked == "auto" else asked
        if name not in table:
            raise TargetError(f"config gpu: {asked!r} is unknown, allowed: {', '.join(['auto', *table])}")
        present = table[name]["device"] == "cpu" or name == here
        targets[name] = _target(name, table[name], source, present, device, elsewhere)
    return list(targets.values())


def _name_of(device: Device, gpus: Mapping[str, Mapping[str, str]]) -> str:
    for name, entry in gpus.items():
        if entry["device"] == "cuda" and re.search(entry["match"], device.name):
            return name
    made = device.short_name
    return f"{made}_other" if made in gpus else made  # a table entry of that name says that it is another card


def _target(
    name: str, entry: Mapping[str, str], source: str, present: bool, device: Device | None, elsewhere: bool
) -> Target:
    found = f"this machine has {device.name}" if device else "this machine has no CUDA device"
    where = "this is the CPU of this machine" if entry["device"] == "cpu" else found
    if source == "recorded":
        chosen, why = RECORDED, "recorded rows, as configured (source: recorded)"
    elif present:
        chosen, why = MEASURED, f"measured here ({where}; source: {source})"
    elif source == "measure" and elsewhere:
        chosen, why = MEASURED, "measured by the cluster's jobs, which check for the card themselves (source: measure)"
    elif source == "measure":
        raise TargetError(
            f"config source: measure needs {entry['label']} for gpu {name!r}, but {found}; allowed: auto, recorded"
        )
    else:
        chosen, why = RECORDED, f"recorded rows ({found}; source: auto)"
    return Target(name, entry["label"], chosen, entry["device"], entry["arch"], present, why)


def require_present(name: str, gpus: Mapping[str, Mapping[str, str]]) -> None:
    """In a measuring job: TargetError unless the device of that name is on this machine."""
    if name in gpus and gpus[name]["device"] == "cpu":
        return
    device = present_device()
    here = _name_of(device, gpus) if device else None
    if here != name:
        found = f"has {device.name}" if device else "has no CUDA device"
        raise TargetError(f"gpu {name!r} cannot be measured here: this machine {found}")


def hand_over(targets: Sequence[Target]) -> str:
    """Value of HANDOVER_VARIABLE for these targets."""
    return json.dumps([asdict(target) for target in targets])


def handed_over(value: str) -> list[Target]:
    """Targets from the value of HANDOVER_VARIABLE."""
    return [Target(**fields) for fields in json.loads(value)]


def recorded_files(recorded: Path, gpu: str, experiment: str) -> list[Path]:
    """Recorded tables of one GPU and experiment, sorted; empty where there are none."""
    return sorted((recorded / gpu / experiment).glob("*.csv"))
