"""Memory of a call as torch's CUDA allocator counts it."""

from __future__ import annotations

import pytest
import torch

from stof_kernels.benchmarking.attention_memory import held, peak_of


@pytest.mark.gpu
def test_peak_memory_is_that_of_the_call() -> None:
    before = held()
    keep = torch.zeros(1 << 20, device="cuda")  # 4 MiB

    def run():
        return (torch.zeros(1 << 20, device="cuda") + 1)[: 1 << 18].clone()

    run()
    assert peak_of(run).most == pytest.approx(9, abs=0.1)
    assert peak_of(run).temporary == pytest.approx(8, abs=0.1)
    assert peak_of(run, before).most == pytest.approx(13, abs=0.1)
    del keep
