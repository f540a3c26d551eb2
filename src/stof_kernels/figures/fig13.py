"""Figure 13: the parts of the tuner's own work as shares of the whole tuning time; one page per GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from stof_kernels.benchmarking.measurement import Measurement

from . import FIGURES, GpuPage, bars, captions, cells
from .layout import Page, empty_page, save
from .style import MODELS, Look, in_order

_METHOD = "stof"
# Lightness falls from the bottom part to the top one, and each has its own hatch, for grey print.
_PARTS: dict[str, tuple[Look, str]] = {
    "analytical_model": (Look("Analytical model", "#0072B2"), ""),
    "hash_encoding": (Look("Hash encoding", "#D55E00"), "...."),
    "numerical_decoding": (Look("Numerical decoding", "#56B4E9"), "////"),
    "reward_algorithm": (Look("Reward", "#F0E442"), "xxxx"),
}
_SPARE = (Look("", "#CC79A7"), "----")
_COLUMNS = (
    "figure", "gpu", "model", "batch", "seq_len", "part", "time_ms", "tuning_time_s", "share_percent", "status", "source",
    "reason", "note",
)  # fmt: skip
_REMARK = (
    "The log names no GPU; the paper says A100. As read in the artifact's script, the analytical model's time is one run "
    "divided by 20 and the other parts are shares of one measured total."
)


@dataclass(frozen=True)
class _Stack:
    model: str
    batch: int
    seq_len: int
    parts: dict[str, Measurement]
    total: Measurement | None

    def share(self, part: str) -> float | None:
        """Percent of the tuning time."""
        row = self.parts.get(part)
        if row is None or row.median is None or self.total is None or not self.total.median:
            return None
        return 100 * row.median / (1000 * self.total.median)

    def complete(self, parts: Sequence[str]) -> bool:
        return all(self.share(part) is not None for part in parts)

    def missing(self, parts: Sequence[str]) -> tuple[str, str]:
        """(status, reason) of the first thing that keeps the stack from being drawn."""
        for row in (self.total, *(self.parts.get(part) for part in parts)):
            if row is None:
                return "not_measured", "no row"
            if row.status != "ok":
                return row.status, row.note.split("; ")[0]
        return "error", "the tuning time is 0"


def render(rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """One page per GPU, and a line per part of each bar in the table."""
    drawn, lines = [], []
    for page in pages:
        mine = [r for r in rows if r.gpu == page.name and r.method == _METHOD]
        stacks = _stacks(mine)
        parts = in_order({r.operator for r in mine if r.metric == "overhead_time"}, _PARTS)
        drawn.append(_page(page, mine, stacks, parts))
        lines += [_line(page, stack, part) for stack in stacks for part in parts]
    save(drawn, pdf, FIGURES["fig13"].title)
    cells.write_table(table, _COLUMNS, lines)


def _stacks(rows: Sequence[Measurement]) -> list[_Stack]:
    models = in_order({r.model for r in rows}, MODELS)
    places = sorted({(r.batch or 0, r.seq_len or 0, models.index(r.model)) for r in rows})
    stacks = []
    for batch, seq_len, i in places:
        here = [r for r in rows if (r.batch or 0, r.seq_len or 0, r.model) == (batch, seq_len, models[i])]
        parts = {r.operator: r for r in here if r.metric == "overhead_time"}
        total = next((r for r in here if r.metric == "tuning_time"), None)
        stacks.append(_Stack(models[i], batch, seq_len, parts, total))
    return stacks


def _line(page: GpuPage, stack: _Stack, part: str) -> dict[str, object]:
    row, share = stack.parts.get(part), stack.share(part)
    status, reason = ("ok", "") if share is not None else stack.missing([part])
    return {
        "figure": "fig13",
        "gpu": page.name,
        "model": stack.model,
        "batch": stack.batch,
        "seq_len": stack.seq_len,
        "part": part,
        "time_ms": cells.number(row.median) if row else "",
        "tuning_time_s": cells.number(stack.total.median) if stack.total else "",
        "share_percent": cells.number(share),
        "status": status,
        "source": row.source if row else "",
        "reason": reason,
        "note": row.note if row else "",
    }


def _page(page: GpuPage, rows: Sequence[Measurement], stacks: Sequence[_Stack], parts: Sequence[str]) -> Page:
    title = f"Figure 13 · {FIGURES['fig13'].title}"
    subtitle = captions.subtitle(page, rows)
    if not parts or not any(stack.complete(parts) for stack in stacks):
        return empty_page(
            title, subtitle, captions.no_rows(page, "overhead", "The paper shows this figure for the A100.")
        )
    drawn = Page(title, subtitle, _caption(page, rows, stacks, parts))
    drawn.legend([Patch(**_paint(part)) for part in parts], [_label(part) for part in parts], intro="Bottom to top:")
    ax = drawn.figure.add_axes(drawn.box(drawn.left + 0.38, drawn.bottom + 0.75, drawn.right, drawn.top - 0.15))
    _draw(ax, stacks, parts)
    return drawn


def _label(part: str) -> str:
    return _PARTS[part][0].label if part in _PARTS else part.replace("_", " ")


def _paint(part: str) -> dict[str, object]:
    look, hatch = _PARTS.get(part, _SPARE)
    return {"facecolor": look.color, "hatch": hatch, "edgecolor": "#222222", "linewidth": 0.4}


def _draw(ax: Axes, stacks: Sequence[_Stack], parts: Sequence[str]) -> None:
    slots = [bars.Slot(MODELS.get(s.model, s.model), f"batch {s.batch}, length {s.seq_len}", ()) for s in stacks]
    xs = bars.positions(slots)
    highest = 0.0
    for x, stack in zip(xs, stacks, strict=True):
        bottom = 0.0
        if not stack.complete(parts):
            letter = cells.REASONS[stack.missing(parts)[0]][0]
            ax.annotate(letter, (x, 0), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
            continue
        for part in parts:
            share = stack.share(part) or 0.0
            ax.bar(x, share, 0.62, bottom=bottom, **_paint(part))
            bottom += share
        ax.annotate(
            f"{_digits(bottom)} %", (x, bottom), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=6.3
        )
        highest = max(highest, bottom)
    ax.set_ylim(0, highest * 1.1)
    ax.set_xlim(xs[0] - 0.65, xs[-1] + 0.65)
    ax.set_ylabel("share of tuning time (%)")
    bars.labels(ax, xs, slots)


def _digits(percent: float) -> str:
    """Two decimals, or two digits of what is smaller than they show."""
    return f"{percent:.2f}" if percent >= 0.1 else f"{percent:.2g}"


def _caption(page: GpuPage, rows: Sequence[Measurement], stacks: Sequence[_Stack], parts: Sequence[str]) -> list[str]:
    published = captions.is_published(rows)
    gone = {stack.missing(parts) for stack in stacks if not stack.complete(parts)}
    letters = [f"{cells.REASONS[status][0]} = {cells.REASONS[status][1]} ({reason})" for status, reason in sorted(gone)]
    paragraphs = [
        "Time of each part of the search that is not running candidates, divided by the wall time of the whole search; the sum "
        "is printed above each bar. Models in groups of one batch size and sequence length.",
        f"In place of a bar: {', '.join(letters)}." if letters else "",
        _REMARK if published else "",
        captions.VIT if published and any(row.model == "vit" for row in rows) else "",
        captions.source(page, rows),
    ]
    return [p for p in paragraphs if p]
