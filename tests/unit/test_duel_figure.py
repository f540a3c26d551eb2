"""The figure of duels: who won, and room for all of them."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stof_kernels.benchmarking import config as checks
from stof_kernels.benchmarking import experiments, fights
from stof_kernels.benchmarking.experiments import duel_cells
from stof_kernels.benchmarking.measurement import Measurement, write_rows

ROOT = Path(__file__).resolve().parents[2]
CONFIG = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
checks.normalize(CONFIG)
SHAPES = {
    "mha": {"heads": 2, "head_dim": 16, "dtype": "float32"},
    "mha_long": {"heads": 4, "head_dim": 16, "dtype": "float32"},
    "mha_bf16": {"heads": 2, "head_dim": 16, "dtype": "bfloat16"},
}


def fight(rival: str, key: str, low: float, high: float, gpu: str = "h200", **values: object) -> list[Measurement]:
    (cell,) = duel_cells({"cells": [key], "shapes": SHAPES}, "cpu")
    base = {
        "experiment": "duel",
        "gpu": gpu,
        "method": rival,
        "operator": key.partition(":")[0],
        **cell.problem.columns(),
    }
    middle = (low * high) ** 0.5
    return [
        Measurement(**base | {"metric": "device_time", "median": 50 * middle, "exact": True, "rel_err": 1e-4} | values),
        Measurement(**base, metric="stof_time", median=50.0, exact=True, rel_err=1e-4),
        Measurement(**base, metric="speedup", median=middle, p20=low, p80=high, samples=10, exact=True),
    ]


def test_the_figure_says_who_won(tmp_path: Path, pages_of) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    from stof_kernels.figures import GpuPage, draw
    from stof_kernels.figures import duel as drawing

    pages = pages_of(drawing)
    missing = fight("fa2", "mha:causal:1x64", 1, 1)[0]
    missing = replace(missing, median=None, exact=None, rel_err=None, status="unsupported", note="fa2: not here")
    rows = [
        *fight("fa4", "mha:causal:1x64", 1.02, 1.04),
        *fight("fa4", "mha_long:causal:1x96", 0.90, 0.92),
        *fight("fa4", "mha_bf16:causal:1x64", 0.99, 1.01),
        *fight("flex_flash", "mha:causal:1x64", 1.30, 1.31, exact=False),
        missing,
    ]
    write_rows(tmp_path / "rows.csv", rows)
    gpus = [
        GpuPage("h200", "NVIDIA H200", "recorded", "2026-11-23", stale=("fa4",)),
        GpuPage("4090", "RTX 4090", "recorded"),
    ]
    draw("duel", {"duel": tmp_path / "rows.csv"}, gpus, tmp_path / "f.pdf", tmp_path / "f.csv")
    with open(tmp_path / "f.csv", encoding="utf-8", newline="") as file:
        lines = {(line["experiment"], line["rival"]): line for line in csv.DictReader(file)}
    verdicts = {place: line["verdict"] for place, line in lines.items()}
    assert verdicts == {
        ("mha", "fa4"): "stof", ("mha_long", "fa4"): "fa4", ("mha_bf16", "fa4"): "tie", ("mha", "flex_flash"): "stof",
        ("mha", "fa2"): "",
    }  # fmt: skip
    assert float(lines["mha_long", "fa4"]["speedup"]) == pytest.approx(0.91, abs=1e-3)
    assert lines["mha", "fa2"]["reason"] == "fa2: not here"
    first, second = ([text.get_text() for text in page.figure.findobj(Text)] for page in pages)
    text = " ".join(" ".join(first).split())
    assert "NVIDIA H200 · recorded 2026-11-23" in text
    assert "FlashAttention-4: 3 cells, STOF faster in 1, slower in 1, 1 tie," in text
    assert "u = not supported" in text
    assert "1.000 =" in first
    assert "‡ measured with an older version of the code: FlashAttention-4" in text
    assert "Causal, 2 heads × 16, float32 (mha)" in first
    assert "No rows for this GPU." in second


def test_many_duels_stay_on_the_page(tmp_path: Path, pages_of) -> None:
    pytest.importorskip("matplotlib")
    from stof_kernels.figures import GpuPage, draw
    from stof_kernels.figures import duel as drawing

    pages = pages_of(drawing)
    rows, settings = [], checks.job_settings(CONFIG, "duel", "cuda")
    for i, cell in enumerate(duel_cells(settings, "cuda")):
        base = {"experiment": "duel", "gpu": "h200", "method": "fa4", "operator": cell.key.partition(":")[0]}
        base |= cell.problem.columns()
        ratio = 0.9 + 0.01 * i
        rows.append(Measurement(**base, metric="device_time", median=ratio, exact=True))
        rows.append(
            Measurement(**base, metric="speedup", median=ratio, p20=ratio * 0.99, p80=ratio * 1.01, samples=9 + i % 2)
        )
    write_rows(tmp_path / "rows.csv", rows)
    draw(
        "duel",
        {"duel": tmp_path / "rows.csv"},
        [GpuPage("h200", "H200", "measured")],
        tmp_path / "f.pdf",
        tmp_path / "f.csv",
    )
    (page,) = pages
    renderer = page.figure.canvas.get_renderer()
    width, height = page.figure.bbox.width, page.figure.bbox.height
    assert len(page.figure.axes) > 1
    for text in [*page.figure.texts, *(t for ax in page.figure.axes for t in ax.texts)]:
        box = text.get_window_extent(renderer)
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, text.get_text()
    assert any("9 to 10 turns" in text.get_text() for text in page.figure.texts)
    assert experiments.get("duel").id == fights.ID
