"""What the planner chooses between: kernels and their tiles."""

from __future__ import annotations

from dataclasses import dataclass

from .device import DeviceSpec
from .problem import AttentionProblem

ROW_WISE, BLOCK_WISE = "row_wise", "block_wise"
_CODES = {ROW_WISE: 0, BLOCK_WISE: 1}
SHAPES = ("wide", "large", "split", "hopper", "hopper_pair", "hopper_split", "hopper_quad")
"""Arrangements of the CUDA block-wise kernel, in the order of ``enum class Shape`` in csrc/attention/cuda/problem.h."""
HOPPER = ("hopper", "hopper_pair", "hopper_split", "hopper_quad")
"""Those that need Hopper's own instructions."""


@dataclass(frozen=True)
class KernelConfig:
    """One way to run attention: a kernel, its query tile and how many keys it takes at a time."""

    kernel: str
    q_tile: int
    kv_chunk: int
    """Block-wise on the CPU: keys per softmax step. On CUDA: key tiles after which a row of tiles is cut and shared between
    thread blocks; 0 never, -1 at the fair share of the device."""
    shape: int = 0
    """Block-wise on CUDA: the kernel's arrangement of warps, its place in SHAPES plus one; 0 elsewhere."""

    @property
    def words(self) -> tuple[int, int, int, int]:
        """The launch plan as the registered operator takes it."""
        return _CODES[self.kernel], self.q_tile, self.kv_chunk, self.shape

    @property
    def id(self) -> str:
        """Name without blanks or brackets, for rows: ``block_wise/q64/kv-1/split``."""
        if self.kernel == ROW_WISE:
            return ROW_WISE
        shape = f"/{SHAPES[self.shape - 1]}" if self.shape else ""
        return f"{self.kernel}/q{self.q_tile}/kv{self.kv_chunk}{shape}"

    def __str__(self) -> str:
        if self.kernel == ROW_WISE:
            return ROW_WISE
        shape = f", {SHAPES[self.shape - 1]}" if self.shape else ""
        return f"{self.kernel}(q_tile={self.q_tile}, kv_chunk={self.kv_chunk}{shape})"


# One chunk length: 64 and 128 keys measured 0 to 8 % slower than 256, nowhere faster.
_CPU_CANDIDATES = (KernelConfig(BLOCK_WISE, 16, 256), KernelConfig(ROW_WISE, 1, 0))
# Shapes whose query tile is 128; the others' is 64.
_ROWS_128 = ("large", "hopper_pair")


def _shape(name: str) -> KernelConfig:
    return KernelConfig(BLOCK_WISE, 128 if name in _ROWS_128 else 64, -1, SHAPES.index(name) + 1)


_CUDA_CANDIDATES = (_shape("wide"), _shape("large"), _shape("split"), KernelConfig(ROW_WISE, 1, 0))
# The large shape was the best in none of 200 cells there.
_HOPPER_CANDIDATES = (
    _shape("hopper"),
    _shape("hopper_pair"),
    _shape("hopper_split"),
    _shape("hopper_quad"),
    _shape("wide"),
    KernelConfig(ROW_WISE, 1, 0),
)
MOST_LAYOUT_KEYS = 1 << 20
"""Keys that the layout of the CUDA block-wise kernels can have; longer masks are for the row-wise one."""
# Padded head dimensions that a shape is for; the others serve all.
_SHAPE_DIMS = dict.fromkeys(("large", "split", "hopper"), (32, 64, 96, 128)) | {
    "hopper_pair": (96, 128),
    "hopper_split": (32, 64),
    "hopper_quad": (32, 64),
}


def candidates(device: DeviceSpec) -> tuple[KernelConfig, ...]:
    """Every configuration that kernels exist for on this kind of device, the default first."""
    if device.kind == "cpu":
        return _CPU_CANDIDATES
    return _HOPPER_CANDIDATES if device.arch == "sm_90a" else _CUDA_CANDIDATES


def infeasible(config: KernelConfig, device: DeviceSpec, problem: AttentionProblem) -> str | None:
    """Why this configuration cannot run the problem, or None."""
    if device.kind == "cuda" and config.kernel == BLOCK_WISE and problem.kv_len > MOST_LAYOUT_KEYS:
        return f"its layout takes at most {MOST_LAYOUT_KEYS} keys, here {problem.kv_len}"
    dims = _SHAPE_DIMS.get(SHAPES[config.shape - 1]) if config.shape else None
    if dims and problem.head_dim_padded not in dims:
        least = f"from {dims[0] - 31} " if dims[0] > 32 else ""
        return f"{SHAPES[config.shape - 1]} is for head dims {least}up to {dims[-1]}, here {problem.head_dim}"
    return None
