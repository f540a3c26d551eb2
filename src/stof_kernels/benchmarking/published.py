"""Turns the paper's published numbers into measurement rows: ``python -m stof_kernels.benchmarking.published SOURCE OUT``.

SOURCE holds the authors' artifact numbers in tidy form (``fig3.csv`` .. ``table4.csv``, one line per value); OUT receives
``{gpu}/{experiment}/{method}.csv`` with its ``.provenance.json``. The result is committed under ``results/recorded``; nothing
runs this again unless the mapping changes, and a re-run writes identical files. Standard library only.

Only the numbers behind the published plots are taken (run = paper), as printed: no series is replaced, clipped or shared out.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

from .measurement import Measurement, MeasurementError, write_rows
from .published_notes import GPU_NAMES, METHOD_NOTES, provenance

EXPERIMENTS = {
    "fig3": "motivation",
    "fig4": "motivation",
    "fig9_10": "mha",
    "fig11": "end_to_end",
    "fig12": "ablation",
    "fig13": "overhead",
    "table4": "tuning_cost",
}
"""Figure or table of the paper -> experiment whose rows hold its numbers."""

METHODS = {
    "flash_attention2": "fa2",
    "byte_transformer": "bytetransformer",
    "config_tuned_individually": "tuned_individually",
    "config_tuned_after_fusion": "tuned_after_fusion",
}
"""Source name -> our method id, where they differ."""

OVERHEAD_PARTS = ("analytical_model", "hash_encoding", "numerical_decoding", "reward_algorithm")

# Figure 13 and Table 4 print no card; the paper's text places them on the A100.
_GPUS = {"RTX4090": "4090", "A100": "a100", "not_recorded": "a100"}

_HEADS = {"bert_base": 12, "bert_large": 16, "gpt2": 12, "llama": 16, "t5": 12, "vit": 12}
_HEAD_DIM = 64

# Parameters of the artifact's masks; they do not follow the sequence length.
_MASK_PARAMS = {
    "causal": "",
    "longformer": "w=32, g=32, second strip at S/2",
    "bigbird": "w=32, g=32, fill=0.1, seed=0",
    "not_recorded": "",
}

_TO_METRIC = {
    "host_time": Decimal(1000),
    "latency": Decimal(1),
    "overhead_time": Decimal(1),
    "tuning_time": Decimal("0.001"),
}
"""Metric -> factor from the logs' milliseconds to its unit."""


def convert(source: Path) -> dict[tuple[str, str, str], list[tuple[Measurement, str]]]:
    """(gpu, experiment, method) -> [(row, artifact file that it comes from)], in the order of the source."""
    files: dict[tuple[str, str, str], list[tuple[Measurement, str]]] = defaultdict(list)
    for figure in EXPERIMENTS:
        path = source / f"{figure}.csv"
        with open(path, encoding="utf-8", newline="") as file:
            for number, record in enumerate(csv.DictReader(file), start=2):
                if record["run"] != "paper" or "not plotted" in record["note"]:
                    continue
                try:
                    row = _row(record)
                except (KeyError, ArithmeticError, MeasurementError) as error:
                    raise MeasurementError(f"{path}: line {number}: {error}") from None
                files[row.gpu, row.experiment, row.method].append((row, record["source_file"]))
    return dict(files)


def _row(record: dict[str, str]) -> Measurement:
    """One source line as a row."""
    experiment, gpu = EXPERIMENTS[record["figure"]], _GPUS[record["gpu"]]
    method, operator, metric = _what(record, experiment)
    mask = "not_recorded" if record["mask"] == "mask_not_recorded" else record["mask"]
    batch, seq_len = int(record["batch"]), int(record["seq_len"])
    heads, hidden = _shape(record, experiment)
    status, reason = _status(record, method)
    return Measurement(
        experiment=experiment,
        gpu=gpu,
        method=method,
        mask=mask,
        mask_params=_mask_params(mask, batch) if mask else "",
        model=record["model"],
        operator=operator,
        batch=batch,
        seq_len=seq_len,
        kv_len=seq_len if experiment == "mha" else None,
        heads=heads,
        kv_heads=heads,
        head_dim=_HEAD_DIM if heads else None,
        hidden=hidden,
        dtype="float16",
        metric=metric,
        median=_value(record, metric),
        status=status,
        source="published",
        note="; ".join(part for part in (reason, *_remarks(record, experiment, gpu, method)) if part),
    )


def _what(record: dict[str, str], experiment: str) -> tuple[str, str, str]:
    """(method, operator, metric) of a source line."""
    name = METHODS.get(record["method"], record["method"])
    if experiment == "overhead":  # four parts of one method's tuning, and their sum's denominator
        return ("stof", name, "overhead_time") if name in OVERHEAD_PARTS else ("stof", "", "tuning_time")
    metric = {"mha": "host_time", "motivation": "host_time", "tuning_cost": "tuning_time"}.get(experiment, "latency")
    return name, record["operator"], metric


def _value(record: dict[str, str], metric: str) -> float | None:
    if not record["value"]:
        return None
    factor = Decimal(1) if record["unit"] == "s" else _TO_METRIC[metric]
    return float(Decimal(record["value"]) * factor)


def _shape(record: dict[str, str], experiment: str) -> tuple[int | None, int | None]:
    """(heads, hidden)."""
    if experiment == "motivation":
        return None, int(record["hidden"])
    heads = _HEADS[record["model"]] if record["model"] else 12
    return heads, heads * _HEAD_DIM


def _mask_params(mask: str, batch: int) -> str:
    if (
        mask == "sliding_window"
    ):  # the generator makes only the last batch element causal, and element 0 is the one used
        return "w=64, one-sided" if batch == 1 else "w=64, two-sided"
    return _MASK_PARAMS[mask]


def _status(record: dict[str, str], method: str) -> tuple[str, str]:
    """(status, reason) of a source line; the reason is empty for a number."""
    if record["value"]:
        return "ok", ""
    if record["note"].startswith("unsupported"):
        reason = "the script does not run ViT" if "ViT" in record["note"] else "sequences of at most 1024 tokens"
        return "unsupported", reason
    if method == "mcfuser":
        return "oom", "no value in the log; the paper names out of memory for MCFuser's missing bars"
    return "error", "no value in the log, no reason given"


def _remarks(record: dict[str, str], experiment: str, gpu: str, method: str) -> Iterable[str]:
    """What a reader of the single row should know."""
    if record["method_label"]:
        yield f"printed label: {record['method_label']}"
    if record["mask"] == "mask_not_recorded":
        yield "one log, mask not recorded; the authors' plot repeats it for all four masks"
    elif "single log" in record["note"]:
        yield f"one log, mask {record['mask']}; the authors' plot repeats it for all four masks"
    yield METHOD_NOTES.get((experiment, method, record["mask"]), METHOD_NOTES.get((experiment, method, ""), ""))
    if record["model"] == "vit":
        yield "seq_len is the image side; tokens = (side/16)^2 + 1, and side 2048 is run as 512"
    if "log says" in record["note"]:
        yield f"the {record['note']}"
    if "factor-10" in record["note"]:
        yield "printed as 0.01284 ms; the other values suggest 0.1284"
    if "other GPU file" in record["note"]:
        yield "the same number is printed for the other GPU"
    if experiment == "motivation":
        yield f"figure {record['figure'].removeprefix('fig')} of the paper"
    if record["figure"] in ("fig13", "table4"):
        yield "the log names no GPU; the paper says A100"
    if record["figure"] == "table4" and (record["model"], record["batch"], method) == ("llama", "16", "stof"):
        yield "the paper's table prints 264.6 s"


def write(source: Path, out: Path) -> int:
    """Convert SOURCE and write all files under OUT; the number of rows. MeasurementError for a foreign source."""
    count = 0
    for (gpu, experiment, method), found in sorted(convert(source).items()):
        rows = [row for row, _ in found]
        csv_path = out / gpu / experiment / f"{method}.csv"
        write_rows(csv_path, rows)
        facts = provenance(gpu, experiment, method, len(rows), sorted({file for _, file in found}))
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        csv_path.with_suffix(".provenance.json").write_text(text, encoding="utf-8")
        count += len(rows)
    return count


def main(arguments: list[str]) -> int:
    """Command line: SOURCE_DIR OUT_DIR."""
    if len(arguments) != 2 or not (Path(arguments[0]) / "fig9_10.csv").is_file():
        print(
            "usage: python -m stof_kernels.benchmarking.published SOURCE_DIR OUT_DIR  (SOURCE_DIR holds fig3.csv .. table4.csv)"
        )
        return 2
    try:
        count = write(Path(arguments[0]), Path(arguments[1]))
    except (MeasurementError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} rows for {', '.join(sorted(GPU_NAMES))} written under {arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
