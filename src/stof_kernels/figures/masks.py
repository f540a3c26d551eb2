"""The masks: which pairs each keeps at 512 tokens, in which 64 x 64 tiles, beside the paper's own kept shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from stof_kernels import masks as registry
from stof_kernels.benchmarking.measurement import Measurement

from . import FIGURES, GpuPage, cells
from .layout import Page, save, wrap

if TYPE_CHECKING:
    import numpy as np

SEQ_LEN, TILE = 512, 64
PAPER_SEQ_LEN = 1024
PAPER_KEPT = {"causal": 50.0, "sliding_window": 6.2, "longformer": 11.2, "bigbird": 19.2}
"""Percent kept at 1,024 tokens, the paper's Table 2."""

_FULL, _KEPT, _DROPPED = "#0072B2", "#D55E00", "#FBE3CF"
_PER_ROW = 4
_PER_PAGE = 2 * _PER_ROW
_COLUMNS = (
    "mask", "params", "seq_len", "kept_percent", "paper_kept_percent", "tile", "full_tiles", "partial_tiles", "empty_tiles",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A mask at one length: (seq_len, seq_len) bool, True = attend, and its tiles (tiles, tiles) as kept pairs each."""

    family: str
    params: str
    keep: np.ndarray
    tiles: np.ndarray

    @property
    def kept(self) -> float:
        """Percent of pairs kept."""
        return 100 * float(self.keep.mean())

    @property
    def counts(self) -> tuple[int, int, int]:
        """Full, partial and empty tiles."""
        full, empty = int((self.tiles == TILE * TILE).sum()), int((self.tiles == 0).sum())
        return full, self.tiles.size - full - empty, empty


def picture(family: str, seq_len: int) -> Picture:
    """The registry's mask of that family at ``seq_len``, a multiple of the tile."""
    import torch

    pattern = registry.get(family, seq_len=seq_len)
    index, zero = torch.arange(seq_len), torch.zeros((), dtype=torch.long)
    keep = pattern.bind(seq_len, seq_len)(zero, zero, index[:, None], index[None, :])
    keep = torch.broadcast_to(keep, (seq_len, seq_len)).numpy()
    n = seq_len // TILE
    params = str(pattern).removeprefix(pattern.family).strip("()")
    return Picture(family, params, keep, keep.reshape(n, TILE, n, TILE).sum(axis=(1, 3)))


def render(rows: Sequence[Measurement], pages: Sequence[GpuPage], pdf: Path, table: Path) -> None:
    """The paper's masks and the artifact's on one page, all others on the next; needs no GPU and no rows."""
    known = (*registry.PAPER, *registry.ARTIFACT)
    others = [family for family in registry.FAMILIES if family not in known]
    groups = [("of the paper and of its artifact", known), ("beyond the paper", others)]
    drawn = []
    for what, families in groups:
        for first in range(0, len(families), _PER_PAGE):
            drawn.append(_page(what, [picture(f, SEQ_LEN) for f in families[first : first + _PER_PAGE]]))
    save(drawn, pdf, FIGURES["masks"].title)
    cells.write_table(
        table, _COLUMNS, [_line(picture(f, s)) for f in registry.FAMILIES for s in (SEQ_LEN, PAPER_SEQ_LEN)]
    )


def _line(p: Picture) -> dict[str, object]:
    full, partial, empty = p.counts
    seq_len = len(p.keep)
    return {
        "mask": p.family,
        "params": p.params,
        "seq_len": seq_len,
        "kept_percent": cells.number(p.kept),
        "paper_kept_percent": PAPER_KEPT.get(p.family, "") if seq_len == PAPER_SEQ_LEN else "",
        "tile": TILE,
        "full_tiles": full,
        "partial_tiles": partial,
        "empty_tiles": empty,
    }


def _page(what: str, pictures: Sequence[Picture]) -> Page:
    caption = [
        f"Rows are queries, columns keys, {SEQ_LEN} of each; a coloured pair attends. The grid shows the {TILE} × {TILE} "
        "tiles: a kernel computes full tiles without looking at the mask, partial ones with it, and skips empty ones."
    ]
    if any(p.family in PAPER_KEPT for p in pictures):
        caption.append(
            f"Each mask of the paper has its kept share at {PAPER_SEQ_LEN} tokens beside the one of the paper's Table 2. "
            "Its band and global widths w and g are round(√S); the artifact's masks have fixed widths and their own strips."
        )
    drawn = Page(f"Masks {what} · kept pairs and their tiles", f"{SEQ_LEN} tokens", caption)
    paint = {"edgecolor": "#444444", "linewidth": 0.4}
    colors = {
        "full tile": _FULL,
        "partial tile: kept": _KEPT,
        "partial tile: not kept": _DROPPED,
        "empty tile": "white",
    }
    drawn.legend([Patch(facecolor=color, **paint) for color in colors.values()], colors)
    height, width = min(2.95, (drawn.top - drawn.bottom - 0.1) / 2), (drawn.right - drawn.left) / _PER_ROW
    words = 0.66
    side = min(height - words - 0.1, width - 0.25)
    for i, p in enumerate(pictures):
        left = drawn.left + (i % _PER_ROW) * width
        top = drawn.top - (i // _PER_ROW) * height
        ax = drawn.figure.add_axes(drawn.box(left, top - words - side, left + side, top - words))
        _draw(ax, p)
        _title(drawn, left, top - 0.14, width - 0.2, p)
    return drawn


def _title(drawn: Page, left: float, top: float, width: float, p: Picture) -> None:
    full, partial, empty = p.counts
    drawn.text(left, top, registry.LABELS.get(p.family, p.family), size=8.5, weight="bold", va="baseline")
    lines = [p.params, f"kept {p.kept:.1f} %; tiles: {full} full, {partial} partial, {empty} empty"]
    if p.family in PAPER_KEPT:
        ours = picture(p.family, PAPER_SEQ_LEN).kept
        lines.append(f"at {PAPER_SEQ_LEN}: {ours:.1f} % (paper: {PAPER_KEPT[p.family]:.1f} %)")
    for i, text in enumerate(line for line in lines if line):
        drawn.text(left, top - 0.14 * (i + 1), wrap(text, width, 6.5)[0], size=6.5, va="baseline")


def _draw(ax: Axes, p: Picture) -> None:
    import numpy as np

    tiles = p.tiles.repeat(TILE, 0).repeat(TILE, 1)
    image = np.ones((*p.keep.shape, 3))
    image[tiles > 0] = to_rgb(_DROPPED)
    image[p.keep] = to_rgb(_KEPT)
    image[tiles == TILE * TILE] = to_rgb(_FULL)
    ax.imshow(image, interpolation="nearest", extent=(0, len(p.keep), len(p.keep), 0))
    ax.set_xticks(range(0, len(p.keep) + 1, TILE), [])
    ax.set_yticks(range(0, len(p.keep) + 1, TILE), [])
    ax.tick_params(length=0)
    ax.grid(True, which="major", axis="both", color="#444444", linewidth=0.35)
    ax.set_axisbelow(False)
    for spine in ax.spines.values():
        spine.set(visible=True, linewidth=0.6, color="#444444")
