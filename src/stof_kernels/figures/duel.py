"""Duels: the rival's time over STOF's, both of the same turns in one process, with its spread; a page per GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stof_kernels.benchmarking.measurement import Measurement

from . import FIGURES, GpuPage, captions, cells
from .layout import Page, empty_page, save, text_width
from .style import FASTER, METHODS, SLOWER, in_order, look, mask_label

_TITLE = "Duels"
_COLUMNS = (
    "figure", "gpu", "experiment", "mask", "mask_params", "batch", "seq_len", "heads", "kv_heads", "head_dim", "dtype", "rival",
    "rival_us", "stof_us", "speedup", "p20", "p80", "turns", "verdict", "status", "exact", "source", "reason",
)  # fmt: skip
_METRICS = ("device_time", "stof_time", "speedup")
_MARKS = {
    "fa4": "o",
    "flex_flash": "s",
    "sdpa_cudnn": "^",
    "mcfuser": "D",
    "fa2": "v",
    "flex_attention": "P",
    "sdpa": "X",
}
_ROWS = 30  # of one column of the page
_GROUP = 1.5  # room of a group's title, in rows
_SMALL = 6.5  # points
_TIE = "tie"

_CELL = ("operator", "mask", "mask_params", "batch", "seq_len", "heads", "kv_heads", "head_dim", "dtype")


@dataclass(frozen=True)
class _Fight:
    """One cell and one rival: the rows of its three numbers, of which a fight that was not held has the first alone."""

    rival: Measurement
    ours: Measurement | None
    ratio: Measurement | None

    @property
    def spread(self) -> tuple[float, float]:
        """20th and 80th percentile of a fight that was held, the ratio itself where a row has none."""
        low, high = self.ratio.p20, self.ratio.p80  # type: ignore[union-attr]
        return low or self.ratio.median, high or self.ratio.median  # type: ignore[union-attr, return-value]

    @property
    def verdict(self) -> str:
        """Who is faster in at least eight of ten turns; a tie where neither is."""
        if self.ratio is None or self.ratio.median is None:
            return ""
        low, high = self.spread
        return "stof" if low > 1 else self.rival.method if high < 1 else _TIE


def render(rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """One page per GPU, and a line per duel in the table."""
    drawn, lines = [], []
    for page in pages:
        mine = [row for row in rows if row.gpu == page.name]
        fights = _fights(mine)
        drawn.append(_page(page, mine, fights))
        lines += [_line(page, fight) for fight in fights]
    save(drawn, pdf, FIGURES["duel"].title)
    cells.write_table(table, _COLUMNS, lines)


def _place(row: Measurement) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in _CELL)


def _fights(rows: Sequence[Measurement]) -> list[_Fight]:
    """Cells of one experiment, shape and mask together, by length; rivals of a cell beside each other."""
    found: dict[tuple, dict[str, Measurement]] = {}
    for row in rows:
        if row.metric in _METRICS:
            found.setdefault((_place(row), row.method), {})[row.metric] = row
    fights = [_Fight(own["device_time"], own.get("stof_time"), own.get("speedup")) for own in found.values()]
    methods = in_order({fight.rival.method for fight in fights}, METHODS)
    groups = list(dict.fromkeys(_group(fight.rival) for fight in fights))

    def order(fight: _Fight) -> tuple:
        row = fight.rival
        return groups.index(_group(row)), row.batch or 0, row.seq_len or 0, row.mask, methods.index(row.method)

    return sorted(fights, key=order)


def _group(row: Measurement) -> tuple[object, ...]:
    """What stands above rows: experiment, mask, heads and dtype."""
    return row.operator, row.mask, row.heads, row.kv_heads, row.head_dim, row.dtype


def _line(page: GpuPage, fight: _Fight) -> dict[str, object]:
    row, ratio = fight.rival, fight.ratio
    return {
        "figure": "duel",
        "gpu": page.name,
        "experiment": row.operator,
        **{name: getattr(row, name) for name in _CELL if name != "operator"},
        "rival": row.method,
        "rival_us": cells.number(row.median),
        "stof_us": cells.number(fight.ours and fight.ours.median),
        "speedup": cells.number(ratio and ratio.median),
        "p20": cells.number(ratio and ratio.p20),
        "p80": cells.number(ratio and ratio.p80),
        "turns": ratio.samples if ratio else "",
        "verdict": fight.verdict,
        **cells.outcome(row),
    }


def _page(page: GpuPage, rows: Sequence[Measurement], fights: Sequence[_Fight]) -> Page:
    title = f"{_TITLE} · {FIGURES['duel'].title}"
    subtitle = captions.subtitle(page, rows)
    held = [fight for fight in fights if fight.verdict]
    if not held:
        reason = captions.no_rows(page, "duel", captions.NOT_IN_THE_PAPER) if not fights else _gaps(fights)
        return empty_page(title, subtitle, reason)
    drawn = Page(title, subtitle, _caption(page, rows, fights))
    methods = in_order({fight.rival.method for fight in fights}, METHODS)
    handles = [Line2D([], [], **_marker(method, True), linestyle="none") for method in methods]
    labels = [look(method).label + (" ‡" if method in page.stale else "") for method in methods]
    if any(fight.rival.exact is False for fight in held):
        handles.append(Line2D([], [], **_marker(methods[0], False) | {"color": "#777777"}, linestyle="none"))
        labels.append("rival not exact")
    drawn.legend(handles, labels, intro="Rival:")
    span = _span(held)
    columns = _columns(fights)
    for i, column in enumerate(columns):
        _draw(drawn, column, i, len(columns), span)
    return drawn


def _columns(fights: Sequence[_Fight]) -> list[list[_Fight]]:
    """The fights cut into columns of about equal height, between groups where one is near."""
    number = math.ceil(len(fights) / _ROWS)
    size, columns, start = math.ceil(len(fights) / number), [], 0
    while start < len(fights):
        stop = min(start + size, len(fights))
        ends = [i for i in range(max(start + 1, stop - 2), min(stop + 3, len(fights))) if _starts(fights, i)]
        stop = min(ends, key=lambda i: abs(i - stop)) if ends and stop < len(fights) else stop
        columns.append(list(fights[start:stop]))
        start = stop
    return columns


def _starts(fights: Sequence[_Fight], i: int) -> bool:
    return i == 0 or _group(fights[i].rival) != _group(fights[i - 1].rival)


def _span(held: Sequence[_Fight]) -> tuple[float, float]:
    """The same axis for all columns, 1 always inside."""
    ends = [end for fight in held for end in fight.spread]
    return min(0.95, min(ends) / 1.03), max(1.05, max(ends) * 1.03)


def _draw(page: Page, fights: Sequence[_Fight], index: int, columns: int, span: tuple[float, float]) -> None:
    gap, label = 0.5, 1.1 + max(text_width(_name(fight.rival), _SMALL) for fight in fights) * 0.2
    width = (page.right - page.left - gap * (columns - 1)) / columns
    left = page.left + index * (width + gap)
    groups = sum(_starts(fights, i) for i in range(len(fights)))
    height = len(fights) + groups * _GROUP
    ax = page.figure.add_axes(page.box(left + label, page.bottom + 0.45, left + width - 0.62, page.top - 0.1))
    ax.set(xscale="log", xlim=span, ylim=(max(height, 12) - 0.2, -0.3))
    ax.axvspan(span[0], 1, color=SLOWER.color, alpha=0.07, linewidth=0)
    ax.axvspan(1, span[1], color=FASTER.color, alpha=0.07, linewidth=0)
    ax.axvline(1, color="#222222", linewidth=0.9)
    y = 0.0
    for i, fight in enumerate(fights):
        if _starts(fights, i):
            ax.annotate(
                _title(fight.rival), (0, y + 0.5), xycoords=ax.get_yaxis_transform(), xytext=(2 - label * 72, 0),
                textcoords="offset points", fontsize=_SMALL + 0.5, weight="bold", va="center", annotation_clip=False,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
            )  # fmt: skip
            y += _GROUP
        _one(ax, fight, y)
        y += 1
    ax.set_yticks([])
    ax.set_xlabel("rival's time / STOF's time (above 1: STOF is faster)", fontsize=7)
    ax.xaxis.set_major_locator(LogLocator(subs=(0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 2, 3, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", labelsize=_SMALL)
    ax.grid(True, axis="x", which="major", color="#DDDDDD", linewidth=0.5)


def _one(ax: Axes, fight: _Fight, y: float) -> None:
    """A row: the cell's size at the left, the ratio with its spread, and the ratio as a number at the right."""
    side = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "fontsize": _SMALL, "va": "center"}
    ax.annotate(_name(fight.rival), (0, y), xytext=(-4, 0), ha="right", annotation_clip=False, **side)
    if not fight.verdict:
        letter = cells.REASONS[fight.rival.status][0]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        ax.text(1, y, letter, ha="center", va="center", fontsize=_SMALL, style="italic", bbox=box)
        return
    ratio = fight.ratio
    ax.plot(fight.spread, [y, y], color="#444444", linewidth=1.4, solid_capstyle="butt")
    ax.plot(ratio.median, y, **_marker(fight.rival.method, fight.rival.exact))  # type: ignore[union-attr]
    text = f"{ratio.median:.3f}" + (" =" if fight.verdict == _TIE else "")  # type: ignore[union-attr]
    ax.annotate(text, (1, y), xytext=(4, 0), ha="left", annotation_clip=False, **side)


def _marker(method: str, exact: bool | None) -> dict[str, object]:
    color = look(method).color
    face = "white" if exact is False else color
    return {
        "marker": _MARKS.get(method, "o"),
        "color": color,
        "mfc": face,
        "mec": "#222222",
        "mew": 0.4,
        "markersize": 4,
    }


def _name(row: Measurement) -> str:
    return f"{row.batch} × {row.seq_len:,}"


def _title(row: Measurement) -> str:
    heads = f"{row.heads}/{row.kv_heads}" if row.heads != row.kv_heads else f"{row.heads}"
    return f"{mask_label(row.mask)}, {heads} heads × {row.head_dim}, {row.dtype} ({row.operator})"


def _caption(page: GpuPage, rows: Sequence[Measurement], fights: Sequence[_Fight]) -> list[str]:
    held = [fight for fight in fights if fight.verdict]
    turns = [fight.ratio.samples for fight in held if fight.ratio and fight.ratio.samples]
    paragraphs = [
        "Cells of other experiments, the close ones where any are, measured again: STOF and a rival in one process, on the "
        f"same tensors, turn by turn ({_range(turns)} turns each), so that the clock, which differs from card to card and "
        "from moment to moment, is the same for both. The ratio is that of the medians of two neighbouring turns: mark, "
        'median over turns; line, 20th to 80th percentile. "=": 1 lies between these, a tie.',
        _count(held),
        _gaps(fights),
        captions.stale(page, {fight.rival.method for fight in fights}),
        captions.source(page, rows),
    ]  # fmt: skip
    return [text for text in paragraphs if text]


def _range(turns: Sequence[int]) -> str:
    low, high = min(turns), max(turns)
    return f"{low}" if low == high else f"{low} to {high}"


def _count(held: Sequence[_Fight]) -> str:
    """The score against each rival."""
    parts = []
    for method in in_order({fight.rival.method for fight in held}, METHODS):
        own = [fight for fight in held if fight.rival.method == method]
        won, lost = (sum(f.verdict == who for f in own) for who in ("stof", method))
        ties = len(own) - won - lost
        mean = cells.geomean(f.ratio.median for f in own)  # type: ignore[union-attr]
        parts.append(
            f"{look(method).label}: {len(own)} cells, STOF faster in {won}, slower in {lost}, {ties} tie{'s' * (ties != 1)}, "
            f"geometric mean {mean:.3f}x"
        )
    return f"Against {'; '.join(parts)}."


def _gaps(fights: Sequence[_Fight]) -> str:
    missing = [cells.bar(fight.rival, None, fight.rival.method) for fight in fights if not fight.verdict]
    return cells.footnotes(missing, lambda method: look(method).label).replace("a bar", "a mark")
