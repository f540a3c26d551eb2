"""How a way to run whole models is registered: a file of this folder with a function under ``@model_method``.

    @model_method("abacus", label="Abacus", experiments=("end_to_end", "tuning_cost"), rank=70)
    def abacus(subject: Subject) -> ModelReady:
        model = subject.model("stof_unfused")          # the experiment's model with one of the attentions
        given = subject.inputs("stof_unfused")         # its keyword arguments, the mask in the form that this attention takes
        ...
        return ModelReady(run, tuning_s=seconds)

An id that is registered for attention too is the same system: it keeps that label and rank. No torch is imported here:
Snakemake reads ids, labels and dependencies while it parses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from stof_kernels.baselines import registry
from stof_kernels.baselines.registry import DEVICES, MethodSpec, Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stof_kernels.integrations.variants import Case
    from stof_kernels.masks import Pattern

KIND = "model"
MODELS = ("bert_base", "bert_large", "gpt2", "llama", "t5", "vit")
"""Ids of the experiment's models, those of ``integrations.models`` (a test holds them equal)."""

# What every number of a whole model depends on besides its method's own module.
_COMMON = (
    "benchmarking/timing.py",
    "masks",
    *(f"integrations/{name}.py" for name in ("models", "variants", "transformers")),
)


@dataclass(frozen=True)
class ModelProblem:
    """One forward pass of a model: ``batch`` sequences of nominally ``seq_len`` tokens under a mask family.

    ``dtype`` is a torch dtype's name, ``device`` cpu or cuda; ``seed`` draws weights and inputs. ``size`` is ``paper`` or
    ``tiny`` (two layers of width 128). ``tuning_s`` bounds a search, in seconds.
    """

    model: str
    batch: int
    seq_len: int
    family: str
    dtype: str
    device: str
    seed: int = 0
    size: str = "paper"
    tuning_s: float = 30.0

    @property
    def case(self) -> Case:
        """The same as ``integrations.variants`` names it."""
        import torch

        from stof_kernels.integrations.variants import Case

        dtype = getattr(torch, self.dtype)
        return Case(self.model, self.batch, self.seq_len, dtype, self.device, self.seed, self.family, self.size)

    @property
    def tokens(self) -> int:
        """Tokens that the model really sees: patches of the largest image that fits, for ViT."""
        return self.case.tokens

    q_len = kv_len = tokens

    @property
    def pattern(self) -> Pattern:
        """The mask of the model's first stack of self-attention."""
        from stof_kernels.integrations import models

        return next(iter(models.patterns(self.model, self.seq_len, self.family).values()))

    def columns(self) -> dict[str, object]:
        """What a row of measurement says about this problem; ``kv_len`` are the tokens that the model really sees."""
        from stof_kernels.integrations import models
        from stof_kernels.masks import get

        shape = models.spec(self.model).shape(self.size)
        return {
            "mask": self.family,
            "mask_params": registry.mask_params(get(self.family, self.tokens)),
            "model": self.model,
            "batch": self.batch,
            "seq_len": self.seq_len,
            "kv_len": self.tokens,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": 64,
            "hidden": shape.hidden,
            "dtype": self.dtype,
        }


@dataclass
class ModelReady:
    """A model ready to be timed. ``run()`` is one forward pass and returns the last hidden state (B, L, hidden).

    ``tuning_s``: wall seconds from the model on its device to the first tuned call, None where nothing is tuned.
    ``overheads``: seconds of the tuner's own work by the names of Figure 13. ``own_graphs``: ``run`` replays CUDA graphs
    itself, so that it cannot be captured into another one.
    """

    run: Callable[[], Tensor]
    tuning_s: float | None = None
    overheads: dict[str, float] = field(default_factory=dict)
    note: str = ""
    own_graphs: bool = False


class Subject(Protocol):
    """What a method gets: the model of one problem, which all methods of a job share, and its inputs."""

    problem: ModelProblem

    def model(self, attention: str) -> nn.Module:
        """The model with an attention that transformers knows; the same object each time, its weights are not to be changed."""

    def inputs(self, attention: str) -> dict[str, Any]:
        """Keyword arguments of a forward pass."""


# Names of Figure 13 for what a fusion plan calls the parts of the search.
OVERHEADS = {
    "planning": "analytical_model",
    "encoding": "hash_encoding",
    "decoding": "numerical_decoding",
    "reward": "reward_algorithm",
}

PrepareModel = Callable[[Subject], ModelReady]


def model_method(
    id: str,
    *,
    experiments: Iterable[str],
    label: str = "",
    rank: int | None = None,
    depends: Iterable[str] = (),
    devices: Iterable[str] = DEVICES,
    tuned: bool = False,
    reimplemented: bool = False,
    not_in: dict[str, str] | None = None,
    on_device: dict[str, tuple[str, ...]] | None = None,
) -> Callable[[PrepareModel], PrepareModel]:
    """Register ``prepare(subject) -> ModelReady`` as the way ``id`` to run whole models.

    ``label`` and ``rank`` are those of the attention method of that id, where there is one. ``tuned``: it compiles or
    searches, so it is prepared in a warm process with empty compile caches. The rest: as in ``baselines.registry.method``.
    """
    name, place = _known(id, label, rank)
    on_device = on_device or {}

    def register(prepare: PrepareModel) -> PrepareModel:
        folder, _, module = prepare.__module__.rpartition(".")
        own = (f"baselines/models/{module}.py",) if folder == __package__ else ()
        others = (n for names in on_device.values() for n in names)
        registry.add(
            MethodSpec(
                id=id,
                label=name,
                experiments=tuple(experiments),
                prepare=prepare,
                depends=tuple(dict.fromkeys((*own, *_COMMON, *depends, *others))),
                devices=tuple(devices),
                kind=KIND,
                tuned=tuned,
                reimplemented=reimplemented,
                rank=place,
                not_in=dict(not_in or {}),
                on_device=dict(on_device),
            )
        )
        return prepare

    return register


def _known(id: str, label: str, rank: int | None) -> tuple[str, int]:
    """Label and rank of the attention method of that id, or those given. ValueError for a label that contradicts it."""
    registry.discover(kinds=False)
    attention = registry.find(id)
    if attention is None:
        if not label:
            raise ValueError(f"model method {id!r}: no label, allowed: one, as attention has no method {id!r}")
        return label, 100 if rank is None else rank
    if label and label != attention.label:
        raise ValueError(f"model method {id!r}: label {label!r}, allowed: {attention.label!r}, as for attention")
    return attention.label, attention.rank if rank is None else rank


def run_variant(subject: Subject, id: str, own_graphs: bool = False) -> ModelReady:
    """A way of ``integrations.variants`` on the subject's model; Unsupported with its reason where it cannot run."""
    from stof_kernels.integrations import variants

    case, chosen = subject.problem.case, variants.VARIANTS[id]
    try:
        if chosen.needs_cuda and case.device == "cpu":
            raise variants.Unavailable(chosen.needs_cuda)
        model, given = subject.model(chosen.attention), subject.inputs(chosen.attention)
        ready = chosen.tune(case, model, given, subject.problem.tuning_s)
    except variants.Unavailable as reason:
        raise Unsupported(str(reason)) from None
    parts = ready.plan.seconds if ready.plan is not None else {}
    overheads = {ours: parts[theirs] for theirs, ours in OVERHEADS.items() if theirs in parts}
    return ModelReady(ready.run, ready.tuning_s, overheads, ready.note, own_graphs)
