"""Launches as a graph and a broken device, without a device: what a tuner relies on when a call fails."""

from __future__ import annotations

import gc

import pytest
import torch

from stof_kernels.baselines.cuda_timing import device_is_usable, recorded


class Graph:
    """A graph that says what is done to it."""

    said: tuple[str, ...] = ()

    def capture_begin(self, capture_error_mode):
        Graph.said = ("begin",)

    def capture_end(self):
        Graph.said += ("end",)
        if "fails" in Graph.said:
            raise RuntimeError("the capture was invalidated")

    def replay(self):
        Graph.said += ("replay",)


@pytest.fixture(autouse=True)
def graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)


def call():
    Graph.said += ("collects" if gc.isenabled() else "call",)


def test_a_recorded_call_is_replayed_once_and_nothing_is_collected_meanwhile():
    assert gc.isenabled()
    assert isinstance(recorded(call, 2), Graph)
    assert Graph.said == ("begin", "call", "call", "end", "replay")
    assert gc.isenabled()


def test_a_collection_that_was_off_stays_off():
    gc.disable()
    try:
        recorded(call, 1)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_reason_of_a_failed_call_is_not_lost_with_the_capture():
    def fails():
        Graph.said += ("fails",)
        raise ValueError("too many registers")

    with pytest.raises(ValueError, match="too many registers"):
        recorded(fails, 3)
    assert Graph.said == ("begin", "fails", "end")
    assert gc.isenabled()


def test_a_device_is_broken_once_it_does_not_synchronize(monkeypatch):
    def broken(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert not device_is_usable("cuda")
    assert not device_is_usable(torch.device("cuda", 1))
    assert device_is_usable("cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert device_is_usable("cuda")
