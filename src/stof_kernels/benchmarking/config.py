"""Checks of the experiment's configuration, each failure one line, and the settings of a job cut out of it.

No torch: Snakemake calls this while it parses the workflow.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stof_kernels.baselines import MethodSpec
from stof_kernels.baselines.registry import ATTENTION

from . import experiments as known_experiments
from . import fights
from .attention_masks import MaskError, parse_mask
from .measurement import MeasurementError, read_rows
from .records import RecordError, read_provenance

ALL = "all"
LISTS = ("models", "sizes")
"""Keys of a section that say which cells there are, not how one is measured."""


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one line: which key, what it holds, what is allowed."""


def normalize(config: dict[str, Any]) -> None:
    """Give the gpus table its names as strings (YAML reads an unquoted 4090 as a number), and sections what they inherit.

    In place. An experiment that can share another's runs has that one's settings wherever it says nothing else.
    """
    if isinstance(config.get("gpus"), dict):
        config["gpus"] = {str(name): entry for name, entry in config["gpus"].items()}
    sections = config.get("experiments")
    if isinstance(sections, dict):
        for experiment in known_experiments.EXPERIMENTS.values():
            own, other = sections.get(experiment.id), sections.get(experiment.shares)
            if isinstance(own, dict) and isinstance(other, dict):
                _inherit(own, {name: value for name, value in other.items() if name != "methods"})


def _inherit(own: dict[str, Any], other: Mapping[str, Any]) -> None:
    for name, value in other.items():
        if name not in own:
            own[name] = copy.deepcopy(value)
        elif isinstance(own[name], dict) and isinstance(value, dict):
            _inherit(own[name], value)


def check_schema(config: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """ConfigError for the first key that the JSON schema does not allow, with the closest allowed name for a misspelt one."""
    from jsonschema import Draft202012Validator

    errors = sorted(
        Draft202012Validator(schema).iter_errors(config), key=lambda e: [str(part) for part in e.absolute_path]
    )
    if errors:
        raise ConfigError(_explain(errors[0]))


def _explain(error: Any) -> str:
    where = "config" + "".join(f".{part}" for part in error.absolute_path).replace(".", " ", 1)
    if error.validator == "additionalProperties":
        return f"{where}: {_explain_unknown_key(error)}"
    description = error.schema.get("description", "")
    return f"{where}: {error.message}" + (f"; allowed: {description}" if description else "")


def _explain_unknown_key(error: Any) -> str:
    allowed = list(error.schema.get("properties", ()))
    patterns = list(error.schema.get("patternProperties", ()))
    key = next(k for k in map(str, error.instance) if k not in allowed and not any(re.search(p, k) for p in patterns))
    close = difflib.get_close_matches(key, allowed, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    names = ", ".join(allowed) or f"names that match {', '.join(patterns)}"
    return f"unknown key {key!r}{hint}; allowed: {names}"


def check_relations(config: Mapping[str, Any]) -> None:
    """ConfigError for what the schema cannot say: ids that nothing defines, a table of GPUs that contradicts itself."""
    for name, entry in config["gpus"].items():
        if (entry["device"] == "cpu") != (entry["arch"] == "cpu"):
            raise ConfigError(f"config gpus.{name}: device {entry['device']} does not go with arch {entry['arch']!r}")
        try:
            re.compile(entry["match"])
        except re.error as error:
            raise ConfigError(
                f"config gpus.{name}.match: {entry['match']!r} is no regular expression ({error})"
            ) from None
    for experiment, section in config["experiments"].items():
        known, where = known_experiments.get(experiment), f"config experiments.{experiment}"
        if section["methods"] != ALL:
            named = section["methods"] if isinstance(section["methods"], list) else [section["methods"]]
            allowed = [ALL, *known.methods] if isinstance(section["methods"], str) else known.methods
            _check_known(f"{where}.methods", named, allowed)
        for device, timing in section["timing"].items():
            if timing["min_samples"] > timing["max_samples"]:
                least, most = timing["min_samples"], timing["max_samples"]
                raise ConfigError(f"{where}.timing.{device}: min_samples {least} is above max_samples {most}")
        if experiment == fights.ID:
            _check_fights(config, known, where)
        elif known.kind == ATTENTION:
            _check_attention(where, section)
        else:
            _check_cells(config, known, where)


def _check_attention(where: str, section: Mapping[str, Any]) -> None:
    """Masks and sizes of an experiment on attention alone."""
    _check_masks(where, section["masks"])
    for device, sizes in section["sizes"].items():
        for number, size in enumerate(sizes):
            _check_masks(f"{where}.sizes.{device}.{number}", size.get("masks", ()))
            _check_heads(f"{where}.sizes.{device}.{number}", section, size)
        _check_once(f"{where}.sizes.{device}", sizes)


def _check_cells(config: Mapping[str, Any], known: known_experiments.Experiment, where: str) -> None:
    """Whatever else names problems: they can be listed, and each is listed once."""
    for device in config["experiments"][known.id]["sizes"]:
        try:
            keys = [cell.key for cell in known.cells(job_settings(config, known.id, device), device)]
        except known_experiments.SettingsError as error:
            raise ConfigError(f"{where} ({device}): {str(error).removeprefix('settings: ')}") from None
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{where}.sizes.{device}: {key} is listed twice, allowed: once")


def _check_fights(config: Mapping[str, Any], known: known_experiments.Experiment, where: str) -> None:
    """Duels: every rival is one, and every cell can be found in its own experiment."""
    section = config["experiments"][known.id]
    for device, entries in section["fights"].items():
        for number, entry in enumerate(entries):
            _check_known(f"{where}.fights.{device}.{number}.rivals", entry["rivals"], known.methods)
        try:
            fights.settings_of(section, fields_of_duels(config, device), "", device)
        except fights.FightError as error:
            raise ConfigError(f"{where}.{error}") from None


def fields_of_duels(config: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The experiments that cells of a duel can come from, as settings of their jobs."""
    return {name: job_settings(config, name, device) for name in config["experiments"] if name in fights.FIELDS}


def _check_known(where: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    for name in names:
        if name not in allowed:
            raise ConfigError(f"{where}: {name!r} is unknown, allowed: {', '.join(allowed)}")


def _check_once(where: str, sizes: Iterable[Mapping[str, Any]]) -> None:
    seen = []
    for size in sizes:
        what = {name: value for name, value in size.items() if name != "seq_len"}
        if what in seen:
            own = "" if len(what) == 1 else " with the same heads and masks"
            batch = size["batch"]
            raise ConfigError(
                f"{where}: batch {batch} is listed twice{own}, allowed: once, with all its sequence lengths"
            )
        seen.append(what)


def _check_masks(where: str, entries: Iterable[Any]) -> None:
    for entry in entries:
        try:
            parse_mask(entry)
        except MaskError as error:
            raise ConfigError(f"{where}.masks: {str(error).removeprefix('mask ')}") from None


def _check_heads(where: str, section: Mapping[str, Any], size: Mapping[str, Any]) -> None:
    heads = size.get("heads", section["heads"])
    kv_heads = size.get("kv_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"{where}: kv_heads is {kv_heads}, allowed: a divisor of heads ({heads})")


def check_recorded(recorded: Path, gpu: str) -> None:
    """ConfigError unless every recorded table of ``gpu`` is one, holds rows of its own path only and has its provenance."""
    for path in sorted((recorded / gpu).rglob("*.csv")):
        try:
            rows = read_rows(path)
            read_provenance(path)
        except (MeasurementError, RecordError) as error:
            raise ConfigError(f"recorded rows: {error}") from None
        own = {"gpu": gpu, "experiment": path.parent.name, "method": path.stem}
        for row in rows:
            for column, expected in own.items():
                if getattr(row, column) != expected:
                    found = getattr(row, column)
                    raise ConfigError(
                        f"recorded rows: {path}: a row of {column} {found!r}, allowed: {expected!r} (its path)"
                    )


def selected_methods(config: Mapping[str, Any], experiment: str, device: str = "") -> list[MethodSpec]:
    """Methods that the config measures in ``experiment``, in the registry's order; empty without a section for it.

    Where each kind of device has methods of its own (duels), those of ``device``, of all kinds if it is empty.
    """
    section = config["experiments"].get(experiment)
    if section is None:
        return []
    specs = list(known_experiments.get(experiment).specs)
    if experiment == fights.ID:
        named = fights.rivals(section, device)
        specs = [spec for spec in specs if spec.id in named]
    return specs if section["methods"] == ALL else [spec for spec in specs if spec.id in section["methods"]]


def job_settings(config: Mapping[str, Any], experiment: str, device: str, method: str = "") -> dict[str, Any]:
    """The settings of a measuring job: the experiment's section, reduced to one kind of device (cpu or cuda).

    Of duels, those of ``method``, of every rival if it is empty.
    """
    section = {name: value for name, value in config["experiments"][experiment].items() if name != "methods"}
    if experiment == fights.ID:
        section |= fights.settings_of(section, fields_of_duels(config, device), method, device)
        section.pop("fights")
    return {name: _of_device(value, device) for name, value in section.items()} | {"seed": config["seed"]}


def _of_device(value: Any, device: str) -> Any:
    """A value that is given per kind of device, for one of them; any other value as it is."""
    return value[device] if isinstance(value, Mapping) and {"cpu", "cuda"} == set(value) else value


def shared_experiment(config: Mapping[str, Any], experiment: str, method: str, device: str) -> str:
    """The experiment whose run of ``method`` this one can share, as all settings but the lists are equal; empty if none."""
    other = known_experiments.get(experiment).shares
    if not other or method not in {spec.id for spec in selected_methods(config, other)}:
        return ""
    own, theirs = (job_settings(config, name, device) for name in (experiment, other))
    same = all(own[name] == theirs[name] for name in own if name not in LISTS)
    return other if same else ""
