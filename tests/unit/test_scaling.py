"""The scaling figure and the floors table: what they say of rows, and of rows that are not there."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from stof_kernels.benchmarking.measurement import Measurement, write_rows
from stof_kernels.figures import GpuPage, draw, floors, scaling
from stof_kernels.figures.floors import Rates

pytest.importorskip("matplotlib")
H200 = Rates(4.3, 790.0, 1.0)
PAGE = GpuPage("h200", "NVIDIA H200", "recorded", "2026-11-23", stale=("sdpa",))


def row(method: str = "stof", **values: object) -> Measurement:
    base = {
        "experiment": "scaling", "gpu": "h200", "method": method, "mask": "sliding_window", "mask_params": "w=256;causal=false",
        "batch": 1, "seq_len": 4096, "kv_len": 4096, "heads": 16, "kv_heads": 16, "head_dim": 64, "dtype": "float16",
        "metric": "device_time", "median": 20.0, "exact": True, "rel_err": 1e-4, "kept": 0.125,
    }  # fmt: skip
    return Measurement(**base | values)


def missing(method: str, status: str, note: str, **values: object) -> Measurement:
    return row(method, median=None, exact=None, rel_err=None, status=status, note=note, **values)


def sweep() -> list[Measurement]:
    """Ours in proportion to the work; dense SDPA until it runs out of memory; FA2 without the mask at all."""
    rows = []
    for share in (0.01, 0.1, 1.0):
        own = {"mask": "bigbird", "mask_params": f"w=0;g=0;block=64;fill={share};seed=0", "kept": share}
        rows += [row(median=1000 * share, **own), row("sdpa", median=5000.0, **own)]
        rows += [
            row("fa2", median=400.0, exact=False, **own),
            missing("fa4", "unsupported", "no native form; more", **own),
        ]
    for n in (1024, 4096, 16384):
        own = {"seq_len": n, "kv_len": n, "kept": 512 / n}
        rows += [row(median=n / 100, **own), row("fa4", median=n / 50, **own), row("fa2", median=n / 60, **own)]
        rows += [row(metric="peak_memory", median=n / 1000, **own)]
        rows += [row("sdpa", median=n * n / 1e5, **own)] if n < 16384 else [missing("sdpa", "oom", "8 GiB", **own)]
        rows += [missing("bolt", "unsupported", "not here", **own)]
    return rows


@pytest.fixture
def drawn(tmp_path: Path, pages_of):
    """Draw rows on one page; returns the page's texts, its axes, and the table's lines."""
    from matplotlib.text import Text

    pages = pages_of(scaling)

    def run(rows: list[Measurement]):
        write_rows(tmp_path / "rows.csv", rows)
        draw("scaling", {"scaling": tmp_path / "rows.csv"}, [PAGE], tmp_path / "f.pdf", tmp_path / "f.csv")
        figure = pages[-1].figure
        with open(tmp_path / "f.csv", encoding="utf-8", newline="") as file:
            return [t.get_text() for t in figure.findobj(Text)], figure.axes, list(csv.DictReader(file))

    return run


def test_a_panel_per_sweep_and_one_for_memory(drawn) -> None:
    texts, axes, lines = drawn(sweep())
    titles = [ax.get_title(loc="left") for ax in axes]
    assert titles == [
        "BigBird (w=0, g=0, block=64) at 4,096 positions",
        "Sliding window (w=256, causal=false)",
        "Memory of the same",
    ]
    assert len(lines) == 12 + 15
    assert {line["panel"] for line in lines} == {"kept", "length"}
    ours = next(x for x in lines if x["method"] == "stof" and x["seq_len"] == "16384")
    assert (ours["median_us"], ours["peak_mib"]) == ("163.84", "16.384")
    assert float(ours["kept_pairs"]) == pytest.approx(512 * 16384)
    gone = next(x for x in lines if x["method"] == "sdpa" and x["seq_len"] == "16384")
    assert (gone["median_us"], gone["status"], gone["reason"]) == ("", "oom", "8 GiB")
    text = " ".join(texts)
    assert "NVIDIA H200  ·  recorded 2026-11-23" in text
    assert "Source: recorded measurement of 2026-11-23 (results/recorded/h200)." in text
    assert "16 heads of size 64, float16." in text


def test_points_lie_where_their_work_is(drawn) -> None:
    _, axes, _ = drawn(sweep())
    by_label = {tuple(line.get_xdata()): line.get_ydata() for line in axes[0].lines}
    millions = tuple(share * 4096**2 / 1e6 for share in (0.01, 0.1, 1.0))
    assert list(by_label[millions]) == pytest.approx([10, 100, 1000])  # the last drawn there: proportional to the work
    assert axes[1].get_xscale() == axes[1].get_yscale() == "log"
    assert [t.get_text() for t in axes[1].get_xticklabels()] == ["1k", "4k", "16k"]


def test_every_gap_is_named(drawn) -> None:
    texts, axes, _ = drawn(sweep())
    text = " ".join(texts)
    assert (
        "A letter in place of a point: u = not supported (FlashAttention-4: no native form). m = out of memory (SDPA)."
        in text
    )
    assert "Hollow marks: FlashAttention-2 cannot apply the mask and ran without it." in text
    assert "No line on this page: Bolt (reimpl.) (not here)." in text
    assert "‡ measured with an older version of the code: SDPA." in text
    assert [t.get_text() for t in axes[1].texts] == ["m"]
    assert [t.get_text() for t in axes[0].texts] == ["u"] * 3


def test_the_growth_of_our_time_is_said_in_numbers(drawn) -> None:
    texts, _, _ = drawn(sweep())
    assert "to the power of 1.00 over the kept pairs and 1.00 over the length" in " ".join(texts)
    assert scaling.slope([(1, 3), (10, 300), (100, 30000)]) == pytest.approx(2)


def test_rows_without_a_time_give_a_page_that_says_so(drawn) -> None:
    texts, _, lines = drawn([missing("stof", "error", "broken", seq_len=n, kv_len=n) for n in (64, 128)])
    assert "No row of this GPU has a time to draw; the table says why." in " ".join(texts)
    assert [line["reason"] for line in lines] == ["broken"] * 2


def test_a_floor_is_moving_or_multiplying_plus_a_launch() -> None:
    thin = floors.floor_of(row(kept=0.001), H200)
    moved = 4 * 16 * 4096 * 64 * 2  # q, k, v and the output
    assert thin.copy_us == pytest.approx(moved / 4.3e6)
    assert thin.total_us == pytest.approx(moved / 4.3e6 + 1.0)
    dense = floors.floor_of(row(kept=1.0), H200)
    assert dense.products_us == pytest.approx(4 * 16 * 4096 * 4096 * 64 / 790e6)
    assert dense.total_us == pytest.approx(dense.products_us + 1.0)
    grouped = floors.floor_of(row(kept=0.001, kv_heads=4), H200)
    assert grouped.copy_us == pytest.approx((16 + 4) / 32 * thin.copy_us)
    with pytest.raises(ValueError, match="16-bit"):
        floors.floor_of(row(dtype="float32"), H200)


def test_floors_beside_our_time_and_the_best_exact_other() -> None:
    rows = [
        row(experiment="mha", median=40.0),
        row("sdpa", experiment="mha", median=90.0),
        row("fa4", experiment="mha", median=60.0),
        row("fa2", experiment="mha", median=10.0, exact=False),
        row("flex_attention", experiment="mha", median=5.0, seq_len=2048, kv_len=2048),
        missing("flex_flash", "error", "broken", experiment="mha"),
        row(experiment="mha", metric="host_time", median=1.0),
        row(experiment="mha", gpu="cpu", median=7.0),
        missing("stof", "oom", "no room", experiment="mha_long"),
    ]
    ours, cpu, gone = floors.lines(rows, {"h200": H200, "cpu": None})
    floor = floors.floor_of(rows[0], H200).total_us
    assert (ours["best_exact"], ours["best_exact_us"], ours["speedup"]) == ("fa4", "60", "1.5")
    assert float(ours["efficiency"]) == pytest.approx(floor / 40, rel=1e-5)
    assert (cpu["efficiency"], cpu["speedup"]) == ("", "")
    assert cpu["reason"] == "the config's gpus table has no measured rates for it"
    assert (gone["stof_us"], gone["reason"]) == ("", "oom: no room")
    assert set(ours) == set(floors.COLUMNS)


def test_a_whole_call_is_compared_with_attention_alone() -> None:
    rows = [
        row(experiment="dynamic_mask", operator="attention", median=30.0),
        row(experiment="dynamic_mask", operator="build_and_attention", median=50.0),
        row("flex_attention", experiment="dynamic_mask", operator="attention", median=100.0),
        row("flex_attention", experiment="dynamic_mask", operator="build_and_attention", median=20.0),
    ]
    found = {line["operator"]: line["speedup"] for line in floors.lines(rows, {"h200": H200})}
    assert found == {"attention": "3.33333", "build_and_attention": "2"}


def test_rates_need_all_three() -> None:
    entry = {"copy_tb_s": 4.3, "matmul_tflops": 790, "launch_us": 1.0, "label": "x"}
    assert Rates.of(entry) == H200
    assert Rates.of(entry | {"launch_us": None}) is None
    assert Rates.of({}) is None


def test_the_table_is_written_whole(tmp_path: Path) -> None:
    floors.tabulate([replace(row(), experiment="mha")], {"h200": H200}, tmp_path / "floors.csv")
    lines = (tmp_path / "floors.csv").read_text().splitlines()
    assert lines[0] == ",".join(floors.COLUMNS)
    assert len(lines) == 2
