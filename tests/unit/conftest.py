"""What unit tests share. Without a GPU, Triton's kernels run in its interpreter, asked for before triton is first imported."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def pages_of(monkeypatch: pytest.MonkeyPatch):
    """The pages that a figure's module draws from now on, as it saves them."""

    def spy(figure: ModuleType) -> list:
        pages, save = [], figure.save
        monkeypatch.setattr(figure, "save", lambda drawn, pdf, title: (pages.extend(drawn), save(drawn, pdf, title)))
        return pages

    return spy
