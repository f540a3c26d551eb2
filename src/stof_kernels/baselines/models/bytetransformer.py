"""ByteTransformer (IPDPS 2023): its fused encoder layer."""

from __future__ import annotations

from .registry import absent_model_method

absent_model_method(
    "bytetransformer",
    experiments=("end_to_end",),
    reason="whole models are not implemented in this reproduction yet; only the paper's published numbers exist",
)
