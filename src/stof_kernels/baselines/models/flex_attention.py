"""torch.compile of the whole model with FlexAttention in it: the mask's own predicate, cut into blocks beforehand."""

from __future__ import annotations

from .registry import ModelReady, Subject, model_method, run_variant


@model_method(
    "flex_attention", experiments=("end_to_end",), depends=("integrations/layout.py",), devices=("cuda",), tuned=True
)
def flex_attention(subject: Subject) -> ModelReady:
    """Default kernels behind CUDA graphs (reduce-overhead); T5's position bias, in rows, is added to the scores."""
    from stof_kernels.integrations.layout import keep_bias_in_rows
    from stof_kernels.integrations.variants import FLEX

    keep_bias_in_rows(subject.model(FLEX))
    return run_variant(subject, "torch_compile_flex", own_graphs=True)
