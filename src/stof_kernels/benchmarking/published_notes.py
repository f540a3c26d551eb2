"""What is known about the published numbers besides the numbers: where they come from and how they were measured.

Statements on what a script does come from reading the authors' artifact; nothing of it was executed here.
"""

from __future__ import annotations

PAPER = {
    "title": "Accelerating Sparse Transformer Inference on GPU",
    "venue": "PPoPP '26",
    "doi": "10.1145/3774934.3786434",
}
ARTIFACT = {"doi": "10.5281/zenodo.17705801", "licence": "MIT"}
GPU_NAMES = {"4090": "NVIDIA GeForce RTX 4090", "a100": "NVIDIA A100-PCIE-40GB"}

# Dates and versions that the attention logs print; the other logs carry neither.
_LOG_DATES = {"4090": "2025-08-31", "a100": "2025-11-23"}
_LOG_SOFTWARE = {"4090": "PyTorch 2.7.0, CUDA 12.6", "a100": "PyTorch 2.7.0a0 (NVIDIA container 25.04), CUDA 12.9"}
_LOG_NOTES = {"a100": ["The artifact also holds a re-run of the same date; it is not used here."]}
_PAPER_SOFTWARE = "PyTorch 2.7.0, CUDA 12.6"

_CAUSAL = "mask applied: causal"
_DENSE = "mask applied: none (dense)"
_LABELS = (
    "the shipped script prints 'Torch Native' in the branch that runs torch.compile and 'Torch Compile' in the eager one; "
    "the printed label is kept"
)

# (experiment, method, mask or "" for any) -> remark on the row.
METHOD_NOTES: dict[tuple[str, str, str], str] = {
    **{("mha", m, k): _CAUSAL for m in ("torch_native", "fa2") for k in ("causal", "sliding_window")},
    **{("mha", m, k): _DENSE for m in ("torch_native", "fa2") for k in ("longformer", "bigbird")},
    ("mha", "flex_attention", "causal"): _CAUSAL,
    ("mha", "flex_attention", "sliding_window"): "mask applied: q - kv <= 256, later keys all kept",
    (
        "mha",
        "flex_attention",
        "longformer",
    ): "mask applied: wider band (256, later keys all kept) and other global strips",
    ("mha", "flex_attention", "bigbird"): "mask applied: wider band (256, later keys all kept) and other global strips",
    ("mha", "bytetransformer", ""): "mask applied: the panel's, computed densely",
    ("mha", "stof", "causal"): "mask applied: 64x64 tiles and the causal diagonal",
    ("mha", "stof", "sliding_window"): "mask applied: 64x64 tiles and, one-sided, the causal diagonal",
    ("mha", "stof", "longformer"): "mask applied: 64x64 tiles, no elements inside partial tiles",
    ("mha", "stof", "bigbird"): "mask applied: 64x64 tiles, no elements inside partial tiles",
    **{(e, m, ""): _LABELS for e in ("end_to_end", "ablation") for m in ("torch_native", "torch_compile")},
}

_PROTOCOLS = {
    "mha": "host wall clock around a loop of eager calls, synchronised at both ends, divided by the count: a mean, written in "
    "the median column; launch and Python time count; 20 timed calls after 10 for warm-up in the scripts (the paper says 100)",
    "end_to_end": "host wall clock, mean per forward pass, written in the median column; 10 timed passes after 10 for warm-up "
    "in the scripts (the paper says 100)",
    "overhead": "host time of parts of the tuner's own work, and the tuning time they are a share of",
    "tuning_cost": "wall time of one tuning run",
    "motivation": "host wall clock, mean per call, written in the median column; 100 timed calls after 10 for warm-up",
}
_PROTOCOLS["ablation"] = _PROTOCOLS["end_to_end"]

_UNITS = {
    "mha": "converted from ms to us",
    "motivation": "converted from ms to us",
    "end_to_end": "ms as printed",
    "ablation": "ms as printed",
    "overhead": "parts in ms as printed, tuning time converted from ms to s",
    "tuning_cost": "s as printed",
}

_EXPERIMENT_NOTES = {
    "mha": [
        "12 heads of 64, fp16; one mask serves all batch elements and heads.",
        "Masks have fixed widths (window 64, Longformer and BigBird 32); the window is one-sided at batch 1 and two-sided "
        "above. The paper's Table 2 describes widths that follow sqrt(S).",
        "What each method applied differs from panel to panel and is noted in the rows, as read in the artifact's scripts.",
    ],
    "end_to_end": [
        "Mask: BigBird. For ViT seq_len is the image side: tokens = (side/16)^2 + 1, and side 2048 is run as 512.",
        "head count and hidden size are the models'; head size 64 throughout.",
    ],
    "ablation": [
        "The published plot draws the smaller of STOF and STOF MHA as STOF; here each series is as logged.",
        "torch_compile is the series of Figure 11: the plotting script reads it from there.",
    ],
    "overhead": [
        "The log names no GPU; the paper says A100.",
        "The analytical model's time is one construction of lists and choice divided by 20, and the other three parts are "
        "shares of one measured total, as read in the artifact's script.",
        "The tuning times differ from Table 4 for BERT, GPT and T5 at the two larger sizes.",
    ],
    "tuning_cost": [
        "The log names no GPU; the paper says A100.",
        "LLaMA at (16, 2048) is 246.6 s in the artifact's file and 264.6 s in the paper's table.",
    ],
    "motivation": [
        "GEMM + LayerNorm: K = N = hidden in Figure 3; K = 4 x hidden, N = hidden in Figure 4. GEMM + GEMM: hidden to "
        "4 x hidden to hidden, weights per batch element.",
    ],
}
_FILE_NOTES = {
    ("mha", "mcfuser"): ["One log, made with BigBird; the authors' plot repeats its values for all four masks."],
    ("mha", "splat"): [
        "One log, mask not recorded (mask not_recorded); the authors' plot repeats its values for all four masks.",
        "SPLAT was re-implemented by the paper's authors.",
    ],
    ("end_to_end", "torch_native"): [_LABELS[0].upper() + _LABELS[1:] + "."],
    ("end_to_end", "bolt"): ["The LLaMA log names a head count that differs from the other methods' 16."],
}
_FILE_NOTES["end_to_end", "torch_compile"] = _FILE_NOTES["end_to_end", "torch_native"]
_FILE_NOTES["ablation", "torch_native"] = _FILE_NOTES["end_to_end", "torch_native"]
_FILE_NOTES["ablation", "torch_compile"] = _FILE_NOTES["end_to_end", "torch_native"]
_GPU_FILE_NOTES = {
    ("4090", "mha", "mcfuser"): ["This log was made with PyTorch 2.6.0."],
    ("4090", "end_to_end", "bolt"): [
        "The artifact's public history holds an earlier version of this log with other values; these are the published ones.",
    ],
}


def provenance(gpu: str, experiment: str, method: str, rows: int, files: list[str]) -> dict[str, object]:
    """Content of a published table's ``.provenance.json``; an empty date means that its logs carry none."""
    dated = experiment == "mha" and method not in ("mcfuser", "splat")
    notes = _EXPERIMENT_NOTES[experiment] + _FILE_NOTES.get((experiment, method), [])
    notes = notes + _GPU_FILE_NOTES.get((gpu, experiment, method), [])
    if dated:
        notes = notes + _LOG_NOTES.get(gpu, [])
    return {
        "kind": "published",
        "gpu": gpu,
        "gpu_name": GPU_NAMES[gpu],
        "experiment": experiment,
        "method": method,
        "rows": rows,
        "paper": PAPER,
        "artifact": {**ARTIFACT, "files": files},
        "software": _LOG_SOFTWARE[gpu] if dated else f"{_PAPER_SOFTWARE} (the paper's setup; the log prints none)",
        "date": _LOG_DATES[gpu] if dated else "",
        "protocol": _PROTOCOLS[experiment],
        "units": _UNITS[experiment],
        "notes": notes,
    }
