"""This project's attention and fusion engine on whole models: both, and each alone."""

from __future__ import annotations

from dataclasses import replace

from .. import registry
from .registry import ModelReady, Subject, model_method, run_variant

registry.discover(kinds=False)
_ATTENTION = registry.find("stof")
_ATTENTION_CODE = {"depends": _ATTENTION.depends, "on_device": _ATTENTION.on_device}
_FUSION_CODE = {"depends": ("fusion",), "tuned": True}
_ALL_CODE = {**_ATTENTION_CODE, "depends": (*_ATTENTION.depends, "fusion"), "tuned": True}


@model_method("stof", experiments=("end_to_end", "ablation", "overhead", "tuning_cost"), **_ALL_CODE)
def stof(subject: Subject) -> ModelReady:
    """``stof.optimize`` of the model with our attention, by a search without the disk cache of plans."""
    return _replayed(run_variant(subject, "stof"), subject)


@model_method("stof_mha_only", experiments=("ablation",), label="STOF, attention only", rank=1, **_ATTENTION_CODE)
def stof_mha_only(subject: Subject) -> ModelReady:
    """Our attention, every other operator eager."""
    return run_variant(subject, "stof_mha_only")


@model_method("stof_fusion_only", experiments=("ablation",), label="STOF, fusion only", rank=2, **_FUSION_CODE)
def stof_fusion_only(subject: Subject) -> ModelReady:
    """``stof.optimize`` of the model with unfused attention."""
    return _replayed(run_variant(subject, "stof_fusion_only"), subject)


def _replayed(ready: ModelReady, subject: Subject) -> ModelReady:
    """A tuned model on CUDA replays a graph; where the model runs as it is (the note says so), nothing does."""
    return replace(ready, own_graphs=subject.problem.device == "cuda" and not ready.note)
