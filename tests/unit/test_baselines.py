"""Methods: the registry, and every method that runs here against the reference of the mask it applied."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from stof_kernels import masks
from stof_kernels.baselines import Problem, all_methods, get, method, methods_for, registry
from stof_kernels.baselines import inputs as shared
from stof_kernels.baselines.fa2 import window_of
from stof_kernels.benchmarking.check import TOLERANCE, kept_share, relative_error
from stof_kernels.ops import reference

DESIGN_IDS = {
    "stof", "torch_native", "torch_compile", "torch_compile_reduce_overhead", "torch_compile_max_autotune", "sdpa",
    "sdpa_efficient", "sdpa_cudnn", "fa2", "flex_attention", "flex_flash", "fa4", "bytetransformer", "splat",
    "splat_pieces", "mcfuser", "bolt",
}  # fmt: skip
EAGER = ("torch_native", "sdpa", "fa2", "stof", "stof_row_wise", "stof_block_wise")
# Families with rows that attend to nothing: unfused attention divides by zero there, as it does for everyone.
EMPTY_ROWS = {(m, f) for m in ("torch_native", "torch_compile") for f in ("artifact_dilated", "random_blocks")}


def problem_of(family: str, device: str = "cpu", dtype: str = "float32", **changes) -> Problem:
    length = changes.pop("length", 96)
    values = {
        "pattern": masks.get(family, length),
        "batch": 2,
        "q_len": length,
        "kv_len": length,
        "heads": 3,
        "kv_heads": 3,
        "head_dim": 32,
        "dtype": dtype,
        "device": device,
        "seed": 5,
    }
    return Problem(**values | changes)


def error_of(name: str, problem: Problem) -> float:
    tensors = shared.make_tensors(problem)
    with torch.no_grad():
        prepared = get(name).prepare(problem, tensors)
        return relative_error(problem, tensors, prepared.applied, prepared.run())


def test_every_id_of_the_design_has_rows_in_the_mha_experiment():
    assert {spec.id for spec in methods_for("mha")} == DESIGN_IDS


def test_registered_facts_are_complete():
    for spec in all_methods():
        assert spec.label
        assert (spec.prepare is None) == bool(spec.absent)
        assert spec.depends[0].startswith("baselines/")
        for device in ("cpu", "cuda"):
            assert set(spec.depends_on(device)) <= set(spec.depends)


def test_numbers_of_one_device_do_not_depend_on_the_other_devices_code(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    method("split", label="S", experiments=(), depends=("ops",), on_device={"cpu": ("a", "b"), "cuda": ("b", "c")})(
        print
    )
    spec = get("split")
    assert {"ops", "a", "b", "c"} <= set(spec.depends)
    assert "c" not in spec.depends_on("cpu")
    assert {"a", "b", "ops"} <= set(spec.depends_on("cpu"))


def test_a_new_file_is_a_new_method(tmp_path, monkeypatch):
    import stof_kernels.baselines as package

    (tmp_path / "newcomer.py").write_text(
        "from stof_kernels.baselines.registry import Prepared, method\n\n\n"
        "@method('newcomer', label='Newcomer', experiments=('mha',), rank=45)\n"
        "def newcomer(problem, tensors):\n"
        "    return Prepared(lambda: tensors.v, problem.pattern)\n"
    )
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    try:
        ids, spec = [spec.id for spec in methods_for("mha")], get("newcomer")
    finally:
        sys.modules.pop("stof_kernels.baselines.newcomer", None)
    assert ids.index("fa2") < ids.index("newcomer") < ids.index("flex_attention")
    assert spec.depends[0] == "baselines/newcomer.py"


def test_an_unknown_or_doubled_method_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    with pytest.raises(ValueError, match="method 'sdpaa' is unknown, allowed: stof"):
        get("sdpaa")
    with pytest.raises(ValueError, match="'sdpa' is registered twice"):
        method("sdpa", label="again", experiments=("mha",))(print)


def test_reasons_are_known_without_torch():
    code = (
        "import sys\nfrom stof_kernels.baselines import methods_for\n"
        "assert all(isinstance(s.why_not('mha', 'cpu'), str) for s in methods_for('mha'))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_methods_get_the_same_tensors():
    first, again = (shared.make_tensors(problem_of("causal")) for _ in range(2))
    other = shared.make_tensors(problem_of("causal", seed=6))
    assert torch.equal(first.q, again.q)
    assert torch.equal(first.v, again.v)
    assert not torch.equal(first.q, other.q)
    assert not torch.equal(first.k, first.v)
    assert abs(float(first.q.std()) - 1) < 0.05
    with pytest.raises(ValueError, match="dtype is 'int8', allowed: float32"):
        shared.make_tensors(problem_of("causal", dtype="int8"))


@pytest.mark.parametrize("family", masks.FAMILIES)
@pytest.mark.parametrize("name", EAGER)
def test_eager_methods_match_the_reference_on_every_mask(name, family):
    error = error_of(name, problem_of(family))
    if (name, family) in EMPTY_ROWS:
        assert math.isnan(error)
    else:
        assert error <= TOLERANCE["float32"]


@pytest.mark.parametrize("name", EAGER)
def test_eager_methods_take_grouped_heads(name):
    assert error_of(name, problem_of("longformer", heads=4, kv_heads=2)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("name", ["torch_native", "sdpa", "fa2", "stof"])
def test_bfloat16_is_within_its_tolerance(name):
    error = error_of(name, problem_of("sliding_window", dtype="bfloat16"))
    assert TOLERANCE["float32"] < error <= TOLERANCE["bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("family", masks.PAPER)
@pytest.mark.parametrize("name", ["torch_compile", "flex_attention"])
def test_compiled_methods_match_the_reference(name, family):
    assert error_of(name, problem_of(family, length=128, head_dim=64)) <= TOLERANCE["float32"]


def test_the_check_covers_every_batch_and_head():
    problem = problem_of("causal")
    tensors = shared.make_tensors(problem)
    keep = shared.dense_keep(problem)
    right, _ = reference.attention(tensors.q, tensors.k, tensors.v, keep)
    assert relative_error(problem, tensors, problem.pattern, right.float()) < 1e-6
    for spot in [(1, 2, 95), (0, 0, 0)]:
        wrong = right.float().clone()
        wrong[spot] += 1.0
        assert relative_error(problem, tensors, problem.pattern, wrong) > 1e-3
    with pytest.raises(ValueError, match=r"output has shape \(2, 96, 3, 32\), allowed: \(2, 3, 96, 32\)"):
        relative_error(problem, tensors, problem.pattern, right.transpose(1, 2))


def test_the_check_in_strips_is_the_check_in_one(monkeypatch):
    from stof_kernels.benchmarking import check

    problem = problem_of("bigbird")
    tensors = shared.make_tensors(problem)
    out = torch.randn_like(tensors.q)
    whole = relative_error(problem, tensors, problem.pattern, out)
    monkeypatch.setitem(check._CHUNK_BYTES, "cpu", 7 * 2 * 3 * 96 * 8)
    assert relative_error(problem, tensors, problem.pattern, out) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("family", masks.FAMILIES)
def test_kept_share_counts_the_dense_mask(family):
    problem = problem_of(family)
    assert kept_share(problem.pattern, 96, 96) == pytest.approx(float(shared.dense_keep(problem).float().mean()))


def test_the_native_window_of_flash_kernels():
    assert window_of(problem_of("sliding_window")) == (10, 10)
    assert window_of(problem_of("artifact_sliding_window")) == (64, 0)
    assert window_of(problem_of("longformer")) is None


CUDA_METHODS = [s.id for s in all_methods() if "cuda" in s.devices and s.id != "torch_compile_reduce_overhead"]


@pytest.mark.gpu
@pytest.mark.parametrize("family", masks.PAPER)
@pytest.mark.parametrize("name", CUDA_METHODS)
def test_methods_match_the_reference_on_cuda(name, family):
    from stof_kernels.baselines import Unsupported

    try:
        error = error_of(name, problem_of(family, "cuda", "float16", length=256, head_dim=64))
    except Unsupported as reason:
        pytest.skip(str(reason))
    assert error <= 2e-3
