"""Scaling: time over the kept pairs at one length and over the length at one window, and the latter's memory; a page per GPU.

Both axes are logarithmic, so time in proportion to the work is a straight line of slope one: the dotted grey line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from stof_kernels.benchmarking.measurement import Measurement

from . import FIGURES, GpuPage, captions, cells
from .layout import Page, empty_page, save
from .style import METHODS, in_order, look, mask_label

_TITLE = "Scaling"
_COLUMNS = (
    "figure", "gpu", "panel", "mask", "mask_params", "batch", "seq_len", "heads", "head_dim", "dtype", "kept", "kept_pairs",
    "method", "median_us", "p20_us", "p80_us", "peak_mib", "status", "exact", "source", "reason",
)  # fmt: skip
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
_DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
_REFERENCE = {"color": "#999999", "linestyle": ":", "linewidth": 1.0, "zorder": 1}

Place = tuple[str, str, int, int, int]
"""Mask, parameters, batch, heads, length: what a row's number is of."""


@dataclass(frozen=True)
class _Panel:
    """One set of axes: which rows, what of them to the right (``x``) and upwards (``metric``), and how it is called."""

    id: str
    title: str
    x_label: str
    y_label: str
    metric: str
    rows: tuple[Measurement, ...]
    x: Callable[[Measurement], float]


def render(rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """One page per GPU, and a line per method and problem in the table."""
    drawn, lines = [], []
    for page in pages:
        mine = [row for row in rows if row.gpu == page.name]
        panels = _panels(mine)
        drawn.append(_page(page, mine, panels))
        peaks = {(_place(row), row.method): row for row in mine if row.metric == "peak_memory"}
        for panel in panels:
            if panel.metric == "device_time":
                lines += [_line(page, panel, row, peaks.get((_place(row), row.method))) for row in panel.rows]
    save(drawn, pdf, FIGURES["scaling"].title)
    cells.write_table(table, _COLUMNS, lines)


def _place(row: Measurement) -> Place:
    return row.mask, row.mask_params, row.batch or 0, row.heads or 0, row.seq_len or 0


def kept_pairs(row: Measurement) -> float:
    """Pairs of a query and a key that the mask keeps, of one head of one batch entry."""
    return (row.kept or 0.0) * (row.seq_len or 0) * (row.kv_len or row.seq_len or 0)


def _panels(rows: Sequence[Measurement]) -> list[_Panel]:
    """Masks of one family at one length make a panel over the kept pairs, one mask at several lengths a panel over these."""
    found: list[_Panel] = []
    times = [row for row in rows if row.metric == "device_time"]
    kept_of = {_place(row): row.kept for row in times if row.kept is not None}
    for (mask, batch, _, seq_len), own in _grouped(times, lambda r: (r.mask, r.batch, r.heads, r.seq_len)).items():
        if len({row.mask_params for row in own}) > 1:
            title = f"{mask_label(mask)}{_common(own)} at {seq_len:,} positions{_shape_of(batch)}"
            x = "kept pairs of a head (millions)"
            own = [row for row in own if _place(row) in kept_of]
            found.append(
                _Panel("kept", title, x, "time of one call (us)", "device_time", tuple(own), _millions(kept_of))
            )
    for metric, y_label in (("device_time", "time of one call (us)"), ("peak_memory", "memory of mask and call (MiB)")):
        of_metric = [row for row in rows if row.metric == metric]
        groups = _grouped(of_metric, lambda r: (r.mask, r.mask_params, r.batch, r.heads))
        for (mask, params, batch, _), own in groups.items():
            if len({row.seq_len for row in own}) > 1:
                title = f"{mask_label(mask)} ({params.replace(';', ', ')}){_shape_of(batch)}"
                if metric == "peak_memory":
                    title = "Memory of the same"
                label = "queries and keys"
                found.append(
                    _Panel("length", title, label, y_label, metric, tuple(own), lambda row: float(row.seq_len or 0))
                )
    return found


def _common(rows: Sequence[Measurement]) -> str:
    """The parameters that all masks of a panel share, in brackets."""
    first, *others = ({*row.mask_params.split(";")} for row in rows)
    shared = first.intersection(*others)
    named = [item for item in rows[0].mask_params.split(";") if item in shared and not item.startswith("seed=")]
    return f" ({', '.join(named)})" if named else ""


def _millions(kept_of: dict[Place, float | None]) -> Callable[[Measurement], float]:
    """Kept pairs of a row's mask, also where the row itself does not say: every method has the same mask."""
    return lambda row: (kept_of[_place(row)] or 0.0) * (row.seq_len or 0) ** 2 / 1e6


def _shape_of(batch: int | None) -> str:
    return f", batch {batch}" if batch and batch > 1 else ""


def _grouped(rows: Sequence[Measurement], key: Callable[[Measurement], tuple]) -> dict[tuple, list[Measurement]]:
    found: dict[tuple, list[Measurement]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _line(page: GpuPage, panel: _Panel, row: Measurement, peak: Measurement | None) -> dict[str, object]:
    return {
        "figure": "scaling",
        "gpu": page.name,
        "panel": panel.id,
        "mask": row.mask,
        "mask_params": row.mask_params,
        "batch": row.batch,
        "seq_len": row.seq_len,
        "heads": row.heads,
        "head_dim": row.head_dim,
        "dtype": row.dtype,
        "kept": cells.number(row.kept),
        "kept_pairs": cells.number(kept_pairs(row)) if row.kept is not None else "",
        "method": row.method,
        "median_us": cells.number(row.median),
        "p20_us": cells.number(row.p20),
        "p80_us": cells.number(row.p80),
        "peak_mib": cells.number(peak.median) if peak else "",
        **cells.outcome(row),
    }


def _page(page: GpuPage, rows: Sequence[Measurement], panels: Sequence[_Panel]) -> Page:
    title = f"{_TITLE} · {FIGURES['scaling'].title}"
    subtitle = captions.subtitle(page, rows)
    timed = {row.method for row in rows if row.metric == "device_time" and row.status == "ok"}
    if not timed:
        reason = "No row of this GPU has a time to draw; the table says why." if rows else ""
        return empty_page(title, subtitle, reason or captions.no_rows(page, "scaling", captions.NOT_IN_THE_PAPER))
    methods = in_order(timed, METHODS)
    drawn = Page(title, subtitle, _caption(page, rows, panels, methods))
    handles = [Line2D([], [], **_look(methods, method)) for method in methods] + [Line2D([], [], **_REFERENCE)]
    labels = [look(method).label + (" ‡" if method in page.stale else "") for method in methods]
    drawn.legend(handles, [*labels, "in proportion to the kept pairs"])
    for i, panel in enumerate(panels):
        ax = drawn.figure.add_axes(_box(drawn, i, len(panels)))
        _draw(ax, panel, methods)
    return drawn


def _box(page: Page, i: int, n: int) -> tuple[float, float, float, float]:
    gap, label = 0.3, 0.5
    width = (page.right - page.left - gap * (n - 1)) / n
    left = page.left + i * (width + gap)
    return page.box(left + label, page.bottom + 0.55, left + width, page.top - 0.35)


def _look(methods: Sequence[str], method: str) -> dict[str, object]:
    """Colour, mark and dashes of a method: the marks tell lines apart in grey print."""
    i = methods.index(method)
    ours = method == "stof"
    return {
        "color": look(method).color,
        "marker": _MARKS[i % len(_MARKS)],
        "linestyle": "-" if ours else _DASHES[i % len(_DASHES)],
        "markersize": 5 if ours else 4,
        "linewidth": 1.8 if ours else 1.1,
        "markeredgecolor": "#444444",
        "markeredgewidth": 0.5,
    }


def _draw(ax: Axes, panel: _Panel, methods: Sequence[str]) -> None:
    by_method = {m: sorted((r for r in panel.rows if r.method == m), key=panel.x) for m in methods}
    timed = {m: [r for r in own if r.status == "ok" and r.median] for m, own in by_method.items()}
    for method in methods:
        own = timed[method]
        if own:
            hollow = {"markerfacecolor": "white"} if any(row.exact is False for row in own) else {}
            ax.plot([panel.x(r) for r in own], [r.median for r in own], **_look(methods, method) | hollow, zorder=3)
    ax.set(xscale="log", yscale="log", xlabel=panel.x_label, ylabel=panel.y_label)
    ax.set_title(panel.title, fontsize=7.5, loc="left")
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.5)
    _scales(ax, panel)
    if panel.metric == "device_time":
        _proportional(ax, panel, [r for own in timed.values() for r in own])
    _missing(ax, panel, by_method)


def _scales(ax: Axes, panel: _Panel) -> None:
    """Room around the points, and ticks at the lengths themselves or at plain numbers."""
    xs = sorted({panel.x(row) for row in panel.rows})
    ys = [row.median for row in panel.rows if row.median]
    ax.set_xlim(xs[0] / 1.35, xs[-1] * 1.35)
    ax.set_ylim(min(ys) / 1.6, max(ys) * 3)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    if panel.id == "length":
        ax.xaxis.set_major_locator(FixedLocator(xs))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _length(value)))
    else:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _length(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def _proportional(ax: Axes, panel: _Panel, rows: Sequence[Measurement]) -> None:
    """Time in proportion to the kept pairs, through our longest call: what linear in the work means."""
    ours = [row for row in rows if row.method == "stof"] or list(rows)
    pairs = {panel.x(row): kept_pairs(row) for row in rows if row.kept}
    last = max(ours, key=panel.x)
    if not last.kept:
        return
    per_pair = (last.median or 0.0) / kept_pairs(last)
    xs = sorted(pairs)
    low, high = ax.get_ylim()
    ax.plot(xs, [per_pair * pairs[x] for x in xs], **_REFERENCE)
    ax.set_ylim(low, high)


def _missing(ax: Axes, panel: _Panel, by_method: dict[str, list[Measurement]]) -> None:
    """A letter at the top of the panel for each point that a method does not have."""
    stacked: dict[float, int] = {}
    for method, own in by_method.items():
        for row in own:
            if row.status != "ok":
                x = panel.x(row)
                level = stacked[x] = stacked.get(x, 0) + 1
                letter = cells.REASONS[row.status][0]
                ax.text(
                    x, 0.995 - 0.03 * level, letter, color=look(method).color, fontsize=7, fontweight="bold",
                    ha="center", va="center", transform=ax.get_xaxis_transform(),
                )  # fmt: skip


def _caption(page: GpuPage, rows: Sequence[Measurement], panels: Sequence[_Panel], methods: Sequence[str]) -> list[str]:
    times = [row for row in rows if row.metric == "device_time"]
    gaps = [
        cells.Bar(row.method, row, None, row.status, "no row" if row.status == "oom" else row.note.split("; ")[0])
        for row in times
        if row.status != "ok" and row.method in methods
    ]
    note = cells.footnotes(gaps, lambda m: look(m).label).replace("In place of a bar:", "A letter in place of a point:")
    inexact = [m for m in methods if any(r.exact is False and r.status == "ok" for r in times if r.method == m)]
    hollow = f"Hollow marks: {', '.join(look(m).label for m in inexact)} cannot apply the mask and ran without it."
    memory = any(panel.metric == "peak_memory" for panel in panels)
    paragraphs = [
        "Time of one call over the work at one length (left) and over the length at one window, both axes logarithmic; dotted: "
        "in proportion to the kept pairs, through STOF's last point. "
        + ("Memory: the mask in the method's own form and all that one call holds at once. " if memory else "")
        + captions.shape(rows)
        + captions.metric("device_time", False),
        _growth(panels),
        note,
        hollow if inexact else "",
        captions.stale(page, methods),
        _absent(times, methods),
    ]
    return [text for text in paragraphs if text] + [captions.source(page, rows)]


def _growth(panels: Sequence[_Panel]) -> str:
    """How our time grows with the kept pairs, over the upper half of each panel's points: the launch is no part of the work."""
    parts = []
    for panel in panels:
        own = [r for r in panel.rows if r.method == "stof" and r.status == "ok" and r.median and r.kept]
        points = sorted((kept_pairs(row), row.median or 0.0) for row in own)
        points = points[len(points) // 2 :]
        if panel.metric == "device_time" and len(points) > 1:
            where = "over the kept pairs" if panel.id == "kept" else "over the length"
            parts.append(f"{slope(points):.2f} {where}")
    fitted = " and ".join(parts)
    return (
        f"STOF's time grows with the kept pairs to the power of {fitted} (upper half of the points)." if parts else ""
    )


def _absent(times: Sequence[Measurement], methods: Sequence[str]) -> str:
    why: dict[str, list[str]] = {}
    for method in in_order({row.method for row in times} - set(methods), METHODS):
        first = next(row for row in times if row.method == method)
        why.setdefault(first.note.split("; ")[0] or "no time", []).append(look(method).label)
    parts = [f"{', '.join(names)} ({text})" for text, names in why.items()]
    return f"No line on this page: {'; '.join(parts)}." if parts else ""


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Exponent of a power law through points (x, y) > 0, by least squares on logarithms: 1 is linear."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
