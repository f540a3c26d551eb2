"""FusionPlan: what a search decided, as plain data that can be printed and cached."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .scheme import FusionScheme
from .templates import TEMPLATES, Setting

OVERHEADS = ("planning", "encoding", "decoding", "reward")
"""The tuner's own work, in the words of STOF's Figure 13; building and measuring candidates is the rest."""


@dataclass(frozen=True)
class Choice:
    """How one segment runs, and what it cost in microseconds when it was measured."""

    template: str = "eager"
    setting: Setting = ()
    cost_us: float = 0.0

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v}" for k, v in self.setting)
        return f"{self.template}({inside})" if inside else self.template


@dataclass(frozen=True)
class BlockPlan:
    """Scheme and choices of a block: ``count`` layers of ``period`` operators from operator ``start`` on."""

    start: int
    period: int
    count: int
    word: int
    choices: tuple[Choice, ...]

    @property
    def scheme(self) -> FusionScheme:
        """The word decoded."""
        return FusionScheme.decode(self.word, self.period)

    @property
    def cost_us(self) -> float:
        """Measured cost of all its layers."""
        return self.count * sum(choice.cost_us for choice in self.choices)


@dataclass
class FusionPlan:
    """The plan of a whole graph and the search that found it.

    ``seconds`` are wall times: ``total``, ``building`` (``waiting`` for compilers and ``inductor`` are parts of it),
    ``measuring`` and the four of `OVERHEADS`. ``counts`` are numbers of
    schemes tried, candidates measured and refused. ``use`` is ``plan``, or ``model`` to run the model itself (``why``).
    """

    blocks: list[BlockPlan]
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    use: str = "plan"
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FusionPlan:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        blocks = []
        for block in data["blocks"]:
            choices = tuple(
                Choice(c["template"], tuple((str(k), int(v)) for k, v in c["setting"]), float(c["cost_us"]))
                for c in block["choices"]
            )
            found = BlockPlan(*(int(block[k]) for k in ("start", "period", "count", "word")), choices)
            if len(found.scheme.segments) != len(choices) or any(c.template not in TEMPLATES for c in choices):
                raise ValueError("a block's choices do not fit its scheme")
            blocks.append(found)
        seconds = {str(k): float(v) for k, v in data["seconds"].items()}
        counts = {str(k): int(v) for k, v in data["counts"].items()}
        if data["use"] not in ("plan", "model"):
            raise ValueError(f"use is {data['use']!r}")
        return cls(blocks, seconds, counts, data["use"], str(data["why"]))
