"""torch.compile of the whole model: with torch's fused attention in Inductor's modes, and with the attention torn in two."""

from __future__ import annotations

from .registry import ModelReady, Subject, model_method, run_variant


@model_method("torch_compile", experiments=("end_to_end", "ablation", "tuning_cost"), tuned=True)
def torch_compile(subject: Subject) -> ModelReady:
    """Default mode."""
    return run_variant(subject, "torch_compile")


@model_method("torch_compile_reduce_overhead", experiments=("end_to_end",), devices=("cuda",), tuned=True)
def torch_compile_reduce_overhead(subject: Subject) -> ModelReady:
    """Default mode behind CUDA graphs."""
    return run_variant(subject, "torch_compile_reduce_overhead", own_graphs=True)


@model_method("torch_compile_max_autotune", experiments=("end_to_end", "tuning_cost"), devices=("cuda",), tuned=True)
def torch_compile_max_autotune(subject: Subject) -> ModelReady:
    """Autotuned matrix products behind CUDA graphs."""
    return run_variant(subject, "torch_compile_max_autotune", own_graphs=True)


@model_method(
    "torch_compile_no_mha_boundary",
    experiments=("ablation",),
    label="Compile without MHA boundary",
    rank=23,
    tuned=True,
)
def torch_compile_no_mha_boundary(subject: Subject) -> ModelReady:
    """Default mode on the unfused model, its graph broken after the first product of each attention."""
    return run_variant(subject, "torch_compile_no_mha_boundary")
