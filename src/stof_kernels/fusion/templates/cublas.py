"""A linear layer and its activation in one call of cuBLASLt, whose epilogues are ReLU and GELU by tanh."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..segments import Run, Segment
from .base import Setting, Template, Unsupported
from .gemm_source import Product, product_of
from .rows import base_of, through_views

aten = torch.ops.aten


class CublasEpilogue(Template):
    """One linear layer and ReLU or GELU by tanh; anything less is what ``eager`` calls cuBLAS for as well."""

    name: ClassVar[str] = "cublas"

    def check(self, segment: Segment) -> None:
        """Raises `Unsupported` unless it is a linear layer and an activation that cuBLASLt has, on CUDA."""
        if segment.device.type != "cuda":
            raise Unsupported("the epilogues are cuBLASLt's, the segment is on the CPU")
        self.parts(segment)

    def parts(self, segment: Segment) -> tuple[Product, bool]:
        """The product, and whether the activation is GELU."""
        names = [op.name for op in segment.ops]
        if names not in (["linear", "relu"], ["linear", "gelu_tanh"], ["linear", "gelu"]) or segment.ops[0].gemms != 1:
            raise Unsupported("one linear layer and ReLU or GELU by tanh, this segment differs")
        product = next(p for p in map(product_of, segment.computing) if p is not None)
        last = base_of(segment.outputs[0])
        if names[1] == "gelu" and last.kwargs.get("approximate") != "tanh":
            raise Unsupported("GELU by erf, allowed: by tanh")
        x = through_views(product.x)
        operands = [x, product.weight, *([product.bias] if product.bias is not None else [])]
        if any(n.op != "placeholder" or not n.meta["val"].is_contiguous() for n in operands):
            raise Unsupported("an operand is not a contiguous input")
        if len(segment.outputs) != 1 or last.meta["val"].shape[-1] != product.node.meta["val"].shape[-1]:
            raise Unsupported("it returns more than the activation")
        return product, names[1] != "relu"

    def build(self, segment: Segment, setting: Setting) -> Run:
        """One call; a layer without bias gets one of zeros, which the epilogue needs."""
        product, gelu = self.parts(segment)
        places = segment.placeholders
        at_x, at_weight = places.index(through_views(product.x)), places.index(product.weight)
        value, result = product.node.meta["val"], segment.outputs[0].meta["val"]
        zeros = None
        if product.bias is None:
            zeros = torch.zeros(value.shape[-1], dtype=value.dtype, device=value.device)
        at_bias = None if product.bias is None else places.index(product.bias)

        def run(*inputs: Tensor) -> list[Tensor]:
            x, weight = inputs[at_x], inputs[at_weight]
            bias = zeros if at_bias is None else inputs[at_bias]
            matrix = weight if product.transposed else weight.t()
            out = aten._addmm_activation.default(bias, x.view(-1, x.shape[-1]), matrix, use_gelu=gelu)
            return [out.view(result.shape)]

        return run
