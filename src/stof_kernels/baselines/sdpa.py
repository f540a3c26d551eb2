"""torch's scaled_dot_product_attention: its own choice of kernel, or one kernel forced."""

from __future__ import annotations

from .inputs import additive_mask, dense_keep, is_top_left_causal
from .registry import Prepared, Problem, Tensors, method

EXPERIMENTS = ("mha", "mha_artifact")


@method("sdpa", label="SDPA", experiments=EXPERIMENTS, rank=30)
def sdpa(problem: Problem, tensors: Tensors) -> Prepared:
    """Default dispatch with the mask as a bool tensor, as most programs call it."""
    import torch.nn.functional as F

    keep = dense_keep(problem)
    q, k, v = tensors.q, tensors.k, tensors.v

    def run():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=problem.scale, enable_gqa=problem.grouped)

    return Prepared(run, problem.pattern)


def forced(problem: Problem, tensors: Tensors, backend: str) -> Prepared:
    """SDPA with only ``backend`` allowed: causal by its own flag, any other mask as an additive tensor made beforehand."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    allowed = SDPBackend.__members__[backend]
    causal = is_top_left_causal(problem)
    mask = None if causal else additive_mask(problem)
    q, k, v = tensors.q, tensors.k, tensors.v

    def run():
        with sdpa_kernel(allowed):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=problem.scale, enable_gqa=problem.grouped
            )

    return Prepared(run, problem.pattern, note="native causal" if causal else "")
