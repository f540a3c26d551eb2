"""Checks of the configuration, each failure one line, and what a measuring job is told."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.utils import validate

from stof_kernels import baselines
from stof_kernels.benchmarking import config as checks
from stof_kernels.benchmarking.config import ConfigError
from stof_kernels.benchmarking.measurement import Measurement, write_rows
from stof_kernels.benchmarking.pages import page_facts
from stof_kernels.provenance import code_digest

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8"))
CONFIG = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
validate(CONFIG, str(ROOT / "workflow/schemas/config.schema.yaml"))  # fills in the defaults


def changed(place: str, value: Any) -> dict[str, Any]:
    """The configuration with one value changed; ``place`` is a path with slashes."""
    config = copy.deepcopy(CONFIG)
    section, *keys = config, *place.split("/")
    for key in keys[:-1]:
        section = section[int(key) if key.isdigit() and isinstance(section, list) else key]
    section[keys[-1]] = value
    return config


def check(config: dict[str, Any]) -> None:
    checks.normalize(config)
    checks.check_schema(config, SCHEMA)
    checks.check_relations(config)


def test_the_configuration_itself_passes() -> None:
    check(copy.deepcopy(CONFIG))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("sede", 1, "config: unknown key 'sede', did you mean 'seed'?; allowed: gpu, source, gpus, seed, experiments"),
        ("experiments/mha/head", 3, "config experiments.mha: unknown key 'head', did you mean 'heads'?"),
        ("experiments/mhb", {}, "config experiments: unknown key 'mhb', did you mean 'mha'?; allowed: mha, "),
        ("experiments/mha/timing/cpu/warm_up", 1, "config experiments.mha.timing.cpu: unknown key 'warm_up'"),
        ("experiments/mha/sizes/cpu/0/seqlen", [1], "config experiments.mha.sizes.cpu.0: unknown key 'seqlen'"),
        ("experiments/mha/heads", 0, "config experiments.mha.heads: 0 is less than the minimum of 1; allowed: "),
        ("experiments/mha/heads", "12", "config experiments.mha.heads: '12' is not of type 'integer'; allowed: "),
        (
            "experiments/mha/head_dim",
            60,
            "config experiments.mha.head_dim: 60 is not a multiple of 8; allowed: elements of one head",
        ),
        ("experiments/mha/dtype/cpu", "float16", "config experiments.mha.dtype.cpu: 'float16' is not one of"),
        ("experiments/mha/masks", [], "config experiments.mha.masks: "),
        ("experiments/mha/masks", ["casual"], "config experiments.mha.masks: 'casual' is unknown, allowed: causal, "),
        ("experiments/mha/methods", ["fa7"], "config experiments.mha.methods: 'fa7' is unknown, allowed: stof, "),
        ("experiments/mha/methods", "fa7", "config experiments.mha.methods: 'fa7' is unknown, allowed: all, stof, "),
        ("experiments/mha/timing/cpu/max_samples", 2, "config experiments.mha.timing.cpu: min_samples 5 is above"),
        ("experiments/mha/sizes/cpu/1/batch", 1, "config experiments.mha.sizes.cpu: batch 1 is listed twice"),
        (
            "experiments/end_to_end/models/cpu",
            ["bert"],
            "config experiments.end_to_end (cpu): models: 'bert' is unknown, ",
        ),
        (
            "experiments/end_to_end/mask",
            "bigbrid",
            "config experiments.end_to_end (cuda): mask: 'bigbrid' is unknown, ",
        ),
        ("experiments/end_to_end/model_size", "huge", "config experiments.end_to_end.model_size: 'huge' is not one of"),
        ("experiments/end_to_end/tuning_s/cpu", -1, "config experiments.end_to_end.tuning_s.cpu: -1 is less than"),
        (
            "experiments/ablation/methods",
            ["sdpa"],
            "config experiments.ablation.methods: 'sdpa' is unknown, allowed: stof, ",
        ),
        ("experiments/overhead/heads", 3, "config experiments.overhead: unknown key 'heads'"),
        (
            "experiments/end_to_end/sizes/cpu",
            [{"batch": 1, "seq_len": [64]}, {"batch": 1, "seq_len": [64]}],
            "config experiments.end_to_end.sizes.cpu: bert_base:1x64 is listed twice, allowed: once",
        ),
        (
            "experiments/motivation/operators",
            ["gemm"],
            "config experiments.motivation (cuda): operators: 'gemm' is unknown",
        ),
        ("experiments/motivation/candidates/cpu", 1, "config experiments.motivation.candidates.cpu: 1 is less than"),
        ("gpus/a100/match", "(", "config gpus.a100.match: '(' is no regular expression"),
        ("gpus/a100/device", "cpu", "config gpus.a100: device cpu does not go with arch 'sm_80'"),
        ("gpus/auto", {"label": "x", "arch": "cpu"}, "config gpus: unknown key 'auto'"),
        ("source", "here", "config source: 'here' is not one of ['auto', 'measure', 'recorded']"),
        ("seed", -1, "config seed: -1 is less than the minimum of 0"),
    ],
)
def test_each_mistake_is_one_line(place: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(changed(place, value))
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)


def test_an_unquoted_number_names_a_gpu() -> None:
    config = copy.deepcopy(CONFIG)
    config["gpus"][4090] = config["gpus"].pop("4090")
    check(config)
    assert "4090" in config["gpus"]


def test_settings_of_a_job_are_its_device_s() -> None:
    settings = checks.job_settings(CONFIG, "mha", "cpu")
    assert settings["dtype"] == "float32"
    assert settings["sizes"] == CONFIG["experiments"]["mha"]["sizes"]["cpu"]
    assert settings["timing"] == CONFIG["experiments"]["mha"]["timing"]["cpu"]
    assert checks.job_settings(CONFIG, "mha", "cuda")["sizes"] == CONFIG["experiments"]["mha"]["sizes"]["cuda"]


def test_settings_that_are_not_written_are_those_of_the_shared_experiment() -> None:
    config = copy.deepcopy(CONFIG)
    config["experiments"]["end_to_end"]["tuning_s"]["cpu"] = 7
    config["experiments"]["overhead"] = {"methods": "all", "tuning_s": {"cuda": 5}}
    check(config)
    assert config["experiments"]["overhead"]["tuning_s"] == {"cuda": 5, "cpu": 7}
    assert checks.job_settings(config, "overhead", "cpu") == checks.job_settings(config, "end_to_end", "cpu")
    config["experiments"]["overhead"]["sizes"]["cpu"].append({"batch": 2, "seq_len": [64]})
    assert len(config["experiments"]["end_to_end"]["sizes"]["cpu"]) == 1  # a copy


def test_a_run_is_shared_where_all_but_the_lists_is_equal() -> None:
    assert checks.shared_experiment(CONFIG, "tuning_cost", "stof", "cpu") == "end_to_end"
    assert checks.shared_experiment(CONFIG, "ablation", "stof_mha_only", "cpu") == ""  # end_to_end has no such method
    assert checks.shared_experiment(CONFIG, "end_to_end", "stof", "cpu") == ""
    fewer = changed("experiments/ablation/models/cpu", ["bert_base"])
    assert checks.shared_experiment(fewer, "ablation", "stof", "cpu") == "end_to_end"
    other = changed("experiments/ablation/tuning_s/cpu", 3)
    assert checks.shared_experiment(other, "ablation", "stof", "cpu") == ""
    assert checks.shared_experiment(other, "ablation", "stof", "cuda") == "end_to_end"
    without = changed("experiments/end_to_end/methods", ["sdpa"])
    assert checks.shared_experiment(without, "ablation", "stof", "cpu") == ""


def test_selected_methods() -> None:
    assert checks.selected_methods(CONFIG, "mha") == baselines.methods_for("mha")
    some = changed("experiments/mha/methods", ["sdpa", "stof"])
    assert [spec.id for spec in checks.selected_methods(some, "mha")] == ["stof", "sdpa"]
    assert checks.selected_methods({"experiments": {}}, "mha") == []
    # The same id in another experiment may be another kind of method.
    whole = {spec.id: spec for spec in checks.selected_methods(CONFIG, "end_to_end")}
    assert whole["stof"].kind == "model"
    assert whole["stof"].label == baselines.get("stof").label


def record(folder: Path, name: str, provenance: str, **values: Any) -> Path:
    row = {"experiment": "mha", "gpu": "a100", "method": name, "metric": "device_time", "median": 1.5} | values
    path = folder / "a100" / "mha" / f"{name}.csv"
    write_rows(path, [Measurement(**row)])
    path.with_name(f"{name}.provenance.json").write_text(provenance, encoding="utf-8")
    return path


def test_recorded_rows_belong_to_their_path(tmp_path: Path) -> None:
    record(tmp_path, "stof", "{}")
    checks.check_recorded(tmp_path, "a100")
    checks.check_recorded(tmp_path, "cpu")
    for column, value in (("gpu", "h200"), ("experiment", "mha_long"), ("method", "sdpa")):
        path = record(tmp_path, "stof", "{}", **{column: value})
        with pytest.raises(ConfigError, match=rf"^recorded rows: {path}: a row of {column} '{value}', allowed: .*$"):
            checks.check_recorded(tmp_path, "a100")


@pytest.mark.parametrize("provenance", ["", "[]", '{"gpu": '])
def test_recorded_rows_have_a_provenance(tmp_path: Path, provenance: str) -> None:
    record(tmp_path, "stof", provenance)
    with pytest.raises(ConfigError, match=r"^recorded rows: .*stof\.provenance\.json.*$"):
        checks.check_recorded(tmp_path, "a100")


def test_page_says_date_stale_methods_and_why_there_are_no_rows(tmp_path: Path) -> None:
    def measured(date: str, names: tuple[str, ...], digest: str) -> str:
        code = {"digest": digest, "parts": {name: code_digest([name]) for name in names}}
        machine = {"device": "cpu", "name": "AMD EPYC", "threads": 2}
        return json.dumps({"date": date, "machine": machine, "code": code})

    current = baselines.get("sdpa").depends_on("cpu")
    tables = [
        record(tmp_path, "sdpa", measured("2026-01-02", current, code_digest(current))),
        record(tmp_path, "torch_native", measured("2026-01-03", (), "0" * 12)),
        record(tmp_path, "fa2", '{"kind": "published", "date": "2025-08-31"}'),
    ]
    facts = page_facts("a100", "recorded", ("mha",), tables)
    assert facts == {
        "date": "2026-01-02 to 2026-01-03",
        "hardware": "AMD EPYC, 2 threads",
        "stale": ("torch_native",),
        "missing_reason": "",
    }
    assert page_facts("a100", "recorded", ("mha",), tables[:1])["date"] == "2026-01-02"
    assert page_facts("a100", "recorded", ("mha",), tables[2:])["date"] == "2025-08-31"
    several = {"runs": ["its id alone"], "date": "2026-01-05"}, {"runs": [{"date": "2026-01-04"}], "date": "2026-01-05"}
    for origin, days in zip(several, ("2026-01-05", "2026-01-04 to 2026-01-05"), strict=True):
        about = json.dumps(json.loads(measured("", (), "0" * 12)) | origin)
        assert page_facts("a100", "recorded", ("mha",), [record(tmp_path, "sdpa", about)])["date"] == days
    absent = page_facts("h200", "recorded", ("mha",), tables)
    assert absent["missing_reason"].startswith("no rows of mha are recorded for h200")
    assert "config.yaml" in page_facts("h200", "measured", ("end_to_end",), tables)["missing_reason"]
