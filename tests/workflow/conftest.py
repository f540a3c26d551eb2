"""A copy of the repository for each test, and Snakemake run in it with the copy's own package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("Snakefile", "Makefile", "config.yaml", "pyproject.toml", "rules", "workflow", "profiles", "envs", "src")
NOISE = ("Using workflow specific profile", "Config file config.yaml is extended")

TINY = """
gpu: cpu
experiments:
  mha:
    heads: 2
    head_dim: 16
    masks: [causal, longformer]
    methods: [stof, torch_native, fa4]
    sizes:
      cpu: [{batch: 1, seq_len: [32, 48]}]
    timing:
      cpu: {min_samples: 2, max_samples: 3, budget_s: 0.01, warmup: 1}
  planner:
    heads: 2
    head_dim: 16
    masks: [causal]
    methods: [stof]
    sizes:
      cpu: [{batch: 1, seq_len: [32]}]
    scatter: [{block: 1, fill: [0.1]}]
    timing:
      cpu: {min_samples: 2, max_samples: 3, budget_s: 0.01, warmup: 1}
  scaling:
    heads: 2
    head_dim: 16
    methods: [stof]
    sizes:
      cpu: [{batch: 1, heads: 2, seq_len: [32], masks: [{family: sliding_window, w: 4}]}]
    timing:
      cpu: {min_samples: 2, max_samples: 3, budget_s: 0.01, warmup: 1}
  mha_bf16:
    methods: [stof]
    sizes:
      cpu: [{batch: 1, heads: 2, head_dim: 16, seq_len: [32], masks: [causal]}]
    timing:
      cpu: {min_samples: 2, max_samples: 3, budget_s: 0.01, warmup: 1}
  mha_long:
    methods: [stof]
    sizes:
      cpu: [{batch: 1, heads: 2, head_dim: 16, seq_len: [32], masks: [document]}]
    timing:
      cpu: {min_samples: 2, max_samples: 3, budget_s: 0.01, warmup: 1}
  mask_build:
    methods: [stof]
    sizes:
      cpu: [{batch: 1, heads: 2, head_dim: 16, seq_len: [32], masks: [bigbird]}]
    timing:
      cpu: {min_samples: 2, max_samples: 3, budget_s: 0.01, warmup: 1}
  dynamic_mask:
    methods: [stof]
    sizes:
      cpu: [{batch: 1, heads: 2, head_dim: 16, seq_len: [32], masks: [{family: head_blocks, block: 16, fill: 0.5}]}]
    timing:
      cpu: {min_samples: 2, max_samples: 3, budget_s: 0.01, warmup: 1}
  duel:
    fights:
      cpu: [{of: mha, rivals: [torch_native], cells: ["causal:*"]}]
    timing:
      cpu: {min_samples: 2, max_samples: 3, budget_s: 0.01, warmup: 1}
  end_to_end:
    models: {cpu: [t5]}
    model_size: tiny
    methods: [stof, torch_native, mcfuser]
    sizes:
      cpu: [{batch: 1, seq_len: [32]}]
    tuning_s: {cpu: 0}
    timing:
      cpu: {min_samples: 2, max_samples: 3, budget_s: 0.01, warmup: 1}
  ablation: {methods: [stof]}
  overhead: {methods: [stof]}
  tuning_cost: {methods: [stof]}
  motivation:
    operators: [bias_layernorm]
    methods: [detached, fused]
    sizes:
      cpu: [{batch: 1, seq_len: [8], hidden: [16]}]
    search_s: {cpu: 1}
    timing:
      cpu: {min_samples: 2, max_samples: 3, budget_s: 0.01, warmup: 1}
"""
"""Attention by two methods that run on a CPU and one that does not, four cells each; the planner on two cells, the other
attention experiments on one each, and a duel on two; a whole model in two layers with no seconds to search in, and a pair of
operators with too few to compile."""


@dataclass(frozen=True)
class Repository:
    """A copy of the repository; commands run in it, as its user would type them in the activated environment."""

    path: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the commands: the running Python's tools first, the copy's package before the installed one."""
        tools = Path(sys.executable).parent
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        # One thread, since threads that wait for each other on a busy machine make tiny problems slow.
        own = {"PATH": path, "PYTHONPATH": str(self.path / "src"), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
        return os.environ | own

    def start(self, *command: str, **options: object) -> subprocess.Popen[str]:
        """Start a command, its output in one pipe."""
        return subprocess.Popen(
            command,
            cwd=self.path,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            **options,
        )

    def run(self, *command: str, status: int | None = 0) -> str:
        """Output of a command that must end with ``status`` (None: any)."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=300)
        assert status is None or process.returncode == status, output
        return output

    def snakemake(self, *arguments: str, status: int | None = 0) -> str:
        """Output of Snakemake, without its notices about profile and configuration."""
        output = self.run("snakemake", *arguments, status=status)
        return "".join(line for line in output.splitlines(keepends=True) if not line.startswith(NOISE))

    def planned(self, *arguments: str) -> dict[str, int]:
        """Rule -> number of jobs that a dry-run plans; empty if there is nothing to do."""
        lines = iter(self.snakemake(*arguments, "--dry-run").splitlines())
        jobs: dict[str, int] = {}
        for line in lines:
            if line == "Job stats:":
                next(lines), next(lines)
                for row in lines:
                    if row.startswith("total") or not row.strip():
                        break
                    rule, count = row.split()
                    jobs[rule] = int(count)
                break
        return jobs

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace a text that occurs in a file."""
        path = self.path / name
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{name} has no {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")


def copy_repository(to: Path) -> Repository:
    """The working tree's workflow, package and recorded rows; nothing derived, no environment."""
    to.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(source, to / name)
    shutil.copytree(ROOT / "results" / "recorded", to / "results" / "recorded")
    (to / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return Repository(to)


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    """A fresh copy, nothing run in it."""
    return copy_repository(tmp_path / "repo")


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, str]:
    repository = copy_repository(tmp_path_factory.mktemp("finished") / "repo")
    return repository, repository.snakemake("--cores", "1", "all", "--configfile", "tiny.yaml")


@pytest.fixture
def finished(_finished: tuple[Repository, str], tmp_path: Path) -> Repository:
    """A copy in which `snakemake --cores 1 all` with the tiny experiment has run."""
    shutil.copytree(_finished[0].path, tmp_path / "repo")
    return Repository(tmp_path / "repo")


@pytest.fixture
def finished_output(_finished: tuple[Repository, str]) -> str:
    """What that run printed."""
    return _finished[1]
