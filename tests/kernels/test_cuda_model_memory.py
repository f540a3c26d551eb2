"""Peak memory of one call on a card, after calls that took far more."""

from __future__ import annotations

import pytest
import torch

from stof_kernels.benchmarking.model_memory import peak_mib

pytestmark = pytest.mark.gpu


def test_a_block_of_an_earlier_cell_is_not_counted():
    small = torch.randn(256, 256, device="cuda", dtype=torch.float16)
    large = torch.randn(1 << 29, device="cuda", dtype=torch.float16)  # 1 GiB
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    del large
    small @ small  # cuBLAS takes its workspace out of the free block
    assert peak_mib(lambda: small @ small, "cuda") < 512


def test_what_a_call_takes_is_counted():
    fresh = peak_mib(lambda: None, "cuda")
    more = peak_mib(lambda: torch.ones(1 << 28, device="cuda", dtype=torch.uint8), "cuda")  # 256 MiB
    assert 250 < more - fresh < 300
