"""Planner: WHICH kernel. Pure Python on numbers; runs without a GPU and without torch."""

from .config import BLOCK_WISE, MOST_LAYOUT_KEYS, ROW_WISE, KernelConfig, candidates, infeasible
from .cost import predict_us
from .device import CPU_COSTS, CpuCosts, DeviceSpec, cpu_spec, cuda_spec
from .policy import POLICIES, Plan, choose, paper_score
from .problem import CELL, AttentionProblem, MaskStats, TileStats

__all__ = [
    "BLOCK_WISE",
    "CELL",
    "CPU_COSTS",
    "MOST_LAYOUT_KEYS",
    "POLICIES",
    "ROW_WISE",
    "AttentionProblem",
    "CpuCosts",
    "DeviceSpec",
    "KernelConfig",
    "MaskStats",
    "Plan",
    "TileStats",
    "candidates",
    "choose",
    "cpu_spec",
    "cuda_spec",
    "infeasible",
    "paper_score",
    "predict_us",
]
