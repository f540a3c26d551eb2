"""Command line: ``python -m stof_kernels.benchmarking record | stale | measure | merge | duel``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from stof_kernels.kernels import BuildError

from . import config, records
from .fights import parse_cells
from .timing import Budget


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. An error is one line on standard error and status 2."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, BuildError) as error:  # every error of ours that a user can cause is one of these
        print(f"{options.name}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stof_kernels.benchmarking", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)

    record = commands.add_parser("record", help="promote measured rows to recorded ones")
    record.add_argument("--gpu", required=True, help="the gpu as rows name it: cpu, h200, ...")
    record.add_argument("--experiment", action="append", default=[], help="only this one (may be repeated)")
    record.add_argument("--method", action="append", default=[], help="only this one (may be repeated)")
    record.add_argument("--replace", action="store_true", help="put measured rows in the place of published ones")
    record.set_defaults(command=_record)

    stale = commands.add_parser("stale", help="list recorded tables measured with older code")
    stale.add_argument("--strict", action="store_true", help="exit with status 1 if there are any")
    stale.set_defaults(command=_stale)
    for command in (record, stale):
        command.add_argument("--results", type=Path, default=Path("results"), help="the results folder")

    measure = commands.add_parser("measure", help="measure cells one by one, each into a part of its own")
    for name in ("gpu", "experiment", "method"):
        measure.add_argument(f"--{name}", required=True)
    measure.add_argument("--parts", type=Path, required=True, help="the folder of the parts; those there are kept")
    measure.add_argument("cells", nargs="*", help="keys such as causal:1x2048 or bert_base:8x512 (default: all)")
    measure.set_defaults(command=_measure)

    merge = commands.add_parser("merge", help="put measured parts together as measured tables")
    merge.add_argument("parts", type=Path, help="the folder of the parts")
    merge.add_argument(
        "--keep", action="store_true", help="cells without a part keep their recorded rows, of today's code"
    )
    merge.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    merge.set_defaults(command=_merge)
    for command in (measure, merge):
        command.add_argument("--config", type=Path, default=Path("config.yaml"), help="where experiments are described")

    fight = commands.add_parser("duel", help="time two methods in turn in one process")
    fight.add_argument("cells", help="comma list such as causal:1x2048,mha_long:causal:1x8192:32/8x128")
    fight.add_argument("methods", nargs="*", default=["stof", "sdpa"], help="two method ids (default: stof sdpa)")
    fight.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    own = "of the cell's experiment, if one is named; else"
    fight.add_argument("--heads", type=int, help=f"default: those {own} 12")
    fight.add_argument("--head-dim", type=int, help=f"default: that {own} 64")
    fight.add_argument("--dtype", default="", help=f"default: that {own} float32 on the CPU, float16 on CUDA")
    fight.add_argument("--seed", type=int, default=0)
    fight.add_argument("--config", type=Path, default=Path("config.yaml"), help="where experiments are described")
    fight.add_argument("--seconds", type=float, default=2.0, help="time to sample each cell")
    fight.set_defaults(command=_duel)
    return parser


def _record(options: argparse.Namespace) -> int:
    experiments, methods = tuple(options.experiment), tuple(options.method)
    written = records.record(options.results, options.gpu, experiments, methods, options.replace)
    for path in written:
        print(f"recorded {path}")
    for line in records.busy_cells(written):
        print(f"warning: {line}; was the machine busy?", file=sys.stderr)
    return 0


def _stale(options: argparse.Namespace) -> int:
    found = records.stale(options.results)
    for entry in found:
        print(entry)
    return 1 if found and options.strict else 0


def _measure(options: argparse.Namespace) -> int:
    from . import parts
    from .targets import require_present

    described = _config(options.config)
    if options.experiment not in described["experiments"]:
        allowed = ", ".join(described["experiments"])
        raise ValueError(f"experiment {options.experiment!r} has no section in {options.config}, allowed: {allowed}")
    require_present(options.gpu, described["gpus"])
    device = described["gpus"].get(options.gpu, {"device": "cuda"})["device"]
    settings = config.job_settings(described, options.experiment, device, options.method)
    parts.measure(options.gpu, options.experiment, options.method, settings, device, options.parts, options.cells)
    return 0


def _merge(options: argparse.Namespace) -> int:
    from . import parts

    for path in parts.merge(options.parts, _config(options.config), options.results, options.keep):
        print(f"merged {path}")
    return 0


def _duel(options: argparse.Namespace) -> int:
    import torch

    from .duel import duel
    from .environment import one_assembler

    if len(options.methods) != 2:
        raise ValueError(f"got {len(options.methods)} methods, allowed: two ids such as stof sdpa")
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise ValueError("--device cuda: torch sees no CUDA device here, allowed: auto, cpu")
    device = "cuda" if available and options.device != "cpu" else "cpu"
    given = {"heads": options.heads, "head_dim": options.head_dim, "dtype": options.dtype or None}
    given = {name: value for name, value in given.items() if value is not None} | {"seed": options.seed}
    budget = Budget(min_samples=20, max_samples=10_000, budget_s=options.seconds)
    first, second = options.methods
    one_assembler()
    for cell in parse_cells(options.cells, given, _fields(options.config, device), device):
        outcome = duel(cell.problem, first, second, budget)
        print(f"{cell.key} {device} {cell.problem.dtype}: {first} against {second}: {outcome}", flush=True)
    return 0


def _config(path: Path) -> dict[str, Any]:
    """The config as the workflow takes it, without sections where it has none; ValueError if there is no such file."""
    import yaml

    if not path.is_file():
        raise ValueError(f"{path}: there is no such file, allowed: the config that describes the experiments")
    found = {"seed": 0, "gpus": {}, "experiments": {}} | (yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    config.normalize(found)
    return found


def _fields(path: Path, device: str) -> dict[str, dict[str, Any]]:
    """Experiment -> what the config says of its heads and dtype; nothing where there is no such file."""
    return config.fields_of_duels(_config(path), device) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
