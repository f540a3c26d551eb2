"""Pages: paper size, header, wrapped caption, and PDFs whose bytes depend on the data alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

A4_LANDSCAPE = (11.69, 8.27)
MARGIN = 0.45
_TITLE_SIZE, _SUBTITLE_SIZE, CAPTION_SIZE = 12.0, 9.0, 7.0
_LEADING = 1.4
_INCH = 72.0


@contextmanager
def style() -> Iterator[None]:
    """The figures' matplotlib settings, whatever the user's own are."""
    with matplotlib.rc_context(), resources.as_file(resources.files(__package__) / "stof.mplstyle") as sheet:
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(matplotlib.rc_params_from_file(sheet, use_default_template=False))
        yield


@cache
def _ruler() -> RendererAgg:
    return RendererAgg(1, 1, _INCH)


@cache
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a line of text in inches, in the style's font."""
    scale = 20  # measured large, because glyph advances are rounded to whole points on the ruler
    font = FontProperties(family="DejaVu Sans", size=size * scale, weight=weight)
    return _ruler().get_text_width_height_descent(text, font, ismath=False)[0] / scale / _INCH


def wrap(text: str, width: float, size: float = CAPTION_SIZE) -> list[str]:
    """Lines of ``text`` no wider than ``width`` inches; a word that alone is wider keeps its own line."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if line and text_width(longer, size) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line] if line else lines


class Page:
    """One page: a header at the top, a caption at the bottom, and the room between them for axes (all in inches)."""

    def __init__(
        self, title: str, subtitle: str, caption: Sequence[str], size: tuple[float, float] = A4_LANDSCAPE
    ) -> None:
        self.width, self.height = size
        self.figure = Figure(figsize=size)
        FigureCanvasAgg(self.figure)
        self.left, self.right = MARGIN, self.width - MARGIN
        self.top = self.height - MARGIN
        self._line(title, _TITLE_SIZE, weight="bold")
        if subtitle:
            self._line(subtitle, _SUBTITLE_SIZE)
        self.bottom = self._caption(caption)

    def _line(self, text: str, size: float, weight: str = "normal") -> None:
        self.text(self.left, self.top, text, size=size, va="top", weight=weight)
        self.top -= size * _LEADING / _INCH

    def _caption(self, paragraphs: Sequence[str]) -> float:
        """Draw the caption's paragraphs so that the last line is on the bottom margin; the height where they begin."""
        lines = [line for text in paragraphs for line in wrap(text, self.right - self.left)]
        step = CAPTION_SIZE * _LEADING / _INCH
        for i, line in enumerate(lines, start=1):  # in reading order, for those who copy it or have it read to them
            self.text(
                self.left, MARGIN * 0.8 + (len(lines) - i) * step, line, size=CAPTION_SIZE, va="bottom", color="#222222"
            )
        return MARGIN * 0.8 + len(lines) * step

    def text(self, x: float, y: float, text: str, **kwargs: object) -> None:
        """Text at a place in inches from the lower left corner."""
        self.figure.text(x / self.width, y / self.height, text, **kwargs)

    def box(self, left: float, bottom: float, right: float, top: float) -> tuple[float, float, float, float]:
        """Rectangle in inches as matplotlib wants it for add_axes."""
        return (left / self.width, bottom / self.height, (right - left) / self.width, (top - bottom) / self.height)

    def legend(self, handles: Iterable[object], labels: Iterable[str], intro: str = "") -> None:
        """A legend in rows under the header, no wider than the page; lowers the top of the room."""
        handles, labels = list(handles), list(labels)
        x, y = self.left, self.top - 0.06
        row_height = 0.19
        if intro:
            self.text(x, y - row_height / 2, intro, size=7.5, va="center", style="italic")
            x += text_width(intro, 7.5) + 0.12
        start = x
        for handle, label in zip(handles, labels, strict=True):
            need = 0.34 + text_width(label, 7.5) + 0.12
            if x + need > self.right and x > start:
                x, y = start, y - row_height
            legend = self.figure.legend(
                [handle], [label], loc="center left", bbox_to_anchor=(x / self.width, (y - row_height / 2) / self.height),
                borderpad=0, borderaxespad=0, handletextpad=0.45, handlelength=2.4, handleheight=1.1,
            )  # fmt: skip
            legend.set_in_layout(False)
            x += need
        self.top = y - row_height - 0.04


def empty_page(title: str, subtitle: str, reason: str) -> Page:
    """A page that says why there is nothing to draw."""
    page = Page(title, subtitle, [])
    lines = ["No rows for this GPU.", *wrap(reason, page.width * 0.6, 10.0)]
    middle = page.height / 2
    for i, line in enumerate(lines):
        page.text(page.width / 2, middle - i * 0.24, line, size=10, ha="center", weight="bold" if i == 0 else "normal")
    return page


def save(pages: Sequence[Page], pdf: Path, title: str) -> None:
    """Write the pages whole or not at all. No dates go into the file, so equal pages give equal bytes."""
    pdf.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{pdf.name}.", suffix=".tmp", dir=pdf.parent)
    os.close(handle)
    try:
        with PdfPages(temporary, metadata={"Title": title, "Creator": "stof-kernels", "CreationDate": None}) as book:
            for page in pages:
                book.savefig(page.figure)
        os.chmod(temporary, 0o644)
        os.replace(temporary, pdf)
    finally:
        Path(temporary).unlink(missing_ok=True)
