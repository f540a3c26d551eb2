"""Table 4: wall time of tuning a model with each system; one page per GPU."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from stof_kernels.benchmarking.measurement import Measurement

from . import FIGURES, GpuPage, captions, cells
from .layout import Page, empty_page, save
from .style import METHODS, MODELS, in_order, labels_for, look

_OURS = "stof"
_COLUMNS = (
    "figure", "gpu", "model", "batch", "seq_len", "method", "tuning_time_s", "times_stof", "status", "source", "reason", "note",
)  # fmt: skip
_REMARK = (
    "The log names no GPU; the paper says A100. LLaMA at batch 16, length 2048 is 246.6 s in the artifact's file and 264.6 s "
    "in the paper's table."
)
_ROW = 0.228  # inches
_SIZE = 8.5
_HEAD, _HEAD_WIDTH, _WIDE = 7.8, (14, 9), 7  # points, letters of a line, columns up to which it is a wide one

Place = tuple[int, int, str]
Found = dict[tuple[object, str], Measurement]


def render(rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """One page per GPU, and a line per number in the CSV."""
    drawn, lines = [], []
    for page in pages:
        mine = [r for r in rows if r.gpu == page.name and r.metric == "tuning_time"]
        found = cells.index(mine, lambda r: (r.batch or 0, r.seq_len or 0, r.model))
        methods = in_order({r.method for r in mine}, METHODS)
        models = in_order({r.model for r in mine}, MODELS)
        places = sorted(
            {(r.batch or 0, r.seq_len or 0, r.model) for r in mine}, key=lambda p: (*p[:2], models.index(p[2]))
        )
        with labels_for(mine):
            drawn.append(_page(page, mine, found, methods, places))
        lines += [_line(page, found, place, method) for place in places for method in methods]
    save(drawn, pdf, FIGURES["table4"].title)
    cells.write_table(table, _COLUMNS, lines)


def _ratio(found: Found, place: Place, method: str) -> float | None:
    """Tuning time as a multiple of ours."""
    theirs, ours = found.get((place, method)), found.get((place, _OURS))
    if theirs is None or ours is None or theirs.median is None or not ours.median:
        return None
    return theirs.median / ours.median


def _line(page: GpuPage, found: Found, place: Place, method: str) -> dict[str, object]:
    row = found.get((place, method))
    return {
        "figure": "table4",
        "gpu": page.name,
        "model": place[2],
        "batch": place[0],
        "seq_len": place[1],
        "method": method,
        "tuning_time_s": cells.number(row.median) if row else "",
        "times_stof": cells.number(_ratio(found, place, method)),
        "status": row.status if row else "not_measured",
        "source": row.source if row else "",
        "reason": "" if row and row.status == "ok" else row.note if row else "no row",
        "note": row.note if row else "",
    }


def _page(
    page: GpuPage, rows: Sequence[Measurement], found: Found, methods: Sequence[str], places: Sequence[Place]
) -> Page:
    title, subtitle = f"Table 4 · {FIGURES['table4'].title}", captions.subtitle(page, rows)
    if not any(row.median is not None for row in rows):
        hint = "The paper shows this table for the A100."
        return empty_page(title, subtitle, captions.no_rows(page, "tuning_cost", hint))
    drawn = Page(title, subtitle, _caption(page, rows, found, methods, places))
    others = [m for m in methods if m != _OURS and any(_ratio(found, place, m) for place in places)]
    narrow = len(methods) + len(others) > _WIDE
    letters = _HEAD_WIDTH[narrow]
    columns = [textwrap.wrap(look(m).label, letters, break_on_hyphens=narrow) for m in (*methods, *others)]
    units = ["s"] * len(methods) + ["/ STOF"] * len(others)
    edges = [drawn.left + 2.5 + (drawn.right - drawn.left - 2.6) * (i + 1) / len(columns) for i in range(len(columns))]
    y = drawn.top - 0.2
    _rule(drawn, y, 1.0)
    tall = max(map(len, columns))
    for line in range(tall):  # names of several words end on the same line
        words = [column[line - tall] if line - tall >= -len(column) else "" for column in columns]
        y = _write(
            drawn, y, ["size", "model"] if line == tall - 1 else ["", ""], words, edges, weight="bold", size=_HEAD
        )
    y = _write(drawn, y, ["(batch, length)", ""], units, edges)
    _rule(drawn, y, 0.6)
    previous = None
    for place in places:
        size = place[:2]
        if previous not in (None, size):
            _rule(drawn, y, 0.3)
        values = [_cell(found, place, m) for m in methods] + [_times(_ratio(found, place, m)) for m in others]
        name = f"({size[0]}, {size[1]})" if size != previous else ""
        y = _write(drawn, y, [name, MODELS.get(place[2], place[2])], values, edges)
        previous = size
    _rule(drawn, y, 0.6)
    means = [_times(cells.geomean([r for p in places if (r := _ratio(found, p, m))])) for m in others]
    y = _write(drawn, y, ["geometric mean", ""], [""] * len(methods) + means, edges, weight="bold")
    _rule(drawn, y, 1.0)
    return drawn


def _cell(found: Found, place: Place, method: str) -> str:
    row = found.get((place, method))
    if row is None or row.median is None:
        return cells.REASONS[row.status if row else "not_measured"][0]
    return f"{row.median:.1f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _write(
    drawn: Page,
    y: float,
    names: Sequence[str],
    values: Sequence[str],
    edges: Sequence[float],
    weight: str = "normal",
    size: float = _SIZE,
) -> float:
    """One line of the table, names at the left and values flush right; the height below it."""
    base = y - _ROW * 0.68
    for x, text in zip((drawn.left + 0.05, drawn.left + 1.5), names, strict=True):
        drawn.text(x, base, text, size=_SIZE, va="baseline", weight=weight)
    for x, text in zip(edges, values, strict=True):
        drawn.text(x, base, text, size=size, va="baseline", ha="right", weight=weight)
    return y - _ROW


def _rule(drawn: Page, y: float, width: float) -> None:
    from matplotlib.lines import Line2D

    xs = (drawn.left / drawn.width, drawn.right / drawn.width)
    drawn.figure.add_artist(Line2D(xs, (y / drawn.height,) * 2, color="#222222", linewidth=width))


def _beside(rows: Sequence[Measurement], methods: Sequence[str]) -> str:
    """Which methods were compiled while others were too; their rows say beside how many."""
    found = {row.method for row in rows if "compiled beside" in row.note}
    names = ", ".join(look(m).label for m in methods if m in found)
    return (
        f"{names}: compiled beside other jobs on the same cores (the table's notes say how many): upper bounds."
        if names
        else ""
    )


def _caption(
    page: GpuPage, rows: Sequence[Measurement], found: Found, methods: Sequence[str], places: Sequence[Place]
) -> list[str]:
    published = captions.is_published(rows)
    missing = [cells.bar(found.get((place, m)), None, m) for place in places for m in methods]
    missing = [b for b in missing if b.status != "no_baseline"]
    paragraphs = [
        "Wall time of tuning in seconds, and as a multiple of STOF's."
        + (
            ""
            if published
            else " From the model on its device to the first tuned call, in a warm process, compile caches empty."
        ),
        cells.footnotes(missing, lambda m: look(m).label).replace("a bar", "a number"),
        _beside(rows, methods),
        _REMARK if published else "",
        captions.VIT if published and any(row.model == "vit" for row in rows) else "",
        captions.source(page, rows),
    ]
    return [p for p in paragraphs if p]
