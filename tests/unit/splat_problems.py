"""Masks and problems that the tests of SPLAT's format, tiles and kernels share."""

from __future__ import annotations

import numpy as np

from stof_kernels import masks
from stof_kernels.baselines import Problem

EXPRESSIBLE = (
    "causal",
    "sliding_window",
    "artifact_sliding_window",
    "artifact_dilated",
    "dilated",
    "prefix_lm",
    "document",
    "full",
)
Q, K = np.arange(48)[:, None], np.arange(48)[None]
# Strides 2 and 3 side by side, rows of one column and rows of none.
MIXED = np.where(
    Q % 4 == 0, K % 2 == Q // 4 % 2, np.where(Q % 4 == 1, (K % 3 == 1) & (K > Q // 2), (K == Q) & (Q % 4 == 2))
)


def problem(pattern, length=96, dtype="float32", **changes) -> Problem:
    pattern = masks.get(pattern, length) if isinstance(pattern, str) else pattern
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 32, "q_len": length, "kv_len": length, "seed": 3}
    return Problem(pattern, dtype=dtype, device="cpu", **sizes | changes)


def rows(acsr) -> list[tuple[int, int, int]]:
    return [tuple(int(x) for x in row) for row in zip(acsr.stride, acsr.offset, acsr.count, strict=True)]
