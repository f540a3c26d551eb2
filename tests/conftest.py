"""Tests marked ``gpu`` run where there is a CUDA device and are skipped elsewhere."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        return
    from stof_kernels.benchmarking.environment import one_assembler

    one_assembler()  # as measuring jobs do: what is tested is what is measured
