"""Masks: WHAT attends to what. Patterns are rules over positions that name themselves; the registry knows them by name."""

from .artifact import artifact_bigbird, artifact_dilated, artifact_longformer, artifact_sliding_window
from .families import (
    bigbird,
    causal,
    dilated,
    document,
    full,
    longformer,
    prefix_lm,
    random_blocks,
    sliding_window,
    strided,
)
from .pattern import Bounds, MaskMod, Pattern, predicate
from .registry import ARTIFACT, FAMILIES, LABELS, PAPER, get

__all__ = [
    "ARTIFACT",
    "FAMILIES",
    "LABELS",
    "PAPER",
    "Bounds",
    "MaskMod",
    "Pattern",
    "artifact_bigbird",
    "artifact_dilated",
    "artifact_longformer",
    "artifact_sliding_window",
    "bigbird",
    "causal",
    "dilated",
    "document",
    "full",
    "get",
    "longformer",
    "predicate",
    "prefix_lm",
    "random_blocks",
    "sliding_window",
    "strided",
]
