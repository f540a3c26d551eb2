"""Bad input ends a run before anything is done, with exactly one line that says what, where and what is allowed."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "gpuu=4090"], "unknown key 'gpuu', did you mean 'gpu'?"),
        (["--config", "gpu=4091"], "'4091' is unknown, allowed: auto, 4090, a100, h100, h200, cpu"),
        (["--config", "gpu=cpu,abacus"], "'abacus' is unknown, allowed: auto"),
        (["--config", "experiments={mha: {masks: [causal, casual]}}"], "'casual' is unknown, allowed: causal, "),
        (["--config", "experiments={mha: {methods: [stof, fa7]}}"], "'fa7' is unknown, allowed: stof, "),
        (["--config", "source=measured"], "'measured' is not one of ['auto', 'measure', 'recorded']"),
    ],
    ids=["key", "gpu", "one gpu of two", "mask", "method", "source"],
)
def test_bad_config_is_one_line(repo, arguments: list[str], said: str) -> None:
    lines = repo.snakemake("all", *arguments, status=1).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("stof-kernels: config")
    assert said in lines[0]
    assert not (repo.path / ".snakemake" / "locks").exists()


def test_measuring_on_a_card_that_is_not_here(repo) -> None:
    repo.edit("config.yaml", "match: \\bH200\\b", "match: (?!)  # never here")
    for dry in ([], ["--dry-run"]):
        output = repo.snakemake("all", *dry, "--config", "gpu=h200", "source=measure", status=1)
        assert len(output.splitlines()) == 1
        assert "source: measure needs NVIDIA H200" in output
        assert "allowed: auto, recorded" in output


@pytest.mark.parametrize("damage", ["cut", "foreign", "other gpu", "no provenance"])
def test_damaged_recorded_rows_stop_the_run(repo, damage: str) -> None:
    table = repo.path / "results" / "recorded" / "4090" / "mha" / "stof.csv"
    text = table.read_text(encoding="utf-8")
    if damage == "cut":
        table.write_text(text[: len(text) * 2 // 3], encoding="utf-8")
    elif damage == "foreign":
        table.write_text("size,time\n1,2\n", encoding="utf-8")
    elif damage == "other gpu":
        table.write_text(text.replace(",4090,", ",a100,"), encoding="utf-8")
    else:
        table.with_name("stof.provenance.json").unlink()
    lines = repo.snakemake("results/fig9_10.pdf", "--config", "gpu=4090", status=1).splitlines()
    assert len(lines) == 1, lines
    assert "results/recorded/4090/mha/stof" in lines[0]
    assert "allowed" in lines[0]
    # Rows of a GPU that is not configured are nobody's business.
    assert repo.planned("results/fig9_10.pdf", "--config", "gpu=a100") == {"aggregate_experiment": 1, "plot_fig9_10": 1}
