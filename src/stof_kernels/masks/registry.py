"""Masks by name: what a config, a row or a figure calls a mask, and its parameters at a sequence length.

To add a mask: write its pattern (families.py, or a file of its own) and one entry here; the config check, the tests, the
benchmarks and the figures pick it up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from . import artifact, families
from .pattern import Pattern


def _width(seq_len: int) -> int:
    """Band and global width of the paper's masks: round(sqrt(S))."""
    return round(math.sqrt(seq_len))


def _mixed_lengths(seq_len: int) -> tuple[int, ...]:
    """Document lengths in the ratio 1:3:2:5:1:4 that add up to ``seq_len``; short sequences get fewer documents."""
    weights = (1, 3, 2, 5, 1, 4)
    ends = [seq_len * part // sum(weights) for part in itertools.accumulate(weights, initial=0)]
    return tuple(b - a for a, b in itertools.pairwise(ends) if b > a)


_AT_LENGTH: dict[str, Callable[[int], Pattern]] = {
    "causal": lambda s: families.causal(),
    "sliding_window": lambda s: families.sliding_window(_width(s)),
    "longformer": lambda s: families.longformer(_width(s), _width(s)),
    "bigbird": lambda s: families.bigbird(_width(s), _width(s)),
    "artifact_sliding_window": lambda s: artifact.artifact_sliding_window(),
    "artifact_longformer": lambda s: artifact.artifact_longformer(),
    "artifact_bigbird": lambda s: artifact.artifact_bigbird(),
    "artifact_dilated": lambda s: artifact.artifact_dilated(),
    "dilated": lambda s: families.dilated(_width(s)),
    "strided": lambda s: families.strided(max(1, _width(s))),
    "prefix_lm": lambda s: families.prefix_lm(s // 4),
    "random_blocks": lambda s: families.random_blocks(16, 0.05),
    "document": lambda s: families.document(_mixed_lengths(s)),
    "full": lambda s: families.full(),
}

FAMILIES: tuple[str, ...] = tuple(_AT_LENGTH)
PAPER: tuple[str, ...] = ("causal", "sliding_window", "longformer", "bigbird")
ARTIFACT: tuple[str, ...] = ("artifact_sliding_window", "artifact_longformer", "artifact_bigbird", "artifact_dilated")

LABELS: dict[str, str] = {
    "causal": "Causal",
    "sliding_window": "Sliding window",
    "longformer": "Longformer",
    "bigbird": "BigBird",
    "artifact_sliding_window": "Sliding window (artifact)",
    "artifact_longformer": "Longformer (artifact)",
    "artifact_bigbird": "BigBird (artifact)",
    "artifact_dilated": "Dilated (artifact)",
    "dilated": "Dilated",
    "strided": "Strided",
    "prefix_lm": "Prefix LM",
    "random_blocks": "Random blocks",
    "document": "Document",
    "full": "Full",
}


def get(family: str, seq_len: int) -> Pattern:
    """The experiments' mask of that family for ``seq_len`` queries and keys.

    The paper's four take w = g = round(sqrt(seq_len)); the artifact's keep its fixed widths. ValueError for an unknown family.
    """
    if family not in _AT_LENGTH:
        raise ValueError(f"mask {family!r} is unknown, allowed: {', '.join(FAMILIES)}")
    if seq_len < 1:
        raise ValueError(f"mask {family}: seq_len is {seq_len}, allowed: an integer >= 1")
    return _AT_LENGTH[family](seq_len)
