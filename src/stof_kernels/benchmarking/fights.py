"""Who fights whom where: the list of duels in the config, and cells named on the command line. No torch.

An entry of ``fights`` names an experiment on attention alone (``of``), cells of it by their keys, and the rivals that STOF
meets there. A key with ``*`` or ``?`` stands for all of that experiment's cells whose keys match it.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from stof_kernels.baselines.registry import ATTENTION

from .experiments import EXPERIMENTS, Cell, SettingsError, attention_cell, attention_cells

ID = "duel"
FIELDS = tuple(e.id for e in EXPERIMENTS.values() if e.kind == ATTENTION and e.cells is attention_cells)
"""Experiments whose cells can be fought for."""

_SHAPE = ("heads", "kv_heads", "head_dim", "dtype")
_DEFAULT = {
    "cpu": {"heads": 12, "head_dim": 64, "dtype": "float32"},
    "cuda": {"heads": 12, "head_dim": 64, "dtype": "float16"},
}
_PLAIN = ("mha", "mha_artifact")  # their cells are the default's where no section says more
_WILD = frozenset("*?")


class FightError(ValueError):
    """An entry that names no duel. The message is one line: which entry, what it holds, what is allowed."""


def rivals(section: Mapping[str, Any], device: str = "") -> set[str]:
    """Methods that the section lets fight on that kind of device, or on any."""
    fights = section["fights"]
    return {rival for own in ([device] if device else fights) for entry in fights[own] for rival in entry["rivals"]}


def settings_of(
    section: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]], rival: str, device: str
) -> dict[str, Any]:
    """``cells`` and ``shapes`` of a rival's job; all rivals' where ``rival`` is empty.

    ``fields``: experiment -> its settings for that device. FightError for an entry that names no experiment, key or cell.
    """
    cells: dict[str, None] = {}
    shapes: dict[str, Any] = {}
    for number, entry in enumerate(section["fights"][device]):
        if rival and rival not in entry["rivals"]:
            continue
        of, where = entry["of"], f"fights.{device}.{number}"
        if of not in FIELDS or of not in fields:
            raise FightError(f"{where}.of: {of!r}, allowed: {', '.join(name for name in FIELDS if name in fields)}")
        shapes[of] = {name: fields[of][name] for name in _SHAPE if name in fields[of]}
        for key in entry["cells"]:
            cells |= dict.fromkeys(f"{of}:{found}" for found in _keys(where, of, key, fields[of], device))
    return {"cells": list(cells), "shapes": shapes}


def _keys(where: str, of: str, key: str, settings: Mapping[str, Any], device: str) -> list[str]:
    try:
        if not _WILD.intersection(key):
            return [attention_cell(key, dict(settings), device).key]
        known = [cell.key for cell in attention_cells(dict(settings), device)]
    except SettingsError as error:
        raise FightError(f"{where}.cells: {error}") from None
    found = [name for name in known if fnmatchcase(name, key)]
    if not found:
        raise FightError(
            f"{where}.cells: {key!r} matches no cell of {of}, allowed: keys such as {known[0]}, or causal:*"
        )
    return found


def parse_cells(
    text: str, given: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]], device: str
) -> list[Cell]:
    """Cells of ``causal:1x2048,mha_long:causal:1x8192:32/8x128``.

    Heads, head_dim and dtype are what is ``given``, else what ``fields`` has for the experiment that is named before the key.
    """
    names = [name.strip() for name in _split(text) if name.strip()]
    if not names:
        raise FightError(f"cells {text!r}: allowed: a comma list of MASK:BATCHxLENGTH such as mha:causal:1x2048")
    found = []
    for name in names:
        of, _, key = name.partition(":")
        if of in EXPERIMENTS and of not in FIELDS:
            raise FightError(f"cell {name!r}: experiment {of!r} cannot duel, allowed: {', '.join(FIELDS)}")
        if of in FIELDS and of not in fields and of not in _PLAIN:
            raise FightError(f"cell {name!r}: the config has no section {of}, allowed: a key alone, or --config FILE")
        shape = {n: v for n, v in fields.get(of, {}).items() if n in _SHAPE} or _DEFAULT[device]
        found.append(Cell(name, attention_cell(key if of in FIELDS else name, {**shape, **given}, device).problem))
    return found


def _split(text: str) -> list[str]:
    """At the commas that are not inside parentheses."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
