"""FlexAttention with the FlashAttention-4 back end (CuTe), where that optional package is installed."""

from __future__ import annotations

from .flex_attention import prepare_flex
from .registry import Prepared, Problem, Tensors, Unsupported, method
from .sdpa import EXPERIMENTS


def require_fa4() -> None:
    """Unsupported unless the optional package flash-attn-4 can be imported here and runs on this GPU."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        raise Unsupported(
            f"FlashAttention-4 kernels need compute capability 9.0 or newer, this GPU has {major}.{minor}"
        )
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError as error:
        missing = error.name or "flash_attn.cute"
        raise Unsupported(f"the optional package flash-attn-4 is not usable here (cannot import {missing})") from None


@method(
    "flex_flash",
    label="FlexAttention (FLASH)",
    experiments=EXPERIMENTS,
    depends=("baselines/flex_attention.py",),
    devices=("cuda",),
    rank=51,
)
def flex_flash(problem: Problem, tensors: Tensors) -> Prepared:
    """The same call as flex_attention with another back end."""
    if problem.dtype == "float32":
        raise Unsupported("FlashAttention-4 runs float16 and bfloat16 only")
    require_fa4()
    return prepare_flex(problem, tensors, {"BACKEND": "FLASH"})
