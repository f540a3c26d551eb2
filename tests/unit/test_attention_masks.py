"""Masks as a config gives them: with parameters, per head; what is wrong with an entry is one line."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from snakemake.utils import validate

from stof_kernels import SparseMask, masks
from stof_kernels.benchmarking import config as checks
from stof_kernels.benchmarking.attention_masks import FAMILIES, HeadBlocks, MaskEntry, MaskError, parse_mask
from stof_kernels.benchmarking.check import kept_share
from stof_kernels.benchmarking.config import ConfigError
from stof_kernels.benchmarking.experiments import EXPERIMENTS, SettingsError, attention_cells

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8"))
SETTINGS = {
    "masks": ["causal", {"family": "sliding_window", "w": 8}],
    "sizes": [{"batch": 2, "seq_len": [64]}],
    "heads": 4,
    "head_dim": 16,
    "dtype": "float32",
    "seed": 0,
}


@pytest.mark.parametrize(
    ("entry", "label", "pattern"),
    [
        ("causal", "causal", masks.causal()),
        ("longformer", "longformer", masks.get("longformer", 256)),
        ({"family": "sliding_window", "w": 100}, "sliding_window(w=100)", masks.sliding_window(100)),
        (
            {"family": "sliding_window", "w": 9, "causal": True},
            "sliding_window(w=9,causal=true)",
            masks.sliding_window(9, True),
        ),
        ({"family": "longformer", "g": 3}, "longformer(g=3)", masks.longformer(16, 3)),  # w of the length
        (
            {"family": "bigbird", "w": 0, "g": 0, "fill": 0.5},
            "bigbird(w=0,g=0,fill=0.5)",
            masks.bigbird(0, 0, fill=0.5),
        ),
        ({"family": "document", "causal": True}, "document(causal=true)", None),
        ({"family": "head_blocks", "fill": 0.25}, "head_blocks(fill=0.25)", HeadBlocks(3, fill=0.25)),
    ],
)
def test_an_entry_is_a_mask_and_a_readable_name(entry: object, label: str, pattern: masks.Pattern | None) -> None:
    parsed = parse_mask(entry)
    assert parsed.label == label
    found = parsed.at(256, heads=3)
    assert found == (pattern or masks.document(masks.get("document", 256).params["lengths"], causal=True))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("causel", "mask 'causel' is unknown, allowed: causal, "),
        (7, "mask 7 is unknown"),
        ({"w": 3}, "mask None is unknown"),
        ({"family": "causal", "w": 3}, "mask causal(w=3): parameter 'w' is unknown, allowed: offset"),
        ({"family": "full", "w": 3}, "mask full(w=3): parameter 'w' is unknown, allowed: none"),
        (
            {"family": "sliding_window", "w": -1},
            "mask sliding_window(w=-1): sliding_window: w is -1, allowed: an integer",
        ),
        ({"family": "sliding_window", "w": 1.5}, "sliding_window: w is 1.5 (float), allowed: an integer"),
        ({"family": "document", "lengths": [3]}, "parameter 'lengths' is unknown, allowed: causal"),
        ({"family": "head_blocks", "heads": 2}, "parameter 'heads' is unknown, allowed: block, fill, seed"),
        ({"family": "head_blocks", "fill": 2}, "head_blocks: fill is 2, allowed: a share from 0 to 1"),
    ],
)
def test_what_is_no_mask_is_one_clear_line(entry: object, message: str) -> None:
    with pytest.raises(MaskError) as error:
        parse_mask(entry)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_registered_family_can_be_an_entry() -> None:
    assert set(FAMILIES) == {*masks.FAMILIES, "head_blocks"}
    for family in masks.FAMILIES:
        assert MaskEntry(family).at(512) == masks.get(family, 512)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "block", "fill"), [(512, 512, 64, 0.25), (100, 300, 32, 0.1), (64, 64, 64, 0.0)]
)
def test_head_blocks_keep_as_many_blocks_in_every_row_and_others_in_every_head(
    q_len: int, kv_len: int, block: int, fill: float
) -> None:
    pattern = HeadBlocks(5, block, fill, seed=2)
    table = pattern.table(q_len, kv_len)
    assert table.shape == (5, -(-q_len // block), -(-kv_len // block))
    assert set(table.sum(-1).flatten().tolist()) == {max(1, round(fill * table.shape[2]))}
    dense = table.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :q_len, :kv_len]
    mask = SparseMask.from_pattern(pattern, q_len, kv_len, heads=5)
    assert torch.equal(mask.to_dense()[0], dense)
    assert kept_share(pattern, q_len, kv_len, heads=5) == pytest.approx(dense.double().mean().item())
    if table[0].numel() > 4:
        assert not torch.equal(table[0], table[1])
        assert not torch.equal(table, HeadBlocks(5, block, fill, seed=3).table(q_len, kv_len))


def test_head_blocks_are_the_same_everywhere() -> None:
    table = HeadBlocks(2, 64, 0.25).table(512, 512)
    assert [row.nonzero().flatten().tolist() for row in table[:, 0]] == [[5, 7], [0, 1]]


def test_cells_of_masks_with_parameters_and_sizes_with_heads_of_their_own() -> None:
    sizes = [
        {"batch": 2, "seq_len": [64]},
        {"batch": 1, "heads": 8, "kv_heads": 2, "head_dim": 32, "seq_len": [64, 128]},
        {"batch": 1, "head_dim": 32, "seq_len": [64], "masks": [{"family": "head_blocks", "fill": 0.5}]},
    ]
    cells = attention_cells(SETTINGS | {"sizes": sizes}, "cpu")
    assert [cell.key for cell in cells] == [
        "causal:2x64",
        "sliding_window(w=8):2x64",
        "causal:1x64:8/2x32",
        "sliding_window(w=8):1x64:8/2x32",
        "causal:1x128:8/2x32",
        "sliding_window(w=8):1x128:8/2x32",
        "head_blocks(fill=0.5):1x64:4/4x32",
    ]
    shapes = [(c.problem.heads, c.problem.kv_heads, c.problem.head_dim) for c in cells]
    assert shapes == [(4, 4, 16)] * 2 + [(8, 2, 32)] * 4 + [(4, 4, 32)]
    assert cells[-1].problem.pattern == HeadBlocks(4, fill=0.5)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"heads": 6, "kv_heads": 4}, "kv_heads is 4, allowed: a divisor of heads (6)"),
        ({"kv_heads": 3}, "kv_heads is 3, allowed: a divisor of heads (4)"),
        ({"head_dim": 0}, "head_dim is 0, allowed: an integer >= 1"),
        ({"masks": ["causel"]}, "mask 'causel' is unknown"),
        ({"masks": []}, "masks is [], allowed: a list"),
    ],
)
def test_sizes_that_cannot_be_read_are_one_clear_line(size: dict, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        attention_cells(SETTINGS | {"sizes": [{"batch": 1, "seq_len": [64]} | size]}, "cpu")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def configured() -> dict:
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    validate(config, str(ROOT / "workflow/schemas/config.schema.yaml"))
    return config


def check(config: dict) -> None:
    checks.check_schema(config, SCHEMA)
    checks.check_relations(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"masks": [{"family": "sliding_window", "v": 3}]}, "config experiments.mha_long.masks.0: unknown key 'v'"),
        ({"masks": [{"w": 3}]}, "config experiments.mha_long.masks.0: 'family' is a required property"),
        ({"masks": [{"family": "sliding_window", "w": -2}]}, "config experiments.mha_long.masks.0.w: -2 is less than"),
        (
            {"masks": [{"family": "casual"}]},
            "config experiments.mha_long.masks: 'casual' is unknown, allowed: causal, ",
        ),
        (
            {"masks": [{"family": "causal", "w": 2}]},
            "config experiments.mha_long.masks: causal(w=2): parameter 'w' is unknown, allowed: offset",
        ),
        (
            {"sizes": {"cpu": [{"batch": 1, "seq_len": [64], "masks": [{"family": "full", "g": 1}]}], "cuda": []}},
            "config experiments.mha_long.sizes.cuda: [] ",
        ),
    ],
)
def test_a_config_with_a_wrong_mask_is_one_line(change: dict, said: str) -> None:
    config = configured()
    config["experiments"]["mha_long"] |= change
    with pytest.raises(ConfigError) as error:
        check(config)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            [{"batch": 1, "seq_len": [8], "heads": 6, "kv_heads": 4}],
            "0: kv_heads is 4, allowed: a divisor of heads (6)",
        ),
        ([{"batch": 1, "seq_len": [8], "masks": [{"family": "full", "g": 1}]}], "0.masks: full(g=1): parameter 'g'"),
        (
            [{"batch": 1, "seq_len": [8], "head_dim": 64}, {"batch": 1, "seq_len": [16], "head_dim": 64}],
            ": batch 1 is listed twice with the same heads and masks, allowed: once",
        ),
    ],
)
def test_sizes_of_a_config_are_checked(sizes: list, said: str) -> None:
    config = configured()
    config["experiments"]["mha_long"]["sizes"]["cpu"] = sizes
    with pytest.raises(ConfigError) as error:
        checks.check_relations(config)
    assert str(error.value).startswith("config experiments.mha_long.sizes.cpu")
    assert said in str(error.value)


def test_a_batch_may_come_back_with_other_heads_or_masks() -> None:
    config = configured()
    assert len(config["experiments"]["mha_long"]["sizes"]["cuda"]) > 1
    checks.check_relations(copy.deepcopy(config))


def test_configured_cells_have_names_of_their_own() -> None:
    config = configured()
    for experiment in ("mha_bf16", "mha_long", "mask_build", "scaling", "dynamic_mask"):
        for device in ("cpu", "cuda"):
            cells = EXPERIMENTS[experiment].cells(checks.job_settings(config, experiment, device), device)
            assert len({cell.key for cell in cells}) == len(cells)
            assert all(" " not in cell.key for cell in cells)


def test_the_goals_are_cells() -> None:
    """What the experiments are there to show is among the cells of a GPU."""
    config = configured()

    def keys(experiment: str) -> set[str]:
        return {c.key for c in EXPERIMENTS[experiment].cells(checks.job_settings(config, experiment, "cuda"), "cuda")}

    assert len(keys("mha_bf16")) == 24  # a third of the paper's 72
    long = keys("mha_long")
    assert len(long) == 6 * 3 * 3 + 2
    assert {"sliding_window(w=1024):1x32768:32/8x128", "longformer(w=256,g=128):1x16384", "document:1x8192"} <= long
    assert {"longformer:1x4096", "bigbird:1x32768"} <= keys("mask_build")
    assert "sliding_window(w=256):1x131072" in keys("scaling")
    assert "head_blocks(fill=0.25):1x8192" in keys("dynamic_mask")


def test_methods_are_taken_from_another_experiment_and_so_are_reasons() -> None:
    assert EXPERIMENTS["mha_bf16"].methods == EXPERIMENTS["mha"].methods
    assert EXPERIMENTS["mask_build"].methods == ("stof", "sdpa", "flex_attention")
    overhead = next(spec for spec in EXPERIMENTS["mha"].specs if spec.id == "torch_compile_reduce_overhead")
    assert EXPERIMENTS["mha_long"].why_not(overhead, "cuda") == EXPERIMENTS["mha"].why_not(overhead, "cuda") != ""


def test_numbers_depend_on_what_their_experiment_adds() -> None:
    spec = next(spec for spec in EXPERIMENTS["mha"].specs if spec.id == "sdpa")
    assert EXPERIMENTS["mha"].depends_of(spec, "cuda") == spec.depends_on("cuda")
    added = set(EXPERIMENTS["dynamic_mask"].depends_of(spec, "cuda")) - set(spec.depends_on("cuda"))
    assert added == {f"benchmarking/attention_{name}.py" for name in ("dynamic", "forms", "masks")}


def test_masks_of_a_config_are_read_without_torch() -> None:
    code = """
        import sys
        from stof_kernels.benchmarking.attention_masks import parse_mask
        parse_mask({"family": "head_blocks", "fill": 0.1})
        sys.exit("torch" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == 0
