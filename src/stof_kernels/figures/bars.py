"""Grouped bars of speedups on a logarithmic axis, with every missing or clipped bar marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .cells import EXACTNESS, REASONS, Bar
from .style import Look

GAP = 0.7  # between groups, in slots
_WIDTH = 0.84  # of a slot that its bars fill
_OUTLINE = "#222222"


@dataclass(frozen=True)
class Slot:
    """A place on the x axis: its label, the group it belongs to, and its bars in drawing order."""

    label: str
    group: str
    bars: tuple[Bar, ...]


def limits(
    ratios: Sequence[float], printed: Sequence[float] = (), room: float = 2**0.3, floor: float = 1 / 8
) -> tuple[float, float]:
    """Powers of two around 1 and all ratios, with ``room`` (a factor) for the values of those ``printed``.

    Never below ``floor``: slower bars are clipped, and their value is printed.
    """
    low = math.floor(math.log2(min([*ratios, *(r / room for r in printed if r < 1), 0.99])))
    high = math.ceil(math.log2(max([*ratios, *(r * room for r in printed if r > 1), 1.5])))
    return max(floor, 2.0**low), 2.0**high


def pitch(slots: Sequence[Slot], width: float) -> float:
    """Points from one bar to the next on an axis ``width`` inches wide."""
    xs = positions(slots)
    return width * 72 / (xs[-1] - xs[0] + 1.3) * _WIDTH / max(1, *(len(slot.bars) for slot in slots))


def is_light(color: str) -> bool:
    """Whether black reads better on the colour than white."""
    red, green, blue = to_rgb(color)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.55


def fill(color: str, exact: bool | None) -> list[dict[str, object]]:
    """Patches to lay over each other for one bar: solid if exact, crossed outline if not, striped if nobody recorded it."""
    outline = {"facecolor": "none", "edgecolor": _OUTLINE, "linewidth": 0.35}
    if exact:
        return [{"facecolor": color, "edgecolor": _OUTLINE, "linewidth": 0.35}]
    if exact is False:
        return [{"facecolor": "white", "edgecolor": color, "hatch": "xxxxx", "linewidth": 0.0}, outline]
    stripe = "#00000088" if is_light(color) else "#FFFFFFCC"
    return [{"facecolor": color, "edgecolor": stripe, "hatch": "////", "linewidth": 0.0}, outline]


def positions(slots: Sequence[Slot]) -> list[float]:
    """Centre of each slot: one apart, groups a little further."""
    xs: list[float] = []
    for i, slot in enumerate(slots):
        new_group = i > 0 and slot.group != slots[i - 1].group
        xs.append(xs[-1] + 1 + (GAP if new_group else 0) if xs else 0.0)
    return xs


def draw(
    ax: Axes,
    slots: Sequence[Slot],
    colors: Mapping[str, str],
    span: tuple[float, float],
    values_for: Sequence[str] = (),
    small: float = 5.0,
    named: bool = True,
    printed: Callable[[Slot, Bar], bool] | None = None,
) -> None:
    """Draw the slots' bars from the line at 1 up (faster) or down (slower).

    ``values_for``: methods whose value is printed at the bar, where ``printed`` agrees if it is given; ``small``: size of
    those and of the letters, in points; ``named``: write the slots' and groups' names below the axis.
    """
    ax.set_yscale("log", base=2)
    ax.set_ylim(*span)
    xs = positions(slots)
    ax.set_xlim(xs[0] - 0.65, xs[-1] + 0.65)
    for x, slot in zip(xs, slots, strict=True):
        width = _WIDTH / max(1, len(slot.bars))
        for i, b in enumerate(slot.bars):
            middle = x - _WIDTH / 2 + (i + 0.5) * width
            if b.ratio is None:
                continue
            shown = min(max(b.ratio, span[0]), span[1])
            for patch in fill(colors[b.method], b.exact):
                ax.bar(middle, shown - 1, width * 0.94, bottom=1, **patch)
            if shown == b.ratio and b.method in values_for and (printed is None or printed(slot, b)):
                _value(ax, middle, width * 0.94, b.ratio, small)
        _letters(ax, x, slot, small)
    _clipped_values(ax, xs, slots, span, small)
    ax.axhline(1, color=_OUTLINE, linewidth=0.8, zorder=3)
    labels(ax, xs, slots, rows=_clipped_rows(slots, span), written=named)
    ticks(ax, span)


def _letters(ax: Axes, x: float, slot: Slot, size: float) -> None:
    """A letter for every missing bar, on the side of the line where its neighbours leave room; one for an empty slot."""
    if all(b.ratio is None for b in slot.bars):
        statuses = [b.status for b in slot.bars]
        most = max(REASONS, key=statuses.count)
        letter(ax, x, REASONS[most][0], size + 2, 1)
        return
    width = _WIDTH / max(1, len(slot.bars))
    sides = [0 if b.ratio is None else 1 if b.ratio > 1 else -1 for b in slot.bars]
    for i, b in enumerate(slot.bars):
        if b.ratio is None:
            beside = sides[max(0, i - 1)] + sides[min(len(sides) - 1, i + 1)]
            sides[i] = -1 if beside > 0 else 1
            letter(ax, x - _WIDTH / 2 + (i + 0.5) * width, REASONS[b.status][0], size + 0.4, sides[i])


def letter(ax: Axes, x: float, text: str, size: float, side: int) -> None:
    """The letter of a missing bar, above (side 1) or below (side -1) the line."""
    ax.annotate(
        text, (x, 1), xytext=(0, 1.3 if side > 0 else -2.0), textcoords="offset points", ha="center",
        va="bottom" if side > 0 else "top", fontsize=size, color="#222222",
    )  # fmt: skip


def _value(ax: Axes, middle: float, width: float, ratio: float, size: float) -> None:
    """The ratio at the end of a bar; wider than a narrow bar, it goes from the bar's left edge towards the gap at its right."""
    up = ratio >= 1
    narrow = width * _points_per_slot(ax) < size * 1.1
    ax.annotate(
        short(ratio), (middle - width / 2 if narrow else middle, ratio), xytext=(0.6 * narrow, 1.5 if up else -1.5),
        textcoords="offset points", ha="left" if narrow else "center", va="bottom" if up else "top", fontsize=size,
        rotation=90, color="#222222",
    )  # fmt: skip


def _points_per_slot(ax: Axes) -> float:
    low, high = ax.get_xlim()
    return ax.get_position().width * ax.figure.get_figwidth() * 72 / (high - low)


def short(ratio: float) -> str:
    """Three digits, and a fraction where the axis has fractions: 129, 12.3, 1.23, 0.45, 1/17."""
    if ratio >= 99.5:
        return f"{ratio:.0f}"
    if ratio >= 9.95:
        return f"{ratio:.1f}"
    if ratio >= 0.125:
        return f"{ratio:.2f}"
    return f"1/{1 / ratio:.0f}" if ratio < 0.0995 else f"1/{1 / ratio:.1f}"


def _clipped_rows(slots: Sequence[Slot], span: tuple[float, float]) -> int:
    return max(sum(b.ratio is not None and b.ratio < span[0] for b in slot.bars) for slot in slots)


def _clipped_values(
    ax: Axes, xs: Sequence[float], slots: Sequence[Slot], span: tuple[float, float], size: float
) -> None:
    """Below the axis, where a clipped bar would go on: a triangle at the bar and its value under the slot."""
    for x, slot in zip(xs, slots, strict=True):
        width = _WIDTH / max(1, len(slot.bars))
        row = 0
        for i, b in enumerate(slot.bars):
            if b.ratio is None or b.ratio >= span[0]:
                continue
            middle = x - _WIDTH / 2 + (i + 0.5) * width
            ax.plot(middle, span[0], marker="v", markersize=2.6, color=_OUTLINE, clip_on=False, zorder=4, linewidth=0)
            ax.annotate(
                short(b.ratio), (x, span[0]), xytext=(0, -3.0 - row * (size + 1)), textcoords="offset points", ha="center",
                va="top", fontsize=size, annotation_clip=False, color="#222222",
            )  # fmt: skip
            row += 1


def labels(ax: Axes, xs: Sequence[float], slots: Sequence[Slot], rows: int = 0, written: bool = True) -> None:
    """A rule between groups; if ``written``, slot labels under the axis (below the clipped values), and groups below those."""
    ax.set_xticks([])
    drop = -8.5 - 6.5 * rows
    tall = max(slot.label.count("\n") for slot in slots) + 1
    for x, slot in zip(xs, slots, strict=True):
        if written:
            for line, text in enumerate(slot.label.split("\n")):
                below(ax, x, drop - 7.0 * line, text, 5.8)
    first = 0
    for i in range(1, len(slots) + 1):
        if i == len(slots) or slots[i].group != slots[first].group:
            if written:
                below(ax, (xs[first] + xs[i - 1]) / 2, drop - 7.0 * tall - 2.5, slots[first].group, 7.0, weight="bold")
            if i < len(slots):
                ax.axvline((xs[i - 1] + xs[i]) / 2, color="#BBBBBB", linewidth=0.6, linestyle=(0, (3, 2)), zorder=0)
            first = i


def below(ax: Axes, x: float, drop: float, text: str, size: float, **kwargs: object) -> None:
    """Text whose baseline lies ``drop`` points from the axis, downwards if negative."""
    ax.annotate(
        text, (x, 0), xycoords=("data", "axes fraction"), xytext=(0, drop), textcoords="offset points", ha="center",
        va="baseline", fontsize=size, annotation_clip=False, **kwargs,
    )  # fmt: skip


_MOST_TICKS = 7  # that a panel of the page has the height for


def ticks(ax: Axes, span: tuple[float, float]) -> None:
    """Ticks at the powers of two, or of four or more where they would not fit, 1 always among them; written as factors."""
    low, high = round(math.log2(span[0])), round(math.log2(span[1]))
    step = -(-(high - low + 1) // _MOST_TICKS)
    powers = [p for p in range(low, high + 1) if p % step == 0]
    ax.set_yticks([2.0**p for p in powers], [f"{2**p}×" if p >= 0 else f"1/{2**-p}×" for p in powers])
    ax.set_yticks([], minor=True)


def legend_entries(
    methods: Sequence[str],
    look: Callable[[str], Look],
    exactness: Sequence[bool | None],
    baseline: str,
    marks: Mapping[str, str],
) -> tuple[list[object], list[str]]:
    """Handles and labels: the baseline's line, the methods in drawing order, and what the fills say."""
    handles: list[object] = [Line2D([], [], color=_OUTLINE, linewidth=1.2)]
    labels = [f"{look(baseline).label} = 1"]
    for method in methods:
        handles.append(Patch(facecolor=look(method).color, edgecolor=_OUTLINE, linewidth=0.35))
        labels.append(look(method).label + marks.get(method, ""))
    for exact in (True, False, None):
        if exact in exactness:
            handles.append(tuple(Patch(**patch) for patch in fill("#777777", exact)))
            labels.append(EXACTNESS[exact])
    return handles, labels
