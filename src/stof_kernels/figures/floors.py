"""Floors: how close our time of every cell is to what the card could do, and to the best exact method measured beside it.

The floor of a cell is the larger of two times plus one launch: q, k, v and the output moved once at the card's copy rate, and
the kept products (4 x head size operations per kept pair, half for the scores, half for the output) at its dense matrix rate.
Both rates and the launch are measured ceilings of the card, from the config's gpus table. A card without them has no floors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stof_kernels.benchmarking.measurement import Measurement

from . import cells

EXPERIMENTS = ("mha", "mha_bf16", "mha_long", "dynamic_mask")
"""What the table reads: everything that times attention alone."""

_OURS = "stof"
_WHOLE, _ALONE = "build_and_attention", "attention"
_BYTES = {"float16": 2, "bfloat16": 2}
COLUMNS = (
    "experiment", "gpu", "operator", "mask", "mask_params", "batch", "seq_len", "kv_len", "heads", "kv_heads", "head_dim",
    "dtype", "kept", "stof_us", "copy_us", "products_us", "floor_us", "efficiency", "best_exact", "best_exact_us", "speedup",
    "source", "reason",
)  # fmt: skip

Shape = tuple[object, ...]
_SHAPE = (
    "experiment",
    "gpu",
    "mask",
    "mask_params",
    "batch",
    "seq_len",
    "kv_len",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
)


@dataclass(frozen=True)
class Rates:
    """A card's measured ceilings: copy in TB/s (read plus written), dense 16-bit products in TFLOP/s, a launch in us."""

    copy_tb_s: float
    matmul_tflops: float
    launch_us: float

    @classmethod
    def of(cls, entry: Mapping[str, object]) -> Rates | None:
        """From an entry of the gpus table; None if it lacks any of the three."""
        found = [entry.get(name) for name in ("copy_tb_s", "matmul_tflops", "launch_us")]
        return None if None in found else cls(*map(float, found))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Floor:
    """Microseconds that a cell takes at least."""

    copy_us: float
    products_us: float
    launch_us: float

    @property
    def total_us(self) -> float:
        """The larger of moving and multiplying, plus the launch."""
        return max(self.copy_us, self.products_us) + self.launch_us


def floor_of(row: Measurement, rates: Rates) -> Floor:
    """Floor of a row's problem; ValueError for a row that lacks its shape, its kept share or has another dtype."""
    sizes = (row.batch, row.heads, row.kv_heads, row.seq_len, row.kv_len, row.head_dim)
    if None in sizes or row.kept is None or row.dtype not in _BYTES:
        raise ValueError(
            f"floor: the row's shape is {sizes}, kept {row.kept}, dtype {row.dtype!r}; allowed: all known, 16-bit"
        )
    batch, heads, kv_heads, q_len, kv_len, dim = map(int, sizes)  # type: ignore[arg-type]
    moved = 2 * batch * dim * (heads * q_len + kv_heads * kv_len) * _BYTES[row.dtype]
    operations = 4.0 * dim * batch * heads * q_len * kv_len * row.kept
    return Floor(moved / rates.copy_tb_s / 1e6, operations / rates.matmul_tflops / 1e6, rates.launch_us)


def tabulate(rows: Iterable[Measurement], rates: Mapping[str, Rates | None], path: Path) -> None:
    """Write the table: a line per cell that we have rows of. ``rates``: by gpu; None, or no entry, where there are none."""
    cells.write_table(path, COLUMNS, lines(rows, rates))


def lines(rows: Iterable[Measurement], rates: Mapping[str, Rates | None]) -> list[dict[str, object]]:
    """Lines of the table as text, in the order of our rows."""
    times = [row for row in rows if row.metric == "device_time" and row.source == "measured"]
    others: dict[Shape, list[Measurement]] = {}
    for row in times:
        if not row.method.startswith(_OURS) and row.operator in ("", _ALONE) and row.status == "ok" and row.exact:
            others.setdefault(_shape(row), []).append(row)
    ours = [row for row in times if row.method == _OURS]
    return [_line(row, rates.get(row.gpu), others.get(_shape(row), [])) for row in ours]


def _shape(row: Measurement) -> Shape:
    return tuple(getattr(row, name) for name in _SHAPE)


def _line(row: Measurement, rates: Rates | None, others: Sequence[Measurement]) -> dict[str, object]:
    floor, reason = _floor_or_reason(row, rates)
    best = min(others, key=lambda other: other.median or 0.0, default=None)
    time = row.median if row.status == "ok" else None
    return {
        **{name: "" if value is None else value for name, value in zip(_SHAPE, _shape(row), strict=True)},
        "operator": row.operator,
        "kept": cells.number(row.kept),
        "stof_us": cells.number(time),
        "copy_us": cells.number(floor and floor.copy_us),
        "products_us": cells.number(floor and floor.products_us),
        "floor_us": cells.number(floor and floor.total_us),
        "efficiency": cells.number(floor.total_us / time if floor and time else None),
        "best_exact": best.method if best else "",
        "best_exact_us": cells.number(best.median if best else None),
        "speedup": cells.number(best.median / time if best and best.median and time else None),
        "source": row.source,
        "reason": reason,
    }


def _floor_or_reason(row: Measurement, rates: Rates | None) -> tuple[Floor | None, str]:
    if row.status != "ok":
        return None, f"{row.status}: {row.note}"
    if rates is None:
        return None, "the config's gpus table has no measured rates for it"
    if row.dtype not in _BYTES:
        return None, f"the rates are those of 16-bit numbers, not of {row.dtype}"
    return floor_of(row, rates), ""
