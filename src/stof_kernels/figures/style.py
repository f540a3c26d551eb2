"""Names, colours and marks: the same method looks the same in every figure.

The colours are Okabe and Ito's, told apart by people with any common colour vision, ordered so that neighbouring bars differ in
lightness too; a grey print is read by lightness and by the order, which is the legend's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

from stof_kernels.baselines import registry
from stof_kernels.benchmarking.measurement import Measurement
from stof_kernels.masks import LABELS as MASKS


@dataclass(frozen=True)
class Look:
    """Label and colour of a series."""

    label: str
    color: str


# In the order of legends and bars: unfused, compiled, the paper's competitors, PyTorch's and other kernels, ours.
METHODS: dict[str, str] = {
    "torch_native": "#555555",
    "torch_compile": "#56B4E9",
    "torch_compile_reduce_overhead": "#2F6F94",
    "torch_compile_max_autotune": "#BFE3F7",
    "torch_compile_no_mha_boundary": "#CC79A7",
    "splat": "#CC79A7",
    "mcfuser": "#F0E442",
    "bytetransformer": "#D55E00",
    "bolt": "#882255",
    "sdpa": "#009E73",
    "sdpa_efficient": "#8FD6C2",
    "sdpa_cudnn": "#00523C",
    "fa2": "#0072B2",
    "flex_attention": "#E69F00",
    "flex_flash": "#FBE0A6",
    "fa4": "#332288",
    "stof_fusion_only": "#DDDDDD",
    "stof_mha_only": "#888888",
    "stof": "#000000",
}
_SPARE = ("#44AA99", "#DDCC77", "#AA4499", "#117733", "#999933", "#661100")

MODELS = {
    "bert_base": "BERT-Base",
    "bert_large": "BERT-Large",
    "gpt2": "GPT",
    "llama": "LLaMA",
    "t5": "T5",
    "vit": "ViT",
}
OPERATORS = {"bias_layernorm": "Bias + LayerNorm", "gemm_layernorm": "GEMM + LayerNorm", "gemm_gemm": "GEMM + GEMM"}

FASTER, SLOWER = Look("faster", "#0072B2"), Look("slower", "#E69F00")


_REWRITTEN = " (reimpl.)"
_as_published: ContextVar[bool] = ContextVar("as_published", default=False)


@contextmanager
def labels_for(rows: Iterable[Measurement]) -> Iterator[None]:
    """Labels of a page of these rows: where the authors published them, nothing was re-implemented here."""
    token = _as_published.set(any(row.source == "published" for row in rows))
    try:
        yield
    finally:
        _as_published.reset(token)


def look(method: str) -> Look:
    """Label and colour of a method: its registered label, and a spare colour if it has none of its own."""
    label = _registered_labels().get(method, method)
    label = label.removesuffix(_REWRITTEN) if _as_published.get() else label
    return Look(label, METHODS.get(method) or _SPARE[sum(method.encode()) % len(_SPARE)])


@cache
def _registered_labels() -> dict[str, str]:
    return {spec.id: spec.label for spec in registry.all_methods("")}


def in_order(names: set[str], table: Mapping[str, object]) -> list[str]:
    """Names in the table's order; unknown ones after the known, but STOF itself is always last."""
    rank = {name: i for i, name in enumerate(table)}
    return sorted(names, key=lambda name: (name == "stof", rank.get(name, len(rank)), name))


def mask_label(family: str) -> str:
    """How a figure calls a mask family."""
    return MASKS.get(family, family.replace("_", " ").capitalize())
