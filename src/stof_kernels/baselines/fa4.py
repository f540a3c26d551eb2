"""FlashAttention-4 (CuTe, optional package flash-attn-4): causal and window masks natively."""

from __future__ import annotations

from .fa2 import window_of
from .flex_flash import require_fa4
from .inputs import is_top_left_causal
from .registry import Prepared, Problem, Tensors, Unsupported, method
from .sdpa import EXPERIMENTS


@method(
    "fa4",
    label="FlashAttention-4",
    experiments=EXPERIMENTS,
    depends=("baselines/fa2.py", "baselines/flex_flash.py"),
    devices=("cuda",),
    exact_by_design=False,
    rank=41,
)
def fa4(problem: Problem, tensors: Tensors) -> Prepared:
    """Native forms only: other masks run through its FlexAttention back end, the method flex_flash."""
    if problem.dtype == "float32":
        raise Unsupported("FlashAttention-4 runs float16 and bfloat16 only")
    causal = is_top_left_causal(problem) and problem.q_len == problem.kv_len
    window = window_of(problem)
    if not causal and window is None:
        raise Unsupported("no native form of this mask; its kernels with any mask are the method flex_flash")
    require_fa4()
    from flash_attn.cute import flash_attn_func

    q, k, v = (t.transpose(1, 2) for t in (tensors.q, tensors.k, tensors.v))
    window = window or (None, None)

    def run():
        out = flash_attn_func(q, k, v, softmax_scale=problem.scale, causal=causal, window_size=window)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Prepared(run, problem.pattern, note="native causal" if causal else "native window")
