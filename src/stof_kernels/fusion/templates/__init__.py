"""Templates: the ways to run a segment, each of which says what it supports and is tested against the segment itself."""

from .base import Setting, Template, Unsupported
from .cublas import CublasEpilogue
from .eager import Eager
from .gemm import Gemm
from .gemm_gemm import GemmGemm
from .gemm_maps import GemmMaps
from .inductor import Inductor
from .projection_rotary import ProjectionRotary
from .rotary import Rotary
from .rowwise import Rowwise
from .split_gemm import SplitGemm

_ALL = (
    Eager(),
    CublasEpilogue(),
    Inductor(),
    Rowwise(),
    Gemm(),
    GemmMaps(),
    SplitGemm(),
    GemmGemm(),
    Rotary(),
    ProjectionRotary(),
)
TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}
"""Every template by name; ``eager`` supports everything."""

__all__ = ["TEMPLATES", "Setting", "Template", "Unsupported"]
