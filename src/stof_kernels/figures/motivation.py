"""Figures 3 and 4: two ways to run the same pair of operators, at eight sizes; one page per GPU, one panel per pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from stof_kernels.benchmarking.measurement import Measurement

from . import FIGURES, GpuPage, bars, captions, cells
from .layout import Page, empty_page, save
from .style import FASTER, OPERATORS, SLOWER, Look, in_order

_METRICS = ("device_time", "host_time")
_COLUMNS = cells.speedup_columns("operator", "group", "batch", "seq_len", "hidden")
_FLOOR = 1 / 64
# Notes of the rows that a reader of the bar should see; the others say the same in every row.
_COMMON_NOTES = ("printed label", "figure ")

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Pair:
    """The two methods of a figure, and its words: ``remark`` for published rows, ``measured`` for our own."""

    figure: str
    heading: str
    baseline: str
    method: str
    question: str
    line: str
    remark: str
    measured: str


@dataclass(frozen=True)
class _Panel:
    operator: str
    sizes: list[Size]
    bars: list[cells.Bar]
    baselines: list[Measurement | None]


def render(pair: Pair, rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """One page per GPU, and a line per bar in the table."""
    drawn, lines = [], []
    for page in pages:
        mine = [r for r in rows if r.gpu == page.name and r.method in (pair.baseline, pair.method)]
        metric = next((m for m in _METRICS if any(r.metric == m for r in mine)), _METRICS[0])
        mine = [r for r in mine if r.metric == metric]
        panels = _panels(pair, mine)
        drawn.append(_page(pair, page, mine, panels, metric))
        lines += [line for panel in panels for line in _lines(pair, page, panel)]
    save(drawn, pdf, FIGURES[pair.figure].title)
    cells.write_table(table, _COLUMNS, lines)


def _panels(pair: Pair, rows: Sequence[Measurement]) -> list[_Panel]:
    """Sizes in the paper's order: batch, then sequence length, then hidden size."""
    found = cells.index(rows, lambda r: (r.operator, r.batch, r.seq_len, r.hidden))
    panels = []
    for operator in in_order({r.operator for r in rows}, OPERATORS):
        sizes = sorted({(r.batch or 0, r.seq_len or 0, r.hidden or 0) for r in rows if r.operator == operator})
        baselines = [found.get(((operator, *size), pair.baseline)) for size in sizes]
        both = zip(sizes, baselines, strict=True)
        made = [cells.bar(found.get(((operator, *size), pair.method)), base, pair.method) for size, base in both]
        panels.append(_Panel(operator, sizes, made, baselines))
    return panels


def _lines(pair: Pair, page: GpuPage, panel: _Panel) -> list[dict[str, object]]:
    lines = []
    for i, ((batch, seq_len, hidden), b, base) in enumerate(
        zip(panel.sizes, panel.bars, panel.baselines, strict=True), 1
    ):
        where = {"operator": panel.operator, "group": f"G{i}", "batch": batch, "seq_len": seq_len, "hidden": hidden}
        line = cells.table_line(pair.figure, b, page.name, base, **where)
        remark = base.note if base and base.source == "measured" else _remark(base)
        lines.append(line | {"note": f"{line['note']}; {pair.baseline}: {remark}" if remark else line["note"]})
    return lines


def _remark(row: Measurement | None) -> str:
    """What is peculiar to this row; notes of our own rows name kernels, which the table lists."""
    parts = row.note.split("; ") if row and row.source != "measured" else []
    return "; ".join(part for part in parts if part and not part.startswith(_COMMON_NOTES))


def _page(pair: Pair, page: GpuPage, rows: Sequence[Measurement], panels: Sequence[_Panel], metric: str) -> Page:
    title = f"{pair.heading} · {FIGURES[pair.figure].title}"
    all_bars = [b for panel in panels for b in panel.bars]
    ratios = [b.ratio for b in all_bars if b.ratio is not None]
    if not ratios:
        return empty_page(title, captions.subtitle(page, rows), captions.no_rows(page, "motivation"))
    span = bars.limits(ratios, ratios, floor=_FLOOR)
    drawn = Page(title, captions.subtitle(page, rows), _caption(pair, page, rows, panels, metric))
    handles = [Patch(**_paint(look)) for look in (FASTER, SLOWER)]
    drawn.legend(handles, [f"{pair.question} {look.label}" for look in (FASTER, SLOWER)], intro=pair.line)
    gap, left = 0.3, 0.38
    width = (drawn.right - drawn.left - gap * (len(panels) - 1)) / len(panels)
    for i, panel in enumerate(panels):
        x = drawn.left + i * (width + gap)
        ax = drawn.figure.add_axes(drawn.box(x + left, drawn.bottom + 0.85, x + width, drawn.top - 0.42))
        _draw(ax, panel, span, first=i == 0)
    return drawn


def _paint(look: Look) -> dict[str, object]:
    return {
        "facecolor": look.color,
        "edgecolor": "#222222",
        "linewidth": 0.4,
        "hatch": "////" if look is SLOWER else "",
    }


def _draw(ax: Axes, panel: _Panel, span: tuple[float, float], first: bool) -> None:
    marked = [
        f"{'*' if _remark(b.row) or _remark(base) else ''}" for b, base in zip(panel.bars, panel.baselines, strict=True)
    ]
    ax.set_yscale("log", base=2)
    ax.set_ylim(*span)
    for i, (b, star) in enumerate(zip(panel.bars, marked, strict=True)):
        if b.ratio is None:
            bars.letter(ax, i, cells.REASONS[b.status][0], 7.0, 1)
            continue
        shown = min(max(b.ratio, span[0]), span[1])
        ax.bar(i, shown - 1, 0.72, bottom=1, **_paint(FASTER if b.ratio >= 1 else SLOWER))
        up = b.ratio >= 1
        cut = shown != b.ratio  # then the value stands inside the bar: below the axis are the sizes
        text = ("▼ " if cut else "") + bars.short(b.ratio) + star
        ax.annotate(
            text, (i, shown), xytext=(0, 4 if cut else 2 if up else -2), textcoords="offset points", ha="center",
            va="bottom" if up or cut else "top", fontsize=6.3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
        )  # fmt: skip
    ax.axhline(1, color="#222222", linewidth=0.8, zorder=3)
    ax.set_xlim(-0.6, len(panel.sizes) - 0.4)
    ax.set_xticks([])
    for i, size in enumerate(panel.sizes):
        for line, text in enumerate((f"G{i + 1}", *map(str, size))):
            bars.below(ax, i, -9.5 - 8.0 * line, text, 6.3)
    for line, word in enumerate(("batch", "length", "hidden"), 1):
        if first:
            ax.annotate(
                word, (0, 0), xycoords="axes fraction", xytext=(-4, -9.5 - 8.0 * line), textcoords="offset points",
                ha="right", va="baseline", fontsize=6.3, annotation_clip=False, style="italic",
            )  # fmt: skip
    bars.ticks(ax, span)
    ratios = [b.ratio for b in panel.bars if b.ratio is not None]
    wins = sum(r > 1 for r in ratios)
    ax.set_title(OPERATORS.get(panel.operator, panel.operator), pad=14)
    mean = f"geometric mean {cells.geomean(ratios):.2f}×, faster in {wins} of {len(ratios)}" if ratios else "no bar"
    ax.annotate(mean, (0, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points", fontsize=6.8)
    if first:
        ax.set_ylabel("speedup (log scale)")


def _caption(
    pair: Pair, page: GpuPage, rows: Sequence[Measurement], panels: Sequence[_Panel], metric: str
) -> list[str]:
    published = captions.is_published(rows)
    stars = []
    for panel in panels:
        for i, (b, base) in enumerate(zip(panel.bars, panel.baselines, strict=True), 1):
            found = [
                f"{name}, {_remark(row)}" for name, row in ((pair.method, b.row), (pair.baseline, base)) if _remark(row)
            ]
            stars += [
                f"{OPERATORS.get(panel.operator, panel.operator)} G{i}: {text.replace('_', ' ')}" for text in found
            ]
    paragraphs = [
        f"{pair.line} Above it is faster. Sizes {_groups(panels)} are batch, sequence length and hidden size. "
        + captions.metric(metric, published),
        cells.footnotes([b for panel in panels for b in panel.bars], lambda m: m.replace("_", " ")),
        f"* {'; '.join(stars)}." if stars else "",
        pair.remark if published else pair.measured,
        captions.source(page, rows),
    ]
    return [p for p in paragraphs if p]


def _groups(panels: Sequence[_Panel]) -> str:
    most = max(len(panel.sizes) for panel in panels)
    return f"G1 to G{most}" if most > 1 else "(G1)"
