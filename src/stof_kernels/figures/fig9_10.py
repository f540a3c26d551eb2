"""Figures 9 and 10: speedup of every attention method over unfused PyTorch, for each mask; one page per GPU.

The axis is logarithmic (base 2): the ratios span three orders of magnitude, a doubling looks the same everywhere, and being
slower is as visible as being faster. Bars slower than 1/8 are clipped, with their value printed below the axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stof_kernels.baselines import registry
from stof_kernels.benchmarking.measurement import Measurement

from . import FIGURES, GpuPage, bars, captions, cells
from .layout import Page, empty_page, save
from .style import MASKS, METHODS, in_order, labels_for, look, mask_label

_BASELINE = "torch_native"
_METRICS = ("device_time", "host_time")  # the first one that a page has rows of is drawn
_WIDE_FROM = 9  # methods with bars from which four full-width strips replace 2 x 2: narrower bars do not print
_COLUMNS = cells.speedup_columns("mask", "mask_params", "batch", "seq_len")

Problem = tuple[int, int]


def render(rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """One page per GPU, and a line per bar in the table."""
    drawn, lines = [], []
    for page in pages:
        mine = [row for row in rows if row.gpu == page.name and row.metric in _METRICS]
        metric = next((m for m in _METRICS if any(row.metric == m and row.status == "ok" for row in mine)), _METRICS[0])
        mine = [row for row in mine if row.metric == metric]
        with labels_for(mine):
            drawn.append(_page(page, _Data(mine), metric))
        lines += _Data(mine).lines(page)
    save(drawn, pdf, FIGURES["fig9_10"].title)
    cells.write_table(table, _COLUMNS, lines)


class _Data:
    """The rows of one page, by mask, problem and method."""

    def __init__(self, rows: Sequence[Measurement]) -> None:
        self.rows = rows
        self.published = captions.is_published(rows)
        self.methods = in_order({row.method for row in rows} - {_BASELINE}, METHODS)
        self.repeated = {m for m in self.methods if self._is_repeated(m)}
        own = [row for row in rows if row.method not in self.repeated]
        self.masks = in_order({row.mask for row in own}, MASKS)
        self.problems = sorted({(row.batch or 0, row.seq_len or 0) for row in rows})
        self._found = cells.index(own, lambda row: (row.mask, row.batch, row.seq_len))
        once = [row for row in rows if row.method in self.repeated]
        self._found_once = cells.index(once, lambda row: (row.batch, row.seq_len))

    def _is_repeated(self, method: str) -> bool:
        """A published method with one series for all masks; the authors' plot shows it in every panel, and so does ours."""
        masks = {row.mask for row in self.rows if row.method == method}
        return self.published and len(masks) == 1 and len({row.mask for row in self.rows}) > 2

    def baseline(self, mask: str, problem: Problem) -> Measurement | None:
        return self._found.get(((mask, *problem), _BASELINE))

    def bar(self, mask: str, problem: Problem, method: str) -> cells.Bar:
        once = method in self.repeated
        row = self._found_once.get((problem, method)) if once else self._found.get(((mask, *problem), method))
        return cells.bar(row, self.baseline(mask, problem), method, once and row is not None and row.mask != mask)

    def all_bars(self, methods: Sequence[str]) -> list[cells.Bar]:
        return [self.bar(mask, p, m) for mask in self.masks for p in self.problems for m in methods]

    def with_bars(self) -> list[str]:
        return [m for m in self.methods if any(b.ratio is not None for b in self.all_bars([m]))]

    def lines(self, page: GpuPage) -> list[dict[str, object]]:
        lines = []
        for mask in self.masks:
            for batch, seq_len in self.problems:
                base = self.baseline(mask, (batch, seq_len))
                for method in (_BASELINE, *self.methods):
                    b = self.bar(mask, (batch, seq_len), method)
                    params = b.row.mask_params if b.row and not b.repeated else base.mask_params if base else ""
                    where = {"mask": mask, "mask_params": params, "batch": batch, "seq_len": seq_len}
                    lines.append(cells.table_line("fig9_10", b, page.name, base, **where))
        return lines


def _page(page: GpuPage, data: _Data, metric: str) -> Page:
    title = "Figures 9 and 10 · " + FIGURES["fig9_10"].title
    methods = data.with_bars()
    if not methods:
        reason = (
            "No row of this GPU has a time to draw; the table says why." if data.rows else captions.no_rows(page, "mha")
        )
        return empty_page(title, captions.subtitle(page, data.rows), reason)
    all_bars = data.all_bars(methods)
    ratios = [b.ratio for b in all_bars if b.ratio is not None]
    printed = [b.ratio for b in all_bars if b.ratio is not None and b.method == "stof"]
    span = bars.limits(ratios, printed, room=2 ** (1.1 if _strips(data, methods) else 0.8))
    drawn = Page(
        title, captions.subtitle(page, data.rows), _caption(page, data, methods, metric, min(ratios) < span[0])
    )
    rewritten = captions.reimplemented(data.rows, methods)
    signs = ((" †", data.repeated), (" ‡", page.stale), (" §", rewritten))
    marks = {m: "".join(sign for sign, where in signs if m in where) for m in methods}
    exactness = [b.exact for b in all_bars if b.ratio is not None]
    drawn.legend(*bars.legend_entries(methods, look, exactness, _BASELINE, marks), intro="Left to right:")
    _panels(drawn, data, methods, span)
    return drawn


def _strips(data: _Data, methods: Sequence[str]) -> bool:
    return len(methods) >= _WIDE_FROM or len(data.masks) == 1


def _panels(drawn: Page, data: _Data, methods: Sequence[str], span: tuple[float, float]) -> None:
    """2 x 2 panels, or, when that would make the bars too narrow to print, strips of full width over one set of labels."""
    strips = _strips(data, methods)
    columns = 1 if strips else 2
    grid_rows = -(-len(data.masks) // columns)
    colors = {m: look(m).color for m in methods}
    names, title, between, left = 0.46, 0.24, 0.55, 0.38  # inches for slot names, panel title, columns, y axis
    width = (drawn.right - drawn.left - (columns - 1) * between) / columns
    room = drawn.top - drawn.bottom - 0.1
    height = (room - names) / grid_rows if strips else room / grid_rows
    for i, mask in enumerate(data.masks):
        x = drawn.left + (i % columns) * (width + between)
        top = drawn.top - (i // columns) * height
        bottom = top - height + (0.1 if strips else names + 0.08)
        ax = drawn.figure.add_axes(drawn.box(x + left, bottom, x + width, top - title))
        slots = [
            bars.Slot(str(p[1]), f"batch {p[0]}", tuple(data.bar(mask, p, m) for m in methods)) for p in data.problems
        ]
        last = i // columns == grid_rows - 1
        bars.draw(ax, slots, colors, span, values_for=("stof",), small=4.8, named=last or not strips)
        ax.set_title(mask_label(mask))
        ax.set_title(_summary(slots, data.published), loc="right", fontsize=7, fontweight="normal")
        if i % columns == 0:
            ax.set_ylabel("speedup (log scale)" if not strips else "speedup (log)")


def _summary(slots: Sequence[bars.Slot], published: bool) -> str:
    """STOF's geometric means of a panel, for those who want one number."""
    over, best = [], []
    for slot in slots:
        ours = next((b for b in slot.bars if b.method == "stof" and b.ratio is not None), None)
        if ours is None or ours.ratio is None:
            continue
        over.append(ours.ratio)
        # The baseline is a rival too, at 1: it is exact by definition of the unfused reference.
        rivals = [b for b in slot.bars if b is not ours]
        rival = cells.against_best(ours, rivals, published)
        best.append(min(ours.ratio, rival) if rival is not None else ours.ratio)
    if not over:
        return ""
    kind = "other" if published else "exact other"
    return f"STOF, geometric mean of {len(over)}: {cells.geomean(over):.2f}× native, {cells.geomean(best):.2f}× the best {kind}"


def _caption(page: GpuPage, data: _Data, methods: Sequence[str], metric: str, clips: bool) -> list[str]:
    paragraphs = [
        f"Each bar is the time of {look(_BASELINE).label} (unfused attention) divided by the method's: above the line is "
        "faster. x: sequence length, in groups of one batch size. "
        + captions.shape(data.rows)
        + captions.metric(metric, data.published)
        + (" ▼ and a number below the axis: slower than 1/8, clipped, with its value." if clips else "")
    ]
    notes = [cells.footnotes(data.all_bars(methods), lambda m: look(m).label)]
    if data.repeated:
        labels = ", ".join(look(m).label for m in methods if m in data.repeated)
        notes.append(
            f"† {labels}: one series whose log is of one mask or of none; drawn in every panel, as in the paper."
        )
    notes.append(captions.stale(page, methods))
    notes.append(captions.rewritten_note(data.rows, methods))
    if any(b.exact is False and b.ratio is not None for b in data.all_bars(methods)):
        notes.append(
            "Crossed bars (not exact): the method cannot apply the panel's mask and was timed with one that it can."
        )
    if data.published:
        notes.append(
            "The published numbers differ in protocol from measured pages: fixed mask widths (window 64, others 32) where "
            "ours follow the square root of the length, and each method with the mask that it can apply, unchecked in the logs."
        )
    absent = [m for m in data.methods if m not in methods]
    if absent:
        notes.append(_no_bar_at_all(data, absent))
    if not data.published:
        notes.append(_no_rows_at_all({row.method for row in data.rows}))
    paragraphs += [note for note in notes if note]
    return [*paragraphs, captions.source(page, data.rows)]


def _no_rows_at_all(known: set[str]) -> str:
    """Methods of the experiment that nobody has run on this GPU yet: a reader should know who is not in the comparison."""
    missing = [spec.label for spec in registry.methods_for("mha") if spec.id not in known]
    return f"Not run on this GPU yet: {', '.join(missing)}." if missing else ""


def _no_bar_at_all(data: _Data, methods: Sequence[str]) -> str:
    """Methods without a single number, with the reason of their first row."""
    why: dict[str, list[str]] = {}
    for method in methods:
        first = next(b for b in data.all_bars([method]))
        text = first.reason if first.row else "not measured"
        why.setdefault(text, []).append(look(method).label)
    return "No bar on this page: " + "; ".join(f"{', '.join(names)} ({text})" for text, names in why.items()) + "."
