"""Schema, configuration, code and environment say the same thing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from packaging.requirements import Requirement
from packaging.version import Version
from snakemake.utils import validate

from stof_kernels.benchmarking import config as checks
from stof_kernels.benchmarking import measurement
from stof_kernels.benchmarking.measurement import COLUMNS, Measurement, read_rows
from stof_kernels.benchmarking.timing import Budget

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "workflow" / "schemas"


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


CONFIG_SCHEMA, ROW_SCHEMA = load(SCHEMAS / "config.schema.yaml"), load(SCHEMAS / "measurement.schema.yaml")


def objects(schema: object, where: str = "") -> Iterator[tuple[str, dict]]:
    """Every sub-schema of an object, with its place."""
    if isinstance(schema, dict):
        if "properties" in schema or "patternProperties" in schema:
            yield where, schema
        for key, value in schema.items():
            if key not in ("default", "enum"):
                yield from objects(value, f"{where}/{key}")


@pytest.mark.parametrize("schema", [CONFIG_SCHEMA, ROW_SCHEMA], ids=["config", "measurement"])
def test_schema_is_closed_typed_described_and_defaulted(schema: dict) -> None:
    Draft202012Validator.check_schema(schema)
    found = dict(objects(schema))
    assert found
    for where, part in found.items():
        assert part["additionalProperties"] is False, where
        for name, key in part.get("properties", {}).items():
            assert {"type", "description"} <= set(key), f"{where}: {name}"
            optional = where == "/properties/experiments"  # an experiment that is left out is not measured
            optional = optional or "if not given" in key["description"]  # and it says what holds then
            assert "default" in key or name in part.get("required", ()) or optional, f"{where}: {name}"


def test_config_file_is_what_the_schema_defaults_to() -> None:
    config: dict = {}
    validate(config, str(SCHEMAS / "config.schema.yaml"))
    written = load(ROOT / "config.yaml")
    validate(written, str(SCHEMAS / "config.schema.yaml"))  # optional keys of the gpus table
    known = CONFIG_SCHEMA["properties"]["experiments"]["properties"]
    written["experiments"] = {
        name: section for name, section in written["experiments"].items() if "default" in known[name]
    }
    assert config == written


def test_config_file_passes_its_own_checks() -> None:
    config = load(ROOT / "config.yaml")
    checks.normalize(config)
    checks.check_schema(config, CONFIG_SCHEMA)
    validate(config, str(SCHEMAS / "config.schema.yaml"))
    checks.check_relations(config)


def test_timing_keys_are_those_of_the_timer() -> None:
    for device, section in load(ROOT / "config.yaml")["experiments"]["mha"]["timing"].items():
        assert isinstance(Budget.from_settings(section), Budget), device
    assert set(CONFIG_SCHEMA["$defs"]["timing"]["properties"]) <= {field.name for field in fields(Budget)}


def test_row_schema_has_the_columns_of_a_measurement() -> None:
    properties = ROW_SCHEMA["properties"]
    assert tuple(properties) == COLUMNS
    assert set(properties["metric"]["enum"]) == set(measurement.METRICS)
    assert set(properties["unit"]["enum"]) == set(measurement.METRICS.values())
    assert tuple(properties["status"]["enum"]) == measurement.STATUSES
    assert tuple(properties["source"]["enum"]) == measurement.SOURCES
    assert tuple(properties["dtype"]["enum"]) == measurement.DTYPES
    defaults = {field.name: field.default for field in fields(Measurement)}
    for name, key in properties.items():
        if name not in ROW_SCHEMA["required"]:
            assert key["default"] == defaults[name], name


def test_recorded_rows_fit_the_row_schema() -> None:
    validator = Draft202012Validator(ROW_SCHEMA)
    tables = sorted((ROOT / "results" / "recorded").rglob("*.csv"))
    assert tables
    for table in tables:
        for row in read_rows(table):
            problems = [error.message for error in validator.iter_errors({c: getattr(row, c) for c in COLUMNS})]
            assert not problems, f"{table}: {problems}"


def lock() -> dict[str, str]:
    lines = (ROOT / "envs" / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin), (
            pin
        )  # no local version, hash, marker or address
    names = [re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins]
    assert len(set(names)) == len(names)
    return dict(zip(names, (pin.partition("==")[2] for pin in pins), strict=True))


def test_lock_pins_what_is_asked_for() -> None:
    pins = lock()
    assert pins["torch"] == "2.13.0"
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]
    project = load_toml(ROOT / "pyproject.toml")
    asked = [
        *(line for line in (ROOT / "envs" / "requirements.in").read_text().splitlines() if line and line[0] != "#"),
        *project["project"]["dependencies"],
        *(name for extra in project["project"]["optional-dependencies"].values() for name in extra),
        *project["build-system"]["requires"],
    ]
    for requirement in map(Requirement, asked):
        assert Version(pins[requirement.name]) in requirement.specifier, requirement


def load_toml(path: Path) -> dict:
    import tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_profiles_agree_on_what_triggers_a_rerun() -> None:
    default, slurm = (load(ROOT / "profiles" / name / "config.yaml") for name in ("default", "slurm"))
    assert default["cores"] == "all"
    for key in ("rerun-triggers", "rerun-incomplete"):
        assert default[key] == slurm[key]
    assert "code" not in default["rerun-triggers"]  # time stamps of scripts would measure again after a mere checkout
