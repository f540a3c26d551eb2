"""Figures 3, 4, 11 to 13 and Table 4 drawn from measured rows: what they say beyond what they say of published ones."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("matplotlib")

from stof_kernels.benchmarking.measurement import Measurement, write_rows
from stof_kernels.figures import GpuPage, bars, cells, draw, motivation, speedups, style, table4

PAGE = GpuPage("cpu", "CPU", "measured", "2026-11-23")
MODEL = {"gpu": "cpu", "mask": "bigbird", "batch": 1, "seq_len": 128, "dtype": "float32"}
PAIR = {
    "experiment": "motivation",
    "gpu": "cpu",
    "batch": 1,
    "seq_len": 128,
    "dtype": "float32",
    "metric": "device_time",
}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw a figure of rows; returns the text of its page and the lines of its table."""
    from matplotlib.text import Text

    texts: list[str] = []

    def run(figure: str, rows: list[Measurement]) -> tuple[str, list[dict[str, str]]]:
        for module in (speedups, motivation, table4):
            save = module.save

            def spy(pages, pdf, title, save=save):
                texts.extend(text.get_text() for page in pages for text in page.figure.findobj(Text))
                save(pages, pdf, title)

            monkeypatch.setattr(module, "save", spy)
        experiment = rows[0].experiment
        write_rows(tmp_path / "rows.csv", rows)
        table = tmp_path / f"{figure}.csv"
        draw(figure, {experiment: tmp_path / "rows.csv"}, [PAGE], tmp_path / f"{figure}.pdf", table)
        with open(table, encoding="utf-8", newline="") as file:
            return " ".join(" ".join(texts).split()), list(csv.DictReader(file))

    return run


def latency(method: str, model: str, median: float | None, **values) -> Measurement:
    shared = MODEL | {"experiment": "end_to_end", "metric": "latency", "model": model, "exact": True}
    return Measurement(**shared, method=method, median=median, **values)


def test_figure_11_names_what_has_no_bar_and_how_long_images_are(drawn):
    rows = [
        latency(method, model, time, kv_len=122 if model == "vit" else 128)
        for model in ("bert_base", "vit")
        for method, time in (("torch_native", 8.0), ("stof", 2.0))
    ]
    why = "runs on cuda only"
    rows += [latency("mcfuser", model, None, status="unsupported", note=why) for model in ("bert_base", "vit")]
    text, lines = drawn("fig11", rows)
    assert {line["speedup"] for line in lines if line["method"] == "stof"} == {"4"}
    assert f"No bar: not supported (MCFuser (reimpl.): {why})." in text
    assert "at most that many tokens, 122." in text
    assert "compared with the same weights in float32" in text


def test_figure_3_keeps_kernels_out_of_the_caption_and_in_the_table(drawn):
    rows = [
        Measurement(
            **PAIR, method=method, operator="gemm_layernorm", hidden=hidden, median=time, note=f"{method} kernel"
        )
        for hidden in (512, 1024)
        for method, time in (("detached", 4.0), ("fused", 2.0))
    ]
    text, lines = drawn("fig3", rows)
    assert [line["note"] for line in lines] == ["fused kernel; detached: detached kernel"] * 2
    assert "kernel; " not in text
    assert "Sizes G1 to G2 are" in text
    assert "Each was checked against float32" in text


def test_table_4_wraps_names_and_leaves_out_ratios_that_nobody_has(drawn):
    shared = MODEL | {"experiment": "tuning_cost", "metric": "tuning_time", "model": "bert_base"}
    rows = [
        Measurement(**shared, method="stof", median=10.0),
        Measurement(**shared, method="torch_compile_max_autotune", median=25.0),
        Measurement(**shared, method="bolt", status="unsupported", note="no GPU"),
    ]
    text, lines = drawn("table4", rows)
    assert "2.50×" in text
    assert "(max-autotune)" in text
    assert text.count("/ STOF") == 1
    assert {line["method"]: line["times_stof"] for line in lines}["bolt"] == ""


def test_published_rows_name_systems_as_their_authors_ran_them():
    row = Measurement(
        **MODEL, experiment="end_to_end", method="mcfuser", metric="latency", median=1.0, source="published"
    )
    assert style.look("mcfuser").label == "MCFuser (reimpl.)"
    with style.labels_for([row]):
        assert style.look("mcfuser").label == "MCFuser"
    assert style.look("mcfuser").label == "MCFuser (reimpl.)"


def test_reasons_name_their_method_once_and_say_what_they_share_once():
    def bar(method, reason, status="unsupported"):
        return cells.Bar(method, None, None, status, reason)

    found = [
        bar("a", "only BERT: x"),
        bar("a", "only BERT: y"),
        bar("a", "too long"),
        bar("b", "no row", "not_measured"),
    ]
    text = cells.footnotes([*found, bar("b", "only BERT: z")], str.upper)
    assert text == (
        "In place of a bar: u = not supported (A: only BERT: x, y; too long; B: only BERT: z). n = not measured (B)."
    )


def test_narrow_bars_have_values_for_ours_and_the_fastest_other_only():
    def slot(*ratios):
        names = ("torch_compile", "sdpa", "stof")
        return bars.Slot("x", "g", tuple(cells.Bar(m, None, r, "ok") for m, r in zip(names, ratios, strict=True)))

    def printed(slot):
        return [b.method for b in slot.bars if b.ratio is not None and speedups._ours_and_the_best(slot, b)]

    assert printed(slot(2.0, 1.5, 4.0)) == ["torch_compile", "stof"]
    assert printed(slot(None, 1.5, 1.0)) == ["sdpa", "stof"]
    assert printed(slot(2.0, 3.0, None)) == ["sdpa"]
    few, many = [slot(1.0, 1.0, 1.0)] * 3, [slot(1.0, 1.0, 1.0)] * 60
    assert speedups._is_wide(few)
    assert not speedups._is_wide(many)


def test_what_an_experiment_has_no_row_of_is_said(drawn):
    rows = [
        Measurement(
            experiment="ablation",
            method=method,
            model="gpt2",
            metric="latency",
            unit="ms",
            median=ms,
            samples=3,
            exact=True,
            **MODEL,
        )
        for method, ms in (("torch_native", 2.0), ("stof", 1.0), ("torch_compile", 1.5))
    ]
    text, _ = drawn("fig12", rows)
    assert "Not measured: Compile without MHA boundary; STOF, fusion only; STOF, attention only." in " ".join(
        text.split()
    )
