"""Which GPU is meant, whether it is here, and where its numbers come from."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from stof_kernels.benchmarking import targets
from stof_kernels.benchmarking.targets import Device, Target, TargetError, gpu_names, resolve

GPUS = {
    "4090": {"label": "NVIDIA GeForce RTX 4090", "device": "cuda", "arch": "sm_89", "match": "RTX 4090$"},
    "a100": {"label": "NVIDIA A100", "device": "cuda", "arch": "sm_80", "match": r"\bA100\b"},
    "h200": {"label": "NVIDIA H200", "device": "cuda", "arch": "sm_90a", "match": r"\bH200\b"},
    "cpu": {"label": "CPU", "device": "cpu", "arch": "cpu", "match": "(?!)"},
}
H200 = Device("NVIDIA H200", (9, 0))
L40S = Device("NVIDIA L40S", (8, 9))


def sources(found: list[Target]) -> list[tuple[str, str, bool]]:
    return [(target.name, target.source, target.present) for target in found]


@pytest.mark.parametrize(
    ("gpu", "names"),
    [
        ("auto", ["auto"]),
        (4090, ["4090"]),
        ("4090", ["4090"]),
        ("4090,a100", ["4090", "a100"]),
        (" A100 , 4090, ", ["a100", "4090"]),
        ([4090, "a100,h200", "4090"], ["4090", "a100", "h200"]),
        (("cpu",), ["cpu"]),
    ],
)
def test_names(gpu: object, names: list[str]) -> None:
    assert gpu_names(gpu) == names


@pytest.mark.parametrize("gpu", ["", ",", [], None, 4.5, True, [["a100"]], {"a100": 1}])
def test_what_names_no_gpu_is_one_line(gpu: object) -> None:
    with pytest.raises(TargetError, match=r"^config gpu: got .*$") as raised:
        gpu_names(gpu)
    assert "\n" not in str(raised.value)


def test_auto_is_the_device_that_is_here() -> None:
    assert sources(resolve("auto", "auto", GPUS)) == [("cpu", "measured", True)]
    assert sources(resolve("auto", "auto", GPUS, device=H200)) == [("h200", "measured", True)]
    assert sources(resolve("auto,h200,cpu", "auto", GPUS, device=H200)) == [
        ("h200", "measured", True),
        ("cpu", "measured", True),
    ]


def test_auto_source_measures_what_is_here_and_draws_the_rest() -> None:
    found = resolve("4090,h200,cpu", "auto", GPUS, device=H200)
    assert sources(found) == [("4090", "recorded", False), ("h200", "measured", True), ("cpu", "measured", True)]
    assert "recorded rows (this machine has NVIDIA H200" in str(found[0])
    assert "measured here" in str(found[1])
    assert sources(resolve(4090, "auto", GPUS)) == [("4090", "recorded", False)]


def test_recorded_source_never_measures() -> None:
    assert [t.source for t in resolve("h200,cpu", "recorded", GPUS, device=H200)] == ["recorded", "recorded"]


def test_measure_needs_the_card() -> None:
    assert sources(resolve("h200", "measure", GPUS, device=H200)) == [("h200", "measured", True)]
    with pytest.raises(TargetError, match=r"NVIDIA A100 for gpu 'a100', but this machine has NVIDIA H200; allowed: "):
        resolve("h200,a100", "measure", GPUS, device=H200)
    with pytest.raises(TargetError, match=r"this machine has no CUDA device"):
        resolve("a100", "measure", GPUS)
    # A cluster's jobs run elsewhere and check for themselves.
    assert sources(resolve("a100", "measure", GPUS, elsewhere=True)) == [("a100", "measured", False)]


def test_unknown_names_and_sources() -> None:
    with pytest.raises(TargetError, match=r"'5090' is unknown, allowed: auto, 4090, a100, h200, cpu$"):
        resolve("4090,5090", "auto", GPUS)
    with pytest.raises(TargetError, match=r"source: got 'maybe', allowed: auto, measure, recorded$"):
        resolve("cpu", "maybe", GPUS)


def test_a_card_in_no_table_gets_a_name_from_its_properties() -> None:
    (found,) = resolve("auto", "auto", GPUS, device=L40S)
    assert (found.name, found.label, found.arch, found.device) == ("l40s", "NVIDIA L40S", "sm_89", "cuda")
    assert sources(resolve("l40s,cpu", "measure", GPUS, device=L40S))[0] == ("l40s", "measured", True)
    with pytest.raises(TargetError, match=r"'l40s' is unknown"):
        resolve("l40s", "auto", GPUS)
    assert Device("NVIDIA GeForce RTX 4070 Ti SUPER", (8, 9)).short_name == "rtx_4070_ti_super"
    assert Device("NVIDIA GB200", (10, 0)).arch == "sm_100a"


def test_a_similar_card_is_not_taken_for_the_one_in_the_table() -> None:
    (found,) = resolve("auto", "auto", GPUS, device=Device("NVIDIA GeForce RTX 4090 D", (8, 9)))
    assert found.name == "rtx_4090_d"
    (found,) = resolve("auto", "auto", GPUS | {"l40s": GPUS["a100"]}, device=L40S)
    assert found.name == "l40s_other"


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"])
def test_variants_of_a_card_share_its_entry(name: str) -> None:
    assert resolve("auto", "auto", GPUS, device=Device(name, (8, 0)))[0].name == "a100"


def test_a_job_checks_for_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "present_device", lambda: L40S)
    targets.require_present("cpu", GPUS)
    targets.require_present("l40s", GPUS)
    with pytest.raises(TargetError, match=r"gpu 'h200' cannot be measured here: this machine has NVIDIA L40S$"):
        targets.require_present("h200", GPUS)
    monkeypatch.setattr(targets, "present_device", lambda: None)
    with pytest.raises(TargetError, match=r"this machine has no CUDA device$"):
        targets.require_present("l40s", GPUS)


def test_targets_survive_the_hand_over() -> None:
    found = resolve("auto,4090", "auto", GPUS, device=H200)
    assert targets.handed_over(targets.hand_over(found)) == found


class Driver:
    """A CUDA driver library that has one card, or none."""

    def __init__(self, name: bytes, status: int = 0) -> None:
        self._name, self._status = name, status

    def cuInit(self, flags: int) -> int:
        return self._status

    def cuDeviceGet(self, handle: object, ordinal: int) -> int:
        return 0

    def cuDeviceGetName(self, name: ctypes.Array, length: int, handle: object) -> int:
        name.value = self._name
        return 0

    def cuDeviceGetAttribute(self, value: object, attribute: int, handle: object) -> int:
        value._obj.value = {75: 9, 76: 0}[attribute]  # type: ignore[attr-defined]
        return 0


def test_device_comes_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(b"NVIDIA H200"))
    assert targets.present_device.__wrapped__() == H200
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(b"", status=100))
    assert targets.present_device.__wrapped__() is None

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert targets.present_device.__wrapped__() is None


@pytest.mark.gpu
def test_device_is_the_one_that_torch_sees() -> None:
    import torch

    device = targets.present_device()
    assert device == Device(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0))


def test_recorded_files_are_those_of_one_gpu_and_experiment(tmp_path: Path) -> None:
    for name in (
        "a100/mha/b.csv",
        "a100/mha/a.csv",
        "a100/mha/a.provenance.json",
        "a100/other/c.csv",
        "h200/mha/d.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in targets.recorded_files(tmp_path, "a100", "mha")] == ["a.csv", "b.csv"]
    assert targets.recorded_files(tmp_path, "cpu", "mha") == []


def test_parsing_the_workflow_needs_no_torch() -> None:
    modules = "stof_kernels.benchmarking.config, stof_kernels.benchmarking.pages, stof_kernels.benchmarking.jobs"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
