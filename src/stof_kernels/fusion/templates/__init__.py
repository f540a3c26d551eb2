"""Templates: the ways to run a segment, each of which says what it supports and is tested against the segment itself."""

from .base import Setting, Template, Unsupported
from .eager import Eager
from .gemm import Gemm
from .gemm_gemm import GemmGemm
from .inductor import Inductor
from .rotary import Rotary
from .rowwise import Rowwise

TEMPLATES: dict[str, Template] = {t.name: t for t in (Eager(), Inductor(), Rowwise(), Gemm(), GemmGemm(), Rotary())}
"""Every template by name; ``eager`` supports everything."""

__all__ = ["TEMPLATES", "Setting", "Template", "Unsupported"]
