"""Devices as numbers. One entry per card that the project knows; others are made from their properties."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class CpuCosts:
    """Measured cost of the CPU kernels' steps: nanoseconds of one thread."""

    call: float
    """Once per call: dispatch, thread wake-up."""
    pack_per_key: float
    """Packing one key and value of one head, per element of the head dimension."""
    block_cell: float
    """Block-wise: one listed cell, the part that does not grow with the head dimension (softmax, bookkeeping)."""
    block_cell_dim: float
    """Block-wise: one listed cell, per element of the head dimension."""
    block_partial: float
    """Block-wise: extra for applying a partial cell's bits."""
    row_row: float
    """Row-wise: one query row, whatever it keeps."""
    row_cell: float
    """Row-wise: looking at one row of one listed cell."""
    row_key: float
    """Row-wise: one kept key, the part that does not grow with the head dimension."""
    row_key_dim: float
    """Row-wise: one kept key, per element of the head dimension."""


@dataclass(frozen=True)
class CudaBlockCosts:
    """Measured cost of one shape of the CUDA block-wise kernel, microseconds; each step costs ``x + x_dim * D / 64``."""

    launch: float
    """Once per call."""
    tile: float
    tile_dim: float
    """One key tile on a full multiprocessor."""
    item: float
    item_dim: float
    """One query tile on a full multiprocessor: load Q, write O."""
    chain: float
    chain_dim: float
    """One key tile of the longest list, which is worked through one after the other however empty the device is."""
    combine: float
    """Joining lists that were cut and shared between thread blocks."""
    tile_slow: float = 0.0
    chain_slow: float = 0.0
    """Extra of one key tile, on a full multiprocessor and in the longest list, in which a row meets its first key after others
    of its warp: the Hopper kernels then look for its maximum."""
    turn: float = 0.0
    blocks: int = 0
    """Kernels for short calls: ``blocks`` of them fit on a multiprocessor, one an item, and each time that the device is filled
    with them takes ``turn`` more, however many the last ones are."""
    halves: int = 0
    """The longest lists, of at least so many key tiles, are worked through by two blocks side by side: as many as leave each
    block a multiprocessor of its own; 0: never."""


@dataclass(frozen=True)
class CudaRowCosts:
    """Measured cost of the CUDA row-wise kernel on a full multiprocessor, microseconds."""

    launch: float
    row: float
    """One query row."""
    look: float
    """Looking at one row of one listed cell."""
    key: float
    key_dim: float
    """One kept key: ``key + key_dim * D / 64``."""


@dataclass(frozen=True)
class DeviceSpec:
    """What the planner knows of a device."""

    name: str
    kind: str
    """``cpu`` or ``cuda``."""
    arch: str
    """Instruction set: ``sm_80``, ``sm_89``, ``sm_90a``; for a CPU its machine name."""
    units: int
    """Threads (cpu) or multiprocessors (cuda)."""
    shared_bytes: int = 0
    """Shared memory of one multiprocessor, bytes."""
    max_warps: int = 0
    """Resident warps of one multiprocessor."""


# Fitted to 60 measured calls on one vCPU of an AMD EPYC with AVX-512 (kernels/NOTES.md has the runs). Another CPU is faster or
# slower as a whole; what the planner needs is the ratios.
CPU_COSTS = {
    "float32": CpuCosts(
        call=7300.0,
        pack_per_key=0.56,
        block_cell=33.0,
        block_cell_dim=4.9,
        block_partial=7.0,
        row_row=54.0,
        row_cell=2.2,
        row_key=0.04,
        row_key_dim=0.067,
    ),
    "bfloat16": CpuCosts(
        call=7300.0,
        pack_per_key=0.56,
        block_cell=33.0,
        block_cell_dim=4.9,
        block_partial=8.0,
        row_row=68.0,
        row_cell=1.9,
        row_key=0.35,
        row_key_dim=0.077,
    ),
}

# Fitted to 1163 calls on one NVIDIA H200, the Hopper shapes of 64 dims to 190 later ones (kernels/NOTES.md): relative error 5
# to 95 % within 0.75 and 1.25 of measured. Other cards are sized by their multiprocessors; the ratios between the kernels are
# assumed to carry over until one is measured. A tile of hopper_pair was scaled by what paired slots brought on long rows,
# 0.925, and what a late first key costs it by what is left of it where only the maximum is looked for, a third.
CUDA_BLOCK_COSTS = {
    "wide": CudaBlockCosts(2.65, 0.028, 0.480, 0.0, 0.620, 0.508, 0.489, 3.97),
    "large": CudaBlockCosts(2.92, 0.0, 1.090, 0.0, 1.203, 1.087, 0.503, 4.08),
    "split": CudaBlockCosts(2.84, 0.195, 0.347, 0.816, 1.694, 0.221, 0.439, 4.83),
    "hopper": CudaBlockCosts(2.90, 0.009, 0.253, 0.0, 0.757, 0.144, 0.344, 3.97, 0.100, 0.149),
    "hopper_pair": CudaBlockCosts(3.39, 0.233, 0.305, 0.0, 1.228, 0.591, 0.082, 3.99, 0.17, 0.33),
    "hopper_split": CudaBlockCosts(0.829, 0.0, 0.410, 0.0, 0.0, 0.0, 0.827, 4.70, 0.482, 0.141, turn=1.642, blocks=2),
    "hopper_quad": CudaBlockCosts(
        1.026, 0.0, 0.470, 0.0, 0.0, 0.0, 0.378, 4.70, 0.377, 0.403, turn=1.617, blocks=1, halves=4
    ),
}
CUDA_ROW_COSTS = CudaRowCosts(launch=2.924, row=0.0689, look=0.00132, key=0.0000827, key_dim=0.0033)

_KB = 1024
_CUDA = (
    DeviceSpec("NVIDIA A100", "cuda", "sm_80", 108, 164 * _KB, 64),
    DeviceSpec("NVIDIA GeForce RTX 4090", "cuda", "sm_89", 128, 100 * _KB, 48),
    DeviceSpec("NVIDIA H100", "cuda", "sm_90a", 132, 228 * _KB, 64),
    DeviceSpec("NVIDIA H200", "cuda", "sm_90a", 132, 228 * _KB, 64),
)


def cpu_spec(threads: int, arch: str = "generic") -> DeviceSpec:
    """The CPU with ``threads`` worker threads."""
    return DeviceSpec("cpu", "cpu", arch, threads)


def cuda_spec(
    name: str, capability: tuple[int, int], multiprocessors: int, shared_bytes: int, max_warps: int
) -> DeviceSpec:
    """A card by its properties: the known entry whose name it starts with, sized as the driver reports, else a new one."""
    suffix = "a" if capability == (9, 0) else ""
    arch = f"sm_{capability[0]}{capability[1]}{suffix}"
    for known in _CUDA:
        if name.startswith(known.name):
            return replace(known, name=name, units=multiprocessors, shared_bytes=shared_bytes)
    return DeviceSpec(name, "cuda", arch, multiprocessors, shared_bytes, max_warps)
