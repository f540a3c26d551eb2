"""Fusion: the operators around attention, from a captured model to a tuned one."""

from .engine import FallbackWarning, Optimized, compile_graph, optimize
from .plan import FusionPlan
from .scheme import FusionScheme
from .search import SearchSettings

__all__ = ["FallbackWarning", "FusionPlan", "FusionScheme", "Optimized", "SearchSettings", "compile_graph", "optimize"]
