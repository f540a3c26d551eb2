"""Names, colours and marks: the same method looks the same in every figure.

The colours are Okabe and Ito's, told apart by people with any common colour vision, ordered so that neighbouring bars differ in
lightness too; a grey print is read by lightness and by the order, which is the legend's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """Label and colour of a series."""

    label: str
    color: str


# In the order of legends and bars: unfused, compiled, the paper's competitors, PyTorch's and other kernels, ours.
METHODS: dict[str, Look] = {
    "torch_native": Look("PyTorch Native", "#555555"),
    "torch_compile": Look("PyTorch Compile", "#56B4E9"),
    "torch_compile_reduce_overhead": Look("Compile (reduce-overhead)", "#2F6F94"),
    "torch_compile_max_autotune": Look("Compile (max-autotune)", "#BFE3F7"),
    "torch_compile_no_mha_boundary": Look("Compile without MHA boundary", "#CC79A7"),
    "splat": Look("SPLAT", "#CC79A7"),
    "mcfuser": Look("MCFuser", "#F0E442"),
    "bytetransformer": Look("ByteTransformer", "#D55E00"),
    "bolt": Look("Bolt", "#882255"),
    "sdpa": Look("SDPA", "#009E73"),
    "sdpa_efficient": Look("SDPA (efficient)", "#8FD6C2"),
    "sdpa_cudnn": Look("SDPA (cuDNN)", "#00523C"),
    "fa2": Look("FlashAttention-2", "#0072B2"),
    "flex_attention": Look("FlexAttention", "#E69F00"),
    "flex_flash": Look("FlexAttention (flash)", "#FBE0A6"),
    "fa4": Look("FlashAttention-4", "#332288"),
    "stof_fusion_only": Look("STOF, fusion only", "#DDDDDD"),
    "stof_mha_only": Look("STOF, attention only", "#888888"),
    "stof": Look("STOF", "#000000"),
}
_SPARE = ("#44AA99", "#DDCC77", "#AA4499", "#117733", "#999933", "#661100")

MASKS = {"causal": "Causal", "sliding_window": "Sliding window", "longformer": "Longformer", "bigbird": "BigBird"}
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


def look(method: str) -> Look:
    """Label and colour of a method; one that no table here names gets its registered label and a spare colour."""
    if method in METHODS:
        return METHODS[method]
    from stof_kernels.baselines import registry

    labels = {spec.id: spec.label for spec in registry.all_methods()}
    return Look(labels.get(method, method), _SPARE[sum(method.encode()) % len(_SPARE)])


def in_order(names: set[str], table: dict[str, object]) -> list[str]:
    """Names in the table's order; unknown ones after the known, but STOF itself is always last."""
    rank = {name: i for i, name in enumerate(table)}
    return sorted(names, key=lambda name: (name == "stof", rank.get(name, len(rank)), name))


def mask_label(family: str) -> str:
    """How a figure calls a mask family."""
    return MASKS.get(family, family.replace("_", " ").capitalize())
