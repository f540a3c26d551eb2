"""The committed published rows: complete, legal, and saying what the paper's numbers say."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest

from stof_kernels.benchmarking import published
from stof_kernels.benchmarking.measurement import Measurement, merge, read_rows
from stof_kernels.provenance import REPOSITORY_ROOT

RECORDED = REPOSITORY_ROOT / "results" / "recorded"
FILES = sorted(path for gpu in ("4090", "a100") for path in (RECORDED / gpu).glob("*/*.csv"))

# Rows per method, by (gpu, experiment).
ROWS = {
    ("4090", "mha"): {
        **dict.fromkeys(("torch_native", "bytetransformer", "fa2", "flex_attention", "stof"), 72),
        **dict.fromkeys(("splat", "mcfuser"), 18),
    },
    ("4090", "end_to_end"): dict.fromkeys(("torch_native", "torch_compile", "mcfuser", "bytetransformer", "bolt", "stof"), 18),
    ("4090", "motivation"): dict.fromkeys(("detached", "fused", "tuned_individually", "tuned_after_fusion"), 24),
    ("a100", "ablation"): dict.fromkeys(
        ("torch_native", "torch_compile", "torch_compile_no_mha_boundary", "stof_mha_only", "stof_fusion_only", "stof"), 18
    ),
    ("a100", "overhead"): {"stof": 90},
    ("a100", "tuning_cost"): {"mcfuser": 18, "bolt": 18, "stof": 18},
}  # fmt: skip
for _experiment in ("mha", "end_to_end", "motivation"):
    ROWS["a100", _experiment] = ROWS["4090", _experiment]


def rows_of(gpu: str, experiment: str) -> list[Measurement]:
    return merge(*(read_rows(path) for path in sorted((RECORDED / gpu / experiment).glob("*.csv"))))


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def times(gpu: str, experiment: str, method: str) -> dict[tuple[object, ...], float]:
    """Number per cell; the one MCFuser and SPLAT series of Figures 9 and 10 stands for every mask, as in the paper's plot."""
    rows = [row for row in rows_of(gpu, experiment) if row.method == method and row.status == "ok"]
    if experiment == "mha" and method in ("mcfuser", "splat"):
        masks = ("causal", "sliding_window", "longformer", "bigbird")
        return {(m, row.model, row.batch, row.seq_len): row.median for row in rows for m in masks}
    return {(row.mask, row.model, row.batch, row.seq_len): row.median for row in rows}


def speedups(gpu: str, experiment: str, baseline: str, method: str = "stof") -> list[float]:
    base, ours = times(gpu, experiment, baseline), times(gpu, experiment, method)
    return [base[cell] / ours[cell] for cell in base]


def test_every_published_figure_is_there_and_nothing_else() -> None:
    found: dict[tuple[str, str], dict[str, int]] = {}
    for path in FILES:
        found.setdefault((path.parts[-3], path.parts[-2]), {})[path.stem] = len(read_rows(path))
    assert found == ROWS


@pytest.mark.parametrize("path", FILES, ids=["/".join(path.parts[-3:]) for path in FILES])
def test_a_file_holds_its_own_rows_and_says_where_they_come_from(path: Path) -> None:
    gpu, experiment, method = path.parts[-3], path.parts[-2], path.stem
    rows = read_rows(path)
    assert {(row.gpu, row.experiment, row.method, row.source) for row in rows} == {
        (gpu, experiment, method, "published")
    }
    facts = json.loads(path.with_suffix(".provenance.json").read_text(encoding="utf-8"))
    assert facts["kind"] == "published"
    assert (facts["gpu"], facts["experiment"], facts["method"], facts["rows"]) == (gpu, experiment, method, len(rows))
    assert facts["paper"]["doi"] == "10.1145/3774934.3786434"
    assert (facts["artifact"]["doi"], facts["artifact"]["licence"]) == ("10.5281/zenodo.17705801", "MIT")
    assert facts["artifact"]["files"]
    assert all(facts[key] for key in ("gpu_name", "software", "protocol", "units", "notes"))
    assert "/work" not in path.read_text(encoding="utf-8")


# The fact sheet's geometric means of STOF over each baseline: (gpu, baseline, cells, geometric mean, largest).
MHA = [
    ("4090", "torch_native", 72, 9.89, 129.6),
    ("4090", "splat", 72, 27.50, 1464),
    ("4090", "mcfuser", 64, 4.64, 30.3),
    ("4090", "bytetransformer", 48, 2.54, 10.8),
    ("4090", "fa2", 72, 1.59, 7.71),
    ("4090", "flex_attention", 72, 2.12, 5.94),
    ("a100", "torch_native", 72, 11.22, 138.0),
    ("a100", "splat", 72, 172.6, 3113),
    ("a100", "mcfuser", 64, 7.34, 77.2),
    ("a100", "bytetransformer", 48, 4.19, 26.5),
    ("a100", "fa2", 72, 1.93, 10.26),
    ("a100", "flex_attention", 72, 2.15, 7.74),
]


@pytest.mark.parametrize(("gpu", "baseline", "count", "mean", "largest"), MHA)
def test_attention_speedups_are_the_published_ones(
    gpu: str, baseline: str, count: int, mean: float, largest: float
) -> None:
    ratios = speedups(gpu, "mha", baseline)
    assert len(ratios) == count
    assert geomean(ratios) == pytest.approx(mean, abs=0.006, rel=1e-3)
    assert max(ratios) == pytest.approx(largest, rel=2e-3)


@pytest.mark.parametrize(("gpu", "mean"), [("4090", 1.54), ("a100", 1.67)])
def test_attention_speedup_over_the_best_of_all_six(gpu: str, mean: float) -> None:
    others = [
        times(gpu, "mha", m) for m in ("torch_native", "splat", "mcfuser", "bytetransformer", "fa2", "flex_attention")
    ]
    ours = times(gpu, "mha", "stof")
    assert geomean(min(o[cell] for o in others if cell in o) / ours[cell] for cell in ours) == pytest.approx(
        mean, abs=0.006
    )


END_TO_END = [
    ("4090", "torch_native", 18, 2.05),
    ("4090", "mcfuser", 14, 1.84),
    ("4090", "bytetransformer", 11, 1.32),
    ("4090", "bolt", 13, 2.39),
    ("4090", "torch_compile", 18, 1.33),
    ("a100", "torch_native", 18, 2.13),
    ("a100", "mcfuser", 15, 2.10),
    ("a100", "bytetransformer", 11, 1.44),
    ("a100", "bolt", 17, 2.07),
    ("a100", "torch_compile", 18, 1.30),
]


@pytest.mark.parametrize(("gpu", "baseline", "count", "mean"), END_TO_END)
def test_end_to_end_speedups_are_the_published_ones(gpu: str, baseline: str, count: int, mean: float) -> None:
    ratios = speedups(gpu, "end_to_end", baseline)
    assert len(ratios) == count
    assert geomean(ratios) == pytest.approx(mean, abs=0.006)


@pytest.mark.parametrize(
    ("method", "mean"),
    [
        ("torch_compile", 1.63),
        ("torch_compile_no_mha_boundary", 1.19),
        ("stof_mha_only", 1.78),
        ("stof_fusion_only", 1.58),
        ("stof", 2.13),
    ],
)
def test_ablation_speedups_are_the_published_ones(method: str, mean: float) -> None:
    assert geomean(speedups("a100", "ablation", "torch_native", method)) == pytest.approx(mean, abs=0.006)


@pytest.mark.parametrize(("method", "mean", "largest"), [("mcfuser", 3.01, 10.33), ("bolt", 3.09, 9.32)])
def test_tuning_cost_ratios_are_the_published_ones(method: str, mean: float, largest: float) -> None:
    ratios = speedups("a100", "tuning_cost", method)
    assert geomean(ratios) == pytest.approx(mean, abs=0.006)
    assert max(ratios) == pytest.approx(largest, abs=0.006)


def test_overhead_shares_are_the_published_ones() -> None:
    rows = rows_of("a100", "overhead")
    means = []
    for batch in (1, 8, 16):
        shares = []
        for model in {row.model for row in rows}:
            here = [row for row in rows if (row.batch, row.model) == (batch, model)]
            total = next(row.median for row in here if row.metric == "tuning_time")
            shares.append(sum(row.median for row in here if row.metric == "overhead_time") / total / 10)
        means.append(sum(shares) / len(shares))
    assert means == pytest.approx([2.43, 1.62, 1.95], abs=0.006)


MOTIVATION = [
    ("4090", "detached", "fused", "bias_layernorm", 0.88),
    ("a100", "detached", "fused", "bias_layernorm", 1.29),
    ("4090", "detached", "fused", "gemm_layernorm", 1.36),
    ("a100", "detached", "fused", "gemm_gemm", 0.17),
    ("4090", "tuned_individually", "tuned_after_fusion", "bias_layernorm", 1.26),
    ("a100", "tuned_individually", "tuned_after_fusion", "gemm_layernorm", 6.19),
    ("4090", "tuned_individually", "tuned_after_fusion", "gemm_gemm", 1.83),
]


@pytest.mark.parametrize(("gpu", "baseline", "method", "operator", "mean"), MOTIVATION)
def test_motivation_ratios_are_the_published_ones(
    gpu: str, baseline: str, method: str, operator: str, mean: float
) -> None:
    rows = {
        (r.method, r.batch, r.seq_len, r.hidden): r.median for r in rows_of(gpu, "motivation") if r.operator == operator
    }
    ratios = [median / rows[method, *size] for (name, *size), median in rows.items() if name == baseline]
    assert len(ratios) == 8
    assert geomean(ratios) == pytest.approx(mean, abs=0.006)


def test_missing_numbers_are_rows_with_a_reason() -> None:
    missing: dict[tuple[str, str, str, str], int] = {}
    for gpu in ("4090", "a100"):
        for experiment in ("mha", "end_to_end"):
            for row in rows_of(gpu, experiment):
                if row.status != "ok":
                    place = (gpu, experiment, row.method, row.status)
                    missing[place] = missing.get(place, 0) + 1
    assert missing == {
        ("4090", "mha", "bytetransformer", "unsupported"): 24,
        ("4090", "mha", "mcfuser", "oom"): 2,
        ("4090", "end_to_end", "bytetransformer", "unsupported"): 7,
        ("4090", "end_to_end", "mcfuser", "unsupported"): 3,
        ("4090", "end_to_end", "mcfuser", "oom"): 1,
        ("4090", "end_to_end", "bolt", "error"): 5,
        ("a100", "mha", "bytetransformer", "unsupported"): 24,
        ("a100", "mha", "mcfuser", "oom"): 2,
        ("a100", "end_to_end", "bytetransformer", "unsupported"): 7,
        ("a100", "end_to_end", "mcfuser", "unsupported"): 3,
        ("a100", "end_to_end", "bolt", "error"): 1,
    }


def test_rows_keep_what_a_reader_must_know() -> None:
    mha = rows_of("4090", "mha")
    assert {row.mask for row in mha if row.method == "splat"} == {"not_recorded"}
    assert {row.mask for row in mha if row.method == "mcfuser"} == {"bigbird"}
    assert all(
        "repeats it for all four masks" in r.note for r in mha if r.method in ("splat", "mcfuser") and r.status == "ok"
    )
    sliding = {(r.batch, r.mask_params) for r in mha if r.mask == "sliding_window" and r.method == "stof"}
    assert sliding == {(1, "w=64, one-sided"), (8, "w=64, two-sided"), (16, "w=64, two-sided")}
    for experiment in ("end_to_end", "ablation"):
        named = [r for r in rows_of("a100", experiment) if r.method in ("torch_native", "torch_compile")]
        assert all("printed label: Torch" in r.note and "the printed label is kept" in r.note for r in named)
    tuning = {(r.model, r.batch): r for r in rows_of("a100", "tuning_cost") if r.method == "stof"}
    assert tuning["llama", 16].median == 246.6
    assert "264.6" in tuning["llama", 16].note
    assert all("names no GPU" in r.note for r in rows_of("a100", "overhead"))


COLUMNS = "figure,gpu,run,mask,model,operator,batch,seq_len,hidden,method,method_label,value,unit,source_file,source_line,note"


def _source(folder: Path, lines: list[str]) -> Path:
    for figure in published.EXPERIMENTS:
        mine = [line for line in lines if line.startswith(f"{figure},")]
        (folder / f"{figure}.csv").write_text("\n".join([COLUMNS, *mine]) + "\n", encoding="utf-8")
    return folder


def test_the_converter_takes_only_what_is_behind_the_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    _source(
        source,
        [
            "fig9_10,RTX4090,paper,causal,,,8,256,768,flash_attention2,FlashAttn2,0.064,ms,a.txt,7,",
            "fig9_10,A100,rerun,causal,,,8,256,768,flash_attention2,FlashAttn2,0.09,ms,b.txt,7,",
            "fig11,RTX4090,paper,bigbird,bert_base,,8,256,,bolt,Bolt,12.8,ms,c.txt,9,setting not in the figure; not plotted",
        ],
    )
    out = tmp_path / "out"
    assert published.main([str(source), str(out)]) == 0
    assert capsys.readouterr().out.startswith("1 rows for 4090, a100 written under")
    assert [str(p.relative_to(out)) for p in sorted(out.rglob("*.csv"))] == ["4090/mha/fa2.csv"]
    (row,) = read_rows(out / "4090" / "mha" / "fa2.csv")
    assert (row.median, row.unit, row.metric, row.batch, row.seq_len, row.heads) == (
        64.0,
        "us",
        "host_time",
        8,
        256,
        12,
    )


def test_the_converter_names_the_line_of_a_foreign_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _source(tmp_path, ["fig11,H100,paper,bigbird,bert_base,,8,256,,bolt,Bolt,12.8,ms,c.txt,9,"])
    assert published.main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'fig11.csv'}: line 2: 'H100'" in capsys.readouterr().err
    assert published.main([str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2


def test_the_recorded_tables_are_as_the_writer_writes_them() -> None:
    for path in FILES:
        with open(path, encoding="utf-8", newline="") as file:
            assert len({len(line) for line in csv.reader(file)}) == 1
        assert b"\r" not in path.read_bytes()
