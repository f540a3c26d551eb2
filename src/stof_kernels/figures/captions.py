"""Sentences under the figures: where the numbers come from and how they were taken."""

from __future__ import annotations

from collections.abc import Iterable

from stof_kernels.benchmarking.measurement import Measurement

from . import GpuPage
from .style import look

PAPER = "Accelerating Sparse Transformer Inference on GPU (PPoPP '26), doi:10.1145/3774934.3786434"
ARTIFACT = "artifact doi:10.5281/zenodo.17705801, MIT licence"

METRICS = {
    "device_time": "Metric: device time of one call, median, warm caches (CUDA-graph replay; on the CPU wall time).",
    "host_time": "Metric: host time of one call.",
    "latency": "Metric: latency of one forward pass.",
    "tuning_time": "Metric: wall time of tuning.",
}
PUBLISHED_METRICS = {
    "host_time": "Metric: host wall clock around a loop of eager calls divided by their number (a mean; launch time counts).",
    "latency": "Metric: host wall clock per forward pass (a mean).",
}
LABEL_EXCHANGE = (
    "PyTorch Native and PyTorch Compile are the labels that the logs print; the shipped script prints each in the branch that "
    "runs the other."
)
VIT = "ViT: the second number is the image side; tokens = (side/16)² + 1, and side 2048 is run as 512."

NOT_IN_THE_PAPER = "The paper has no such figure, so there are no published numbers to draw."


def is_published(rows: Iterable[Measurement]) -> bool:
    """Whether the rows are the authors' numbers."""
    return any(row.source == "published" for row in rows)


def source(page: GpuPage, rows: Iterable[Measurement]) -> str:
    """Whose numbers these are and from when. Of the published logs only those of attention carry a date."""
    rows = list(rows)
    when = f" of {page.date}" if page.date else ""
    if is_published(rows):
        dated = f", log{when}" if when and rows[0].experiment == "mha" else ""
        return f"Source: numbers published by the paper's authors{dated} ({PAPER}; {ARTIFACT}), drawn as printed."
    if page.source == "measured":
        return f"Source: measured here{f', {page.date}' if page.date else ''}."
    return f"Source: recorded measurement{when} (results/recorded/{page.name})."


def metric(name: str, published: bool) -> str:
    """What was timed and how."""
    return (PUBLISHED_METRICS if published else {}).get(name, METRICS.get(name, f"Metric: {name}."))


def shape(rows: Iterable[Measurement]) -> str:
    """Heads, head size and dtype, where all rows agree."""
    known = {(row.heads, row.head_dim, row.dtype) for row in rows if row.heads and row.head_dim and row.dtype}
    return "{} heads of size {}, {}. ".format(*known.pop()) if len(known) == 1 else ""


def subtitle(page: GpuPage, rows: Iterable[Measurement]) -> str:
    """GPU, source and date in a few words."""
    rows = list(rows)
    if not rows:
        return page.label
    kind = "published by the paper's authors" if is_published(rows) else f"{page.source} {page.date}".strip()
    name = f"{page.label} ({page.hardware})" if page.hardware else page.label
    return f"{name}  ·  {kind}"


def no_rows(page: GpuPage, experiment: str, hint: str = "") -> str:
    """Why a page is empty."""
    default = (
        f"Experiment {experiment} has neither been measured on {page.label} nor recorded under "
        f"results/recorded/{page.name}/{experiment}."
    )
    reason = (page.missing_reason or default).rstrip(".")
    return f"{reason[0].upper()}{reason[1:]}. {hint}".strip()


def reimplemented(rows: Iterable[Measurement], methods: Iterable[str]) -> list[str]:
    """Which of the methods are someone's own version of a published system: ours, or in published rows the authors'."""
    if is_published(rows):
        return [method for method in methods if method == "splat"]
    from stof_kernels.baselines import registry

    ours = {spec.id for spec in registry.all_methods("") if spec.reimplemented}
    return [method for method in methods if method in ours]


def rewritten_note(rows: Iterable[Measurement], methods: Iterable[str]) -> str:
    """Explains the mark of `reimplemented` methods."""
    rows = list(rows)
    found = [look(method).label for method in reimplemented(rows, methods)]
    who = "by the paper's authors" if is_published(rows) else "here"
    return f"§ re-implemented {who}: {', '.join(found)}." if found else ""


def stale(page: GpuPage, methods: Iterable[str]) -> str:
    """Which of the methods older code measured."""
    old = [look(method).label for method in methods if method in page.stale]
    return f"‡ measured with an older version of the code: {', '.join(old)}." if old else ""
