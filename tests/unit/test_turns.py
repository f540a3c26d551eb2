"""Turns on one device: jobs prepare side by side, one that measures is alone, and a normal run knows nothing of it."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from stof_kernels import settings
from stof_kernels.benchmarking import experiments
from stof_kernels.benchmarking.measurement import read_rows
from stof_kernels.benchmarking.turns import TOGETHER, Turns

_PARTNER = """
import sys
from pathlib import Path
from stof_kernels.benchmarking.turns import Turns

def say(word):
    print(word, flush=True)
    sys.stdin.readline()

mine = Turns(Path(sys.argv[1]))
with mine.joined():
    say("prepares")
    with mine.alone():
        say("alone")
    say("prepares again")
say("left")
"""


class Partner:
    """Another process that takes its turns step by step: it says what it holds and goes on when it is told to."""

    def __init__(self, folder):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PARTNER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self) -> str:
        return self._process.stdout.readline().strip()

    def go_on(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture
def partner_of():
    started = []

    def start(folder):
        started.append(Partner(folder))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def partner(partner_of, tmp_path):
    return partner_of(tmp_path)


def free(path, how) -> bool:
    """Whether somebody new could hold the file that way."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def wait_until(true) -> None:
    limit = time.monotonic() + 60
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_two_prepare_side_by_side(tmp_path, partner):
    mine = Turns(tmp_path)
    with mine.joined():
        assert partner.says() == "prepares"
        assert mine.active
        assert mine.others() == 1
    assert not mine.active
    assert mine.others() == 0
    assert sorted(path.name for path in tmp_path.iterdir() if "job" not in path.name) == ["asking", "device"]


def test_who_would_measure_waits_for_those_who_prepare_and_comes_before_the_next(tmp_path, partner):
    mine, next_one, entered = Turns(tmp_path), Turns(tmp_path), threading.Event()

    def prepare():
        with next_one.joined():
            entered.set()

    thread = threading.Thread(target=prepare)
    with mine.joined():
        assert partner.says() == "prepares"
        partner.go_on()
        wait_until(lambda: not free(tmp_path / "asking", fcntl.LOCK_EX))  # it asks,
        assert not free(tmp_path / "device", fcntl.LOCK_EX)  # has not got it,
        assert free(tmp_path / "device", fcntl.LOCK_SH)
        thread.start()
    assert partner.says() == "alone"
    assert not free(tmp_path / "device", fcntl.LOCK_SH)
    assert not entered.is_set()
    partner.go_on()
    assert partner.says() == "prepares again"
    thread.join(60)
    assert entered.is_set()


def test_while_one_measures_nobody_starts_to_prepare(tmp_path, partner_of):
    mine = Turns(tmp_path)
    with mine.joined(), mine.alone():
        partner = partner_of(tmp_path)
        wait_until(lambda: mine.others() == 1)
        assert not free(tmp_path / "device", fcntl.LOCK_SH)
    assert partner.says() == "prepares"


def test_a_killed_job_holds_nothing(tmp_path, partner):
    mine = Turns(tmp_path)
    assert partner.says() == "prepares"
    partner.go_on()
    assert partner.says() == "alone"
    partner.kill()
    with mine.joined():
        assert mine.others() == 0
        with mine.alone():
            assert not free(tmp_path / "device", fcntl.LOCK_SH)
        assert free(tmp_path / "device", fcntl.LOCK_SH)


def test_inside_itself_a_turn_does_nothing(tmp_path):
    mine = Turns(tmp_path)
    with mine.joined(), mine.alone():
        with mine.joined(), mine.alone():
            pass
        assert not free(tmp_path / "device", fcntl.LOCK_SH)  # still alone


def test_without_a_folder_nothing_is_locked(monkeypatch, tmp_path):
    monkeypatch.delenv("STOF_SHARED_DEVICE", raising=False)
    assert settings.shared_device() is None
    nobody = Turns(settings.shared_device())
    with nobody.joined(), nobody.alone():
        assert not nobody.active
        assert nobody.others() == 0
    monkeypatch.setenv("STOF_SHARED_DEVICE", str(tmp_path / "lock"))
    assert settings.shared_device() == tmp_path / "lock"


# ---- in a measuring job ----------------------------------------------------------------------------------------------

MODEL = {
    "mask": "bigbird",
    "models": ["bert_base"],
    "model_size": "tiny",
    "sizes": [{"batch": 1, "seq_len": [64]}],
    "dtype": "float32",
    "seed": 3,
    "tuning_s": 0,
    "timing": {"min_samples": 2, "max_samples": 3, "budget_s": 0.01, "warmup": 1},
}


@pytest.mark.parametrize("method", ["sdpa", "torch_compile", "stof"])
def test_a_model_is_timed_alone(tmp_path, monkeypatch, method):
    pytest.importorskip("transformers")
    from stof_kernels.baselines import registry
    from stof_kernels.baselines.models import run_variant
    from stof_kernels.benchmarking import model_cell, model_subject, runner

    mine, device, others_may = Turns(tmp_path / "lock"), tmp_path / "lock" / "device", {}
    for module in (model_cell, model_subject, runner):
        monkeypatch.setattr(module, "turns", lambda: mine)

    def prepare(subject):
        others_may["prepare"] = free(device, fcntl.LOCK_SH)
        return replace(run_variant(subject, "torch_native"), tuning_s=1.0)

    def timed(*arguments):
        others_may["time"] = free(device, fcntl.LOCK_SH)
        return time_arms(*arguments)

    time_arms = model_cell.time_arms
    monkeypatch.setattr(model_cell, "time_arms", timed)
    registry.discover()
    key = next(key for key, spec in registry._METHODS.items() if (spec.kind, spec.id) == ("model", method))
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry._METHODS[key] = replace(registry._METHODS[key], prepare=prepare, tuned=False)
    monkeypatch.setattr(mine, "others", lambda: 3)

    files = [tmp_path / f"{method}.{kind}" for kind in ("csv", "provenance.json", "jsonl")]
    runner.run_job("cpu", "end_to_end", method, MODEL, *files, "cpu")

    together = method in TOGETHER
    assert others_may == {"prepare": together, "time": False}
    assert free(device, fcntl.LOCK_EX)
    (tuning,) = (row for row in read_rows(files[0]) if row.metric == "tuning_time")
    assert tuning.note == ("compiled beside 3 other jobs on the same device and cores" if together else "")
    assert ("prepared side by side" in json.loads(files[1].read_text())["protocol"]) == together


def test_what_may_be_prepared_beside_others_is_known():
    assert {spec.id for spec in experiments.get("end_to_end").specs + experiments.get("ablation").specs} >= TOGETHER
