"""Figures 11 and 12: one panel per GPU, models within groups of one problem size, speedup over unfused PyTorch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stof_kernels.benchmarking import experiments
from stof_kernels.benchmarking.measurement import Measurement

from . import FIGURES, GpuPage, bars, captions, cells
from .layout import A4_LANDSCAPE, MARGIN, Page, empty_page, save, wrap
from .style import METHODS, MODELS, in_order, labels_for, look, mask_label

_BASELINE, _OURS = "torch_native", "stof"
_SMALL, _MEANS = 5.4, 7.0  # points of the values at the bars, and of the means above them
_LEFT = 0.38  # inches of the y axis's numbers and name
_COLUMNS = cells.speedup_columns("mask", "model", "batch", "seq_len")

_MEASURED = (
    "Every output was compared with the same weights in float32 before it was timed. On a GPU a call is captured into a CUDA "
    "graph, or timed as it is where it replays one of its own or cannot be captured (the table's notes say which)."
)

Place = tuple[str, int, int]


@dataclass(frozen=True)
class Panel:
    """What differs between the figures of this kind: names, the paper's own remark, and what a page without rows says."""

    figure: str
    heading: str
    experiment: str
    remark: str = ""
    hint: str = ""


def render(panel: Panel, rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """One page per GPU, and a line per bar in the table."""
    drawn, lines = [], []
    for page in pages:
        mine = [row for row in rows if row.gpu == page.name and row.metric == "latency"]
        found = cells.index(mine, lambda row: (row.model, row.batch, row.seq_len))
        places = _places(mine)
        methods = in_order({row.method for row in mine} - {_BASELINE}, METHODS)
        table_of = {p: {m: _bar(found, p, m) for m in (_BASELINE, *methods)} for p in places}
        with labels_for(mine):
            drawn.append(_page(panel, page, mine, table_of, methods))
        for (model, batch, seq_len), by_method in table_of.items():
            base = found.get(((model, batch, seq_len), _BASELINE))
            mask = next((row.mask for row in mine if row.mask), "")
            where = {"mask": mask, "model": model, "batch": batch, "seq_len": seq_len}
            lines += [cells.table_line(panel.figure, b, page.name, base, **where) for b in by_method.values()]
    save(drawn, pdf, FIGURES[panel.figure].title)
    cells.write_table(table, _COLUMNS, lines)


def _places(rows: Sequence[Measurement]) -> list[Place]:
    """Models within sizes, small sizes first."""
    models = in_order({row.model for row in rows}, MODELS)
    places = {(row.model, row.batch or 0, row.seq_len or 0) for row in rows}
    return sorted(places, key=lambda p: (p[1], p[2], models.index(p[0])))


def _bar(found: dict[tuple[object, str], Measurement], place: Place, method: str) -> cells.Bar:
    return cells.bar(found.get((place, method)), found.get((place, _BASELINE)), method)


def _page(
    panel: Panel,
    page: GpuPage,
    rows: Sequence[Measurement],
    table_of: dict[Place, dict[str, cells.Bar]],
    methods: Sequence[str],
) -> Page:
    title = f"{panel.heading} · {FIGURES[panel.figure].title}"
    subtitle = captions.subtitle(page, rows)
    with_bars = [m for m in methods if any(by[m].ratio is not None for by in table_of.values())]
    if not with_bars:
        reason = captions.no_rows(page, panel.experiment, panel.hint)
        return empty_page(
            title, subtitle, "No row of this GPU has a time to draw; the table says why." if rows else reason
        )
    all_bars = [by[m] for by in table_of.values() for m in with_bars]
    ratios = [b.ratio for b in all_bars if b.ratio is not None]
    span = bars.limits(ratios, ratios)
    slots = [
        bars.Slot(MODELS.get(model, model), f"batch {batch}, length {seq_len}", tuple(by[m] for m in with_bars))
        for (model, batch, seq_len), by in table_of.items()
    ]
    wide = _is_wide(slots)
    drawn = Page(title, subtitle, _caption(panel, page, rows, all_bars, with_bars, wide))
    signs = ((" ‡", page.stale), (" §", captions.reimplemented(rows, with_bars)))
    marks = {m: "".join(sign for sign, where in signs if m in where) for m in with_bars}
    exactness = [b.exact for b in all_bars if b.ratio is not None]
    drawn.legend(*bars.legend_entries(with_bars, look, exactness, _BASELINE, marks), intro="Left to right:")
    means = wrap(_means(table_of, with_bars), drawn.right - drawn.left - _LEFT, _MEANS)
    top = drawn.top - 0.18 - 0.12 * len(means)
    ax = drawn.figure.add_axes(drawn.box(drawn.left + _LEFT, drawn.bottom + 0.75, drawn.right, top))
    colors = {m: look(m).color for m in with_bars}
    printed = None if wide else _ours_and_the_best
    bars.draw(ax, slots, colors, span, values_for=with_bars, small=_SMALL, printed=printed)
    ax.set_ylabel("speedup (log scale)")
    ax.set_title("\n".join(means), fontsize=_MEANS, fontweight="normal")
    return drawn


def _is_wide(slots: Sequence[bars.Slot]) -> bool:
    """Whether there is room for a value at every bar."""
    return bars.pitch(slots, A4_LANDSCAPE[0] - 2 * MARGIN - _LEFT) > 0.9 * _SMALL


def _ours_and_the_best(slot: bars.Slot, bar: cells.Bar) -> bool:
    """Our bar and the longest of the others."""
    others = [b.ratio for b in slot.bars if b.method != _OURS and b.ratio is not None]
    return bar.method == _OURS or (bool(others) and bar.ratio == max(others))


def _means(table_of: dict[Place, dict[str, cells.Bar]], methods: Sequence[str]) -> str:
    parts = []
    for method in methods:
        ratios = [by[method].ratio for by in table_of.values() if by[method].ratio is not None]
        parts.append(f"{look(method).label} {cells.geomean(ratios):.2f}× ({len(ratios)})")
    return "Geometric mean (of so many bars):  " + "  ·  ".join(parts)


def _caption(
    panel: Panel,
    page: GpuPage,
    rows: Sequence[Measurement],
    all_bars: Sequence[cells.Bar],
    methods: Sequence[str],
    wide: bool,
) -> list[str]:
    published = captions.is_published(rows)
    masks = [mask_label(mask) for mask in sorted({row.mask for row in rows if row.mask})]
    paragraphs = [
        f"Each bar is the latency of {look(_BASELINE).label} divided by the method's: above the line is faster. "
        f"Models in groups of one batch size and sequence length; attention mask: {', '.join(masks) or 'not recorded'}. "
        + captions.metric("latency", published),
        "" if wide else f"Values stand at the bars of {look(_OURS).label} and of the fastest other; the table has all.",
        cells.footnotes(all_bars, lambda m: look(m).label),
        _without_bar(rows, methods),
        "" if published else _absent(panel, rows),
        captions.stale(page, methods),
        captions.rewritten_note(rows, methods),
    ]
    if published:
        paragraphs.append(f"{captions.LABEL_EXCHANGE} {panel.remark}".strip())
    else:
        paragraphs.append(_MEASURED)
    images = sorted({row.kv_len for row in rows if row.model == "vit" and row.kv_len})
    if any(row.model == "vit" for row in rows) and published:
        paragraphs.append(captions.VIT)
    elif images:
        paragraphs.append(f"ViT: the largest square image of at most that many tokens, {', '.join(map(str, images))}.")
    return [p for p in paragraphs if p] + [captions.source(page, rows)]


def _absent(panel: Panel, rows: Sequence[Measurement]) -> str:
    """Methods of the experiment that have no row at all on this page."""
    absent = {*experiments.get(panel.experiment).methods} - {row.method for row in rows}
    names = "; ".join(look(method).label for method in in_order(absent, METHODS))
    return f"Not measured: {names}." if names else ""


def _without_bar(rows: Sequence[Measurement], drawn: Sequence[str]) -> str:
    """Methods that have rows and no time anywhere, with the reasons."""
    missing = in_order({row.method for row in rows} - {_BASELINE, *drawn}, METHODS)
    bars_of = [cells.bar(row, None, row.method) for method in missing for row in rows if row.method == method]
    text = cells.footnotes([b for b in bars_of if b.status != "no_baseline"], lambda m: look(m).label)
    return re.sub(r"\b\w = ", "", text.replace("In place of a bar", "No bar"))  # there is no letter without a bar
