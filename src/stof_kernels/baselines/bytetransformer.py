"""ByteTransformer (IPDPS 2023): fused attention for sequences of up to 1,024 tokens, dense."""

from __future__ import annotations

from .registry import absent_method

absent_method(
    "bytetransformer",
    label="ByteTransformer",
    experiments=("mha",),
    reason="not implemented in this reproduction yet; only the paper's published numbers exist",
    rank=60,
)
