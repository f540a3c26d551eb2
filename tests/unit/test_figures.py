"""Every figure draws from recorded rows, says what is missing and why, and gives the same bytes twice."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from stof_kernels.benchmarking.measurement import Measurement, MeasurementError, merge, read_rows, write_rows
from stof_kernels.figures import FIGURES, GpuPage, draw
from stof_kernels.provenance import REPOSITORY_ROOT

pytest.importorskip("matplotlib")
RECORDED = REPOSITORY_ROOT / "results" / "recorded"
PAGES = [
    GpuPage("4090", "NVIDIA GeForce RTX 4090", "recorded", "2025-08-31"),
    GpuPage("a100", "NVIDIA A100", "recorded", "2025-11-23"),
    GpuPage("h100", "NVIDIA H100", "recorded", missing_reason="no H100 was at hand"),
]
EXPERIMENTS = sorted({experiment for spec in FIGURES.values() for experiment in spec.experiments})
BARS = {
    "fig3": 48,
    "fig4": 48,
    "fig9_10": 2 * 7 * 72,
    "fig11": 2 * 6 * 18,
    "fig12": 6 * 18,
    "fig13": 4 * 18,
    "table4": 3 * 18,
    "crossover": 0,  # nothing was published
    "scaling": 0,
    "duel": 0,
}


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The aggregated tables of both published GPUs."""
    folder = tmp_path_factory.mktemp("tables")
    for experiment in EXPERIMENTS:
        found = sorted(path for gpu in ("4090", "a100") for path in RECORDED.glob(f"{gpu}/{experiment}/*.csv"))
        write_rows(folder / f"{experiment}.csv", merge(*map(read_rows, found)))
    return {experiment: folder / f"{experiment}.csv" for experiment in EXPERIMENTS}


def lines_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def page_count(pdf: Path) -> int:
    return len(re.findall(rb"/Type /Page\b(?!s)", pdf.read_bytes()))


def words_on(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Collects the texts of each page that is drawn from now on."""
    from matplotlib.text import Text

    from stof_kernels.figures import layout

    pages: list[list[str]] = []
    save = layout.save

    def spy(drawn, pdf, title):
        pages.extend([text.get_text() for text in page.figure.findobj(Text)] for page in drawn)
        save(drawn, pdf, title)

    for name in ("fig9_10", "fig13", "table4", "masks", "speedups", "motivation", "crossover", "scaling", "duel"):
        module = __import__(f"stof_kernels.figures.{name}", fromlist=["save"])
        monkeypatch.setattr(module, "save", spy)
    return pages


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_draws_a_page_per_gpu_and_the_table_behind_it(
    figure: str, tables: dict[str, Path], tmp_path: Path
) -> None:
    pdf, table = tmp_path / "deep" / "figure.pdf", tmp_path / "figure.csv"
    draw(figure, tables, PAGES, pdf, table)
    assert page_count(pdf) == (2 if figure == "masks" else len(PAGES))
    if figure != "masks":
        lines = lines_of(table)
        assert len(lines) == BARS[figure]
        assert {line["gpu"] for line in lines} <= {"4090", "a100"}
        assert all(line["reason"] for line in lines if line["status"] != "ok")
    assert b"\r" not in table.read_bytes()


@pytest.mark.parametrize("figure", FIGURES)
def test_the_same_rows_give_the_same_bytes(figure: str, tables: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        draw(figure, tables, PAGES[:2], tmp_path / f"{name}.pdf", tmp_path / f"{name}.csv")
    assert (tmp_path / "one.pdf").read_bytes() == (tmp_path / "two.pdf").read_bytes()
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "one.pdf", "two.csv", "two.pdf"]
    assert b"CreationDate" not in (tmp_path / "one.pdf").read_bytes()


def test_fonts_stay_text_in_the_pdf(tables: dict[str, Path], tmp_path: Path) -> None:
    draw("fig12", tables, PAGES[1:2], tmp_path / "figure.pdf", tmp_path / "figure.csv")
    content = (tmp_path / "figure.pdf").read_bytes()
    assert b"/FontFile2" in content  # TrueType, embedded
    assert b"/Type3" not in content
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL)
    assert any(b" Tf" in zlib.decompress(stream) for stream in streams if stream[:1] == b"x")


def test_speedups_of_the_published_attention_numbers(tables: dict[str, Path], tmp_path: Path) -> None:
    draw("fig9_10", tables, PAGES, tmp_path / "f.pdf", tmp_path / "f.csv")
    by_cell = {(x["gpu"], x["mask"], x["batch"], x["seq_len"], x["method"]): x for x in lines_of(tmp_path / "f.csv")}
    native = by_cell["4090", "sliding_window", "16", "4096", "torch_native"]
    stof = by_cell["4090", "sliding_window", "16", "4096", "stof"]
    assert float(stof["speedup"]) == pytest.approx(float(native["median"]) / float(stof["median"]), rel=1e-4)
    assert float(stof["speedup"]) == pytest.approx(129.6, abs=0.1)
    gone = by_cell["a100", "bigbird", "8", "2048", "bytetransformer"]
    assert (gone["status"], gone["reason"], gone["speedup"]) == ("unsupported", "sequences of at most 1024 tokens", "")
    assert by_cell["a100", "causal", "16", "4096", "mcfuser"]["status"] == "oom"
    repeated = {key[4] for key, line in by_cell.items() if line["repeated"] == "true"}
    assert repeated == {"splat", "mcfuser"}
    assert by_cell["4090", "bigbird", "1", "128", "mcfuser"]["repeated"] == "false"  # the mask of its log


def test_the_page_says_what_is_missing_and_where_numbers_come_from(
    tables: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = words_on(monkeypatch)
    draw("fig9_10", tables, PAGES, tmp_path / "f.pdf", tmp_path / "f.csv")
    text = " ".join(pages[0])
    assert "u = not supported (ByteTransformer: sequences of at most 1024 tokens)" in text
    assert "m = out of memory (MCFuser: no value in the log)" in text
    assert {"SPLAT † §", "MCFuser †", "exactness not recorded", "PyTorch Native = 1", "u", "m"} <= set(pages[0])
    assert "log of 2025-08-31" in text
    assert "10.5281/zenodo.17705801" in text
    assert "No rows for this GPU." in pages[2]
    assert "No H100 was at hand." in pages[2]


def test_a_figure_that_was_published_for_one_card_says_so(
    tables: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = words_on(monkeypatch)
    draw("fig12", tables, PAGES[:1], tmp_path / "f.pdf", tmp_path / "f.csv")
    assert "published this figure for the A100 only." in " ".join(pages[0])
    assert lines_of(tmp_path / "f.csv") == []


SIZES = [(1, 128), (1, 512), (8, 128)]
MASKS = ("causal", "sliding_window", "longformer", "bigbird")


def measured(method: str, **changes: object) -> list[Measurement]:
    """Rows of a small sweep on the CPU, twice as fast for a longer name."""
    return [
        Measurement(
            **{
                "experiment": "mha", "gpu": "cpu", "method": method, "mask": mask, "batch": batch, "seq_len": seq_len,
                "kv_len": seq_len, "heads": 12, "head_dim": 64, "dtype": "float32", "metric": "device_time",
                "median": batch * seq_len / len(method), "exact": True, "rel_err": 1e-6, **changes,
            }
        )
        for mask in MASKS
        for batch, seq_len in SIZES
    ]  # fmt: skip


CPU = GpuPage("cpu", "CPU, 2 cores", "measured", "2026-01-31", stale=("sdpa",))
NO_TIME = {"median": None, "exact": None, "rel_err": None}


def draw_cpu(
    rows: list[Measurement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[dict[str, str]]]:
    write_rows(tmp_path / "mha.csv", rows)
    pages = words_on(monkeypatch)
    draw("fig9_10", {"mha": tmp_path / "mha.csv"}, [CPU], tmp_path / "f.pdf", tmp_path / "f.csv")
    return pages[0], lines_of(tmp_path / "f.csv")


def test_every_kind_of_gap_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured("torch_native") + measured("sdpa") + measured("stof") + measured("flex_attention", exact=False)
    rows += measured("fa4", status="unsupported", note="runs on cuda only", **NO_TIME)
    rows += measured("torch_compile")
    rows += [replace(row, metric="control_time") for row in measured("stof")]
    change = {
        ("torch_compile", "causal", 1, 128): {"status": "wrong_result", "note": "error 0.3 above 2e-05"},
        ("torch_compile", "causal", 1, 512): {"status": "error", "note": "the compiler crashed; code 7", **NO_TIME},
        ("torch_native", "bigbird", 8, 128): {"status": "oom", "note": "needs 200 GiB", **NO_TIME},
        ("sdpa", "longformer", 8, 128): None,
    }
    kept = []
    for row in rows:
        found = change.get((row.method, row.mask, row.batch, row.seq_len), {})
        if found is not None:
            kept.append(replace(row, **found))
    words, lines = draw_cpu(kept, tmp_path, monkeypatch)
    text = " ".join(words)
    assert "w = output check failed (PyTorch Compile: error 0.3 above 2e-05)" in text
    assert "e = no result (PyTorch Compile: the compiler crashed)" in text
    assert "n = not measured (SDPA)" in text
    assert "b = no baseline to divide by (out of memory, needs 200 GiB)" in text
    assert "No bar on this page: FlashAttention-4 (runs on cuda only)." in text
    assert "‡ measured with an older version of the code: SDPA." in text
    assert "Crossed bars (not exact)" in text
    assert {"w", "e", "n", "b", "exact", "not exact", "SDPA ‡"} <= set(words)
    assert "Source: measured here, 2026-01-31." in text
    assert len(lines) == 6 * len(MASKS) * len(SIZES)
    by_cell = {(x["mask"], x["batch"], x["seq_len"], x["method"]): x for x in lines}
    wrong = by_cell["causal", "1", "128", "torch_compile"]
    assert (wrong["status"], wrong["speedup"], wrong["reason"]) == ("wrong_result", "", "error 0.3 above 2e-05")
    assert by_cell["causal", "1", "128", "flex_attention"]["exact"] == "false"
    assert by_cell["longformer", "8", "128", "sdpa"]["status"] == "not_measured"
    assert by_cell["bigbird", "8", "128", "stof"]["status"] == "no_baseline"


def test_the_best_other_of_a_measured_page_is_an_exact_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured("torch_native", median=8.0) + measured("stof", median=1.0)
    rows += measured("sdpa", median=2.0) + measured("fa2", median=0.5, exact=False)
    words, _ = draw_cpu(rows, tmp_path, monkeypatch)
    assert words.count("STOF, geometric mean of 3: 8.00× native, 2.00× the best exact other") == len(MASKS)


def test_a_page_without_any_time_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured("stof", status="unsupported", note="no compiler", **NO_TIME)
    words, lines = draw_cpu(rows, tmp_path, monkeypatch)
    assert "No row of this GPU has a time to draw; the table says why." in words
    assert {line["reason"] for line in lines if line["method"] == "stof"} == {"no compiler"}


def test_bars_slower_than_the_axis_are_clipped_with_their_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = measured("torch_native", median=1.0) + measured("sdpa", median=40.0) + measured("stof", median=0.5)
    words, _ = draw_cpu(rows, tmp_path, monkeypatch)
    assert words.count("1/40") == len(MASKS) * len(SIZES)
    assert "clipped" in " ".join(words)


def test_many_methods_get_strips_and_unknown_ones_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["torch_native", "stof", *(f"new_method_{i}" for i in range(9))]
    words, _ = draw_cpu([row for name in names for row in measured(name)], tmp_path, monkeypatch)
    assert "new_method_3" in words
    assert words.count("batch 1") == 1  # the strips share their labels


def test_two_dtypes_in_one_figure_are_refused(tmp_path: Path) -> None:
    rows = measured("torch_native") + measured("torch_native", dtype="bfloat16")
    write_rows(tmp_path / "mha.csv", rows)
    with pytest.raises(ValueError, match="two rows for one bar: experiment mha, gpu cpu, method torch_native"):
        draw("fig9_10", {"mha": tmp_path / "mha.csv"}, [CPU], tmp_path / "f.pdf", tmp_path / "f.csv")


def test_bad_calls_are_one_clear_line(tables: dict[str, Path], tmp_path: Path) -> None:
    pdf, table = tmp_path / "f.pdf", tmp_path / "f.csv"
    with pytest.raises(ValueError, match=r"figure 'fig99' is unknown, allowed: fig3, fig4"):
        draw("fig99", tables, PAGES, pdf, table)
    with pytest.raises(ValueError, match=r"figure fig11: no table for end_to_end"):
        draw("fig11", {}, PAGES, pdf, table)
    with pytest.raises(ValueError, match=r"figure fig11: no pages"):
        draw("fig11", tables, [], pdf, table)
    table.write_text("not,rows\n")
    with pytest.raises(MeasurementError, match=r"f\.csv: line 1: column 1: got 'not'"):
        draw("fig9_10", {"mha": table}, PAGES, pdf, table)
    assert not pdf.exists()


def test_the_masks_table_has_our_shares_beside_the_papers(tmp_path: Path) -> None:
    draw("masks", {}, [], tmp_path / "m.pdf", tmp_path / "m.csv")
    from stof_kernels import masks

    lines = {(line["mask"], line["seq_len"]): line for line in lines_of(tmp_path / "m.csv")}
    assert {mask for mask, _ in lines} == set(masks.FAMILIES)
    at_1024 = [lines[mask, "1024"]["paper_kept_percent"] for mask in masks.PAPER]
    assert at_1024 == ["50.0", "6.2", "11.2", "19.2"]
    causal = lines["causal", "512"]
    assert float(causal["kept_percent"]) == pytest.approx(100 * 513 / 1024, abs=1e-3)
    assert (causal["full_tiles"], causal["partial_tiles"], causal["empty_tiles"]) == ("28", "8", "28")
    window = lines["sliding_window", "1024"]
    assert float(window["kept_percent"]) == pytest.approx(100 * (1024 * 65 - 32 * 33) / 1024**2, abs=1e-3)


def test_captions_exist_for_the_report() -> None:
    for spec in FIGURES.values():
        assert (REPOSITORY_ROOT / "workflow" / "report" / spec.caption).read_text(encoding="utf-8").startswith("**")


def test_nothing_runs_off_the_page(tables: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stof_kernels.figures import fig9_10, layout

    seen = []
    monkeypatch.setattr(fig9_10, "save", lambda drawn, pdf, title: seen.extend(drawn) or layout.save(drawn, pdf, title))
    draw("fig9_10", tables, PAGES, tmp_path / "f.pdf", tmp_path / "f.csv")
    for page in seen:
        renderer = page.figure.canvas.get_renderer()
        width, height = page.figure.bbox.width, page.figure.bbox.height
        for text in [*page.figure.texts, *(t for ax in page.figure.axes for t in ax.texts)]:
            box = text.get_window_extent(renderer)
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, text.get_text()


def test_importing_the_package_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys, stof_kernels.figures; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_fig9_10_names_who_was_not_run(
    tables: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [replace(row, gpu="h100", source="measured", exact=True, rel_err=1e-4) for row in read_rows(tables["mha"])
            if row.gpu == "a100" and row.method in ("torch_native", "stof") and row.status == "ok"]  # fmt: skip
    write_rows(tmp_path / "mha.csv", rows)
    pages = words_on(monkeypatch)
    draw("fig9_10", {"mha": tmp_path / "mha.csv"}, [PAGES[2]], tmp_path / "x.pdf", tmp_path / "x.csv")
    text = " ".join(pages[0])
    assert "Not run on this GPU yet: PyTorch Compile" in text
    assert "FlexAttention" in text[text.index("Not run") :]


def candidate_rows() -> list[Measurement]:
    """A planner table in which row-wise is better below 10 % kept and the planner errs once."""
    rows = []
    common = {
        "experiment": "planner",
        "gpu": "h100",
        "method": "stof",
        "mask": "random_blocks",
        "batch": 1,
        "seq_len": 512,
    }
    for block in (1, 16):
        for fill in (0.01, 0.05, 0.2):
            cell = common | {"mask_params": f"block={block};fill={fill};seed=0", "kept": fill}
            times = {"block_wise/q16/kv256": 100.0, "row_wise": 1000 * fill}
            for operator, us in times.items():
                rows.append(
                    Measurement(**cell, operator=operator, metric="device_time", median=us, exact=True, rel_err=1e-7)
                )
                rows.append(Measurement(**cell, operator=operator, metric="predicted_time", median=us * 1.1))
            chosen = "row_wise" if fill < 0.03 else "block_wise/q16/kv256"
            regret = times[chosen] / min(times.values())
            for policy in ("cost", "paper"):
                rows.append(
                    Measurement(**cell, operator=policy, metric="regret", median=regret, note=f"chooses {chosen}")
                )
    return rows


def test_crossover_shows_both_kernels_and_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "planner.csv", candidate_rows())
    pages = words_on(monkeypatch)
    draw(
        "crossover", {"planner": tmp_path / "planner.csv"}, [PAGES[2], PAGES[0]], tmp_path / "x.pdf", tmp_path / "x.csv"
    )
    lines = lines_of(tmp_path / "x.csv")
    assert len(lines) == 2 * 6
    wrong = [line for line in lines if line["chosen"] == "true" and float(line["regret"]) > 1]
    assert [(line["block"], line["kept"], line["kernel"]) for line in wrong] == [
        (b, "0.05", "block_wise") for b in ["1", "16"]
    ]
    text = " ".join(pages[0])
    assert "blocks of 16 x 16" in text
    assert "the cost model 1.26x on average (geometric mean), 2.00x at worst" in text
    assert any("The paper has no such figure" in word for word in pages[1])
    assert page_count(tmp_path / "x.pdf") == 2
