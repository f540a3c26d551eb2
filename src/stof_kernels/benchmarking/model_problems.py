"""Problems of the experiments on whole models and on pairs of operators, from their sections of the config. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stof_kernels import masks
from stof_kernels.baselines.models import MODELS, ModelProblem
from stof_kernels.baselines.pairs import OPERATORS, PairProblem

SIZES = ("paper", "tiny")
METRICS: dict[str, tuple[str, ...]] = {
    "end_to_end": ("latency", "throughput", "peak_memory", "host_time", "control_time", "tuning_time", "overhead_time"),
    "ablation": ("latency", "throughput", "peak_memory", "host_time", "control_time"),
    "overhead": ("tuning_time", "overhead_time"),
    "tuning_cost": ("tuning_time",),
}
"""What each experiment keeps of what one run of a model yields."""
DTYPES = ("float32", "float16", "bfloat16")


class ProblemError(ValueError):
    """A section that cannot be read. The message is one line: which key, what it holds, what is allowed."""


def model_problems(settings: dict[str, Any], device: str) -> list[tuple[str, ModelProblem]]:
    """(key, problem) of each model at each size. Sizes vary fastest, so that a job builds each model once."""
    _known("mask", [settings.get("mask")], masks.FAMILIES)
    _known("models", settings.get("models"), MODELS)
    _known("model_size", [settings.get("model_size", "paper")], SIZES)
    shared = {
        "family": settings["mask"],
        "dtype": _dtype(settings),
        "device": device,
        "seed": settings.get("seed", 0),
        "size": settings.get("model_size", "paper"),
        "tuning_s": settings.get("tuning_s", 30.0),
    }
    places = [(size["batch"], n) for size in _list(settings, "sizes") for n in size["seq_len"]]
    return [
        (model_key(model, batch, seq_len), ModelProblem(model, batch, seq_len, **shared))
        for model in settings["models"]
        for batch, seq_len in places
    ]


def model_key(model: str, batch: int | None, seq_len: int | None) -> str:
    """``bert_base:8x512``: model, batch and nominal length."""
    return f"{model}:{batch}x{seq_len}"


def pair_problems(settings: dict[str, Any], device: str) -> list[tuple[str, PairProblem]]:
    """(key, problem) of each pair of operators at each size, in the paper's order of sizes."""
    _known("operators", settings.get("operators"), OPERATORS)
    shared = {
        "dtype": _dtype(settings),
        "device": device,
        "seed": settings.get("seed", 0),
        "search_s": settings.get("search_s", 10.0),
        "candidates": settings.get("candidates", 24),
    }
    places = [
        (size["batch"], n, hidden)
        for size in _list(settings, "sizes")
        for n in size["seq_len"]
        for hidden in size["hidden"]
    ]
    return [
        (f"{operator}:{batch}x{n}x{hidden}", PairProblem(operator, batch, n, hidden, **shared))
        for operator in settings["operators"]
        for batch, n, hidden in places
    ]


def _known(key: str, found: Any, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if not isinstance(found, (list, tuple)) or not found:
        raise ProblemError(f"{key} is {found!r}, allowed: a list of {', '.join(allowed)}")
    for name in found:
        if name not in allowed:
            raise ProblemError(f"{key}: {name!r} is unknown, allowed: {', '.join(allowed)}")


def _dtype(settings: dict[str, Any]) -> str:
    _known("dtype", [settings.get("dtype")], DTYPES)
    return settings["dtype"]


def _list(settings: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = settings.get(key)
    if not isinstance(found, (list, tuple)) or not found:
        raise ProblemError(f"{key} is {found!r}, allowed: a list of sizes")
    return list(found)
