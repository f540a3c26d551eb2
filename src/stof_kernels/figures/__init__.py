"""Figures and tables of the paper, drawn from measurement rows of any GPU: ``draw(figure, tables, pages, pdf, table)``.

Importing this package loads neither matplotlib nor torch; `draw` loads what its figure needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GpuPage:
    """One GPU's page of a figure.

    ``name``: as in the rows' gpu column; ``label``: as people write it; ``source``: recorded or measured; ``date``: of the
    measurement, its first and last day if it took several, empty if unknown; ``missing_reason``: why there may be no rows;
    ``stale``: methods whose rows older code made; ``hardware``: what the label does not tell, such as the processor.
    """

    name: str
    label: str
    source: str
    date: str = ""
    missing_reason: str = ""
    stale: tuple[str, ...] = ()
    hardware: str = ""


@dataclass(frozen=True)
class FigureSpec:
    """What a figure shows and which experiments' tables it reads; ``caption`` is its file in workflow/report."""

    id: str
    title: str
    experiments: tuple[str, ...]
    caption: str


_SPECS = (
    FigureSpec("fig3", "Fused against detached operators", ("motivation",), "fig3.rst"),
    FigureSpec("fig4", "Parameters tuned before and after fusion", ("motivation",), "fig4.rst"),
    FigureSpec("fig9_10", "Attention speedup over unfused PyTorch", ("mha",), "fig9_10.rst"),
    FigureSpec("fig11", "End-to-end speedup over unfused PyTorch", ("end_to_end",), "fig11.rst"),
    FigureSpec("fig12", "Ablation of the attention and the fusion module", ("ablation",), "fig12.rst"),
    FigureSpec("fig13", "The tuner's own work as a share of tuning time", ("overhead",), "fig13.rst"),
    FigureSpec("table4", "Tuning time", ("tuning_cost",), "table4.rst"),
    FigureSpec("crossover", "Row-wise or block-wise", ("planner",), "crossover.rst"),
    FigureSpec("scaling", "Time over the kept pairs and over the length", ("scaling",), "scaling.rst"),
    FigureSpec("duel", "Close cells, turn by turn", ("duel",), "duel.rst"),
    FigureSpec("masks", "The masks and their tiles", (), "masks.rst"),
)
FIGURES: dict[str, FigureSpec] = {spec.id: spec for spec in _SPECS}
"""Figure id -> what it is. Each id is also the module of this package that draws it."""


def draw(
    figure_id: str, tables: Mapping[str, str | Path], pages: Sequence[GpuPage], pdf: str | Path, table: str | Path
) -> None:
    """Draw one figure: a page per entry of ``pages`` into ``pdf``, and the table behind it into ``table`` (CSV).

    ``tables``: experiment -> CSV of measurement rows, for each experiment of the figure's spec. The same input gives the same
    bytes. ValueError for an unknown figure, a missing table or no pages; MeasurementError for a table that is not one.
    """
    if figure_id not in FIGURES:
        raise ValueError(f"figure {figure_id!r} is unknown, allowed: {', '.join(FIGURES)}")
    spec = FIGURES[figure_id]
    missing = [experiment for experiment in spec.experiments if experiment not in tables]
    if missing:
        raise ValueError(
            f"figure {figure_id}: no table for {', '.join(missing)}, allowed: a path for each of its experiments"
        )
    if spec.experiments and not pages:
        raise ValueError(f"figure {figure_id}: no pages, allowed: one GpuPage per configured GPU")
    from stof_kernels.benchmarking.measurement import read_rows

    from .layout import style

    rows = [row for experiment in spec.experiments for row in read_rows(tables[experiment])]
    module = importlib.import_module(f".{figure_id}", __name__)
    with style():
        module.render(rows, tuple(pages), Path(pdf), Path(table))
