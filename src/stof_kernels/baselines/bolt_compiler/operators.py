"""Bolt's kernels as operators of torch: loading the library, and shapes for a compiler that traces them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .. import native
from ..registry import Unsupported

SCHEMAS = (
    "gemm(Tensor a, Tensor b, Tensor? bias, int epilogue, int candidate) -> Tensor",
    "persistent(Tensor a, Tensor b0, Tensor? bias0, int epilogue0, Tensor b1, Tensor? bias1, int epilogue1, int kernel) "
    "-> Tensor",
)
"""As ``csrc/bolt/bindings.cpp`` defines them."""


def load() -> None:
    """Loads the kernels for the current GPU. `Unsupported` where they are neither built nor can be."""
    try:
        native.load("bolt", torch.cuda.get_device_capability())
    except native.Missing as reason:
        raise Unsupported(str(reason)) from None
    register_fakes()


@cache
def register_fakes() -> None:
    """Tell compilers what the operators return; they must be defined."""

    @torch.library.register_fake("stof_bolt::gemm")
    def _(a: Tensor, b: Tensor, bias: Tensor | None, epilogue: int, candidate: int) -> Tensor:
        return a.new_empty(*a.shape[:-1], b.shape[-2])

    @torch.library.register_fake("stof_bolt::persistent")
    def _(
        a: Tensor,
        b0: Tensor,
        bias0: Tensor | None,
        epilogue0: int,
        b1: Tensor,
        bias1: Tensor | None,
        epilogue1: int,
        kernel: int,
    ) -> Tensor:
        return a.new_empty(a.shape[0], b1.shape[0])
