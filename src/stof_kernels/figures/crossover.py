"""Where row-wise and block-wise attention change places, and whether the planner sees it; one page per GPU.

Random blocks of several sizes: single positions scatter the kept pairs over almost empty cells, large squares fill them. Each
panel is one block size and one problem size; time of the best configuration of each kernel against the kept share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from stof_kernels.benchmarking.measurement import Measurement

from . import FIGURES, GpuPage, captions, cells
from .layout import Page, empty_page, save

_TITLE = "Crossover"
_FAMILY = "random_blocks"
_KERNELS = {"block_wise": ("Block-wise", "#0072B2", "-", "o"), "row_wise": ("Row-wise", "#D55E00", "--", "s")}
_COLUMNS = (
    "figure", "gpu", "batch", "seq_len", "block", "kept", "kernel", "best_us", "predicted_us", "chosen", "regret",
)  # fmt: skip


@dataclass(frozen=True)
class _Point:
    """One cell of the scatter: per kernel its best measured and predicted time, and what the planner chose."""

    batch: int
    seq_len: int
    block: int
    kept: float
    measured: dict[str, float]
    predicted: dict[str, float]
    chosen: str
    regret: float


def render(rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """One page per GPU, and a line per kernel of each cell in the table."""
    drawn, lines = [], []
    for page in pages:
        mine = [row for row in rows if row.gpu == page.name]
        points = _points(mine)
        drawn.append(_page(page, mine, points))
        lines += [_line(page, point, kernel) for point in points for kernel in point.measured]
    save(drawn, pdf, FIGURES["crossover"].title)
    cells.write_table(table, _COLUMNS, lines)


def _points(rows: Sequence[Measurement]) -> list[_Point]:
    grouped: dict[tuple, list[Measurement]] = {}
    for row in rows:
        if row.mask == _FAMILY and row.status == "ok" and row.median is not None:
            grouped.setdefault((row.batch, row.seq_len, row.mask_params), []).append(row)
    points = [_point(params, batch, seq_len, own) for (batch, seq_len, params), own in grouped.items()]
    return sorted(points, key=lambda p: (p.seq_len, p.batch, p.block, p.kept))


def _point(params: str, batch: int, seq_len: int, rows: Sequence[Measurement]) -> _Point:
    block = int(dict(item.split("=") for item in params.split(";"))["block"])
    regret = next(row for row in rows if row.metric == "regret" and row.operator == "cost")
    chosen = regret.note.removeprefix("chooses ").partition("/")[0]
    return _Point(
        batch,
        seq_len,
        block,
        rows[0].kept or 0.0,
        _best(rows, "device_time"),
        _best(rows, "predicted_time"),
        chosen,
        regret.median or math.nan,
    )


def _best(rows: Sequence[Measurement], metric: str) -> dict[str, float]:
    """Smallest time of each kernel over its configurations, microseconds."""
    best: dict[str, float] = {}
    for row in rows:
        if row.metric == metric and row.median is not None:
            kernel = row.operator.partition("/")[0]
            best[kernel] = min(row.median, best.get(kernel, math.inf))
    return best


def _line(page: GpuPage, point: _Point, kernel: str) -> dict[str, object]:
    return {
        "figure": "crossover",
        "gpu": page.name,
        "batch": point.batch,
        "seq_len": point.seq_len,
        "block": point.block,
        "kept": cells.number(point.kept),
        "kernel": kernel,
        "best_us": cells.number(point.measured[kernel]),
        "predicted_us": cells.number(point.predicted.get(kernel)),
        "chosen": str(point.chosen == kernel).lower(),
        "regret": cells.number(point.regret),
    }


def _page(page: GpuPage, rows: Sequence[Measurement], points: Sequence[_Point]) -> Page:
    title = f"{_TITLE} · {FIGURES['crossover'].title}"
    subtitle = captions.subtitle(page, rows)
    if not points:
        return empty_page(title, subtitle, captions.no_rows(page, "planner", captions.NOT_IN_THE_PAPER))
    drawn = Page(title, subtitle, _caption(page, rows))
    handles = [Line2D([], [], color=c, linestyle=s, marker=m, markersize=4) for _, c, s, m in _KERNELS.values()]
    handles += [
        Line2D([], [], color="#555555", linestyle=":"),
        Line2D([], [], color="none", marker="o", mfc="none", mec="k"),
    ]
    drawn.legend(handles, [*(k[0] for k in _KERNELS.values()), "predicted", "chosen by the planner"])
    groups = sorted({(p.seq_len, p.batch) for p in points})
    blocks = sorted({p.block for p in points})
    for r, (seq_len, batch) in enumerate(groups):
        row = [p for p in points if (p.seq_len, p.batch) == (seq_len, batch)]
        for c, block in enumerate(blocks):
            ax = drawn.figure.add_axes(_place(drawn, r, len(groups), c, len(blocks)))
            _draw(ax, [p for p in row if p.block == block])
            _scale(ax, row)
            ax.set_title(f"batch {batch}, length {seq_len}: blocks of {block} x {block}", fontsize=7.5, loc="left")
            ax.set_xlabel("kept share (%)")
            if c == 0:
                ax.set_ylabel("time of one call (us)")
    return drawn


def _place(page: Page, row: int, rows: int, col: int, cols: int) -> tuple[float, float, float, float]:
    left, gap = page.left + 0.4, 0.42
    width = (page.right - left - gap * (cols - 1)) / cols
    height = (page.top - page.bottom - 0.35) / rows
    top = page.top - row * height - 0.2
    x = left + col * (width + gap)
    return page.box(x, top - height + 0.7, x + width, top)


def _draw(ax: Axes, points: Sequence[_Point]) -> None:
    for kernel, (_, color, line, marker) in _KERNELS.items():
        own = [p for p in points if kernel in p.measured]
        kept = [100 * p.kept for p in own]
        ax.plot(kept, [p.measured[kernel] for p in own], line, color=color, marker=marker, markersize=3, linewidth=1.2)
        ax.plot(kept, [p.predicted[kernel] for p in own], ":", color=color, linewidth=0.9)
        chosen = [p for p in own if p.chosen == kernel]
        times = [p.measured[kernel] for p in chosen]
        ax.plot([100 * p.kept for p in chosen], times, "o", mfc="none", mec="black", markersize=7, linewidth=0.6)
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.5)


def _scale(ax: Axes, points: Sequence[_Point]) -> None:
    """The same logarithmic scales for all panels of a row, with plain numbers."""
    times = [us for p in points for us in (*p.measured.values(), *p.predicted.values())]
    shares = [100 * p.kept for p in points]
    ax.set(xscale="log", yscale="log")
    ax.set_xlim(min(shares) / 1.6, max(shares) * 1.6)
    ax.set_ylim(min(times) / 1.4, max(times) * 1.4)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())


def _caption(page: GpuPage, rows: Sequence[Measurement]) -> list[str]:
    return [
        "Time of one call against the share of kept pairs, for random blocks from single positions (every cell almost empty) "
        "to large squares (cells full). Of each kernel the fastest configuration; dotted, what the cost model predicts for it; "
        f"circled, the kernel that the planner chooses. {captions.shape(rows)}{captions.metric('device_time', False)}",
        _regret(rows),
        captions.source(page, rows),
    ]


def _regret(rows: Sequence[Measurement]) -> str:
    """Chosen over best, geometric mean and worst, for our policy and the paper's, over every measured mask."""
    parts = []
    for policy, name in (("cost", "the cost model"), ("paper", "the paper's Equation 1")):
        found = [row.median for row in rows if row.metric == "regret" and row.operator == policy and row.median]
        if found:
            mean = math.exp(sum(map(math.log, found)) / len(found))
            parts.append(f"{name} {mean:.2f}x on average (geometric mean), {max(found):.2f}x at worst")
    cells_measured = sum(row.metric == "regret" and row.operator == "cost" for row in rows)
    return (
        f"Time of the chosen configuration over the best of all, {cells_measured} masks and sizes: {'; '.join(parts)}."
    )
