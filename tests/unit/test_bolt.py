"""Bolt without a GPU: its list and rules, the profiler with made-up times, the patterns on the six models, the library's build.

The operators are stood in for by torch on the CPU; the kernels themselves are in tests/kernels/test_bolt_emulated.py.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stof_kernels.baselines import Unsupported, native, registry
from stof_kernels.baselines.bolt_compiler import operators as bolt_operators
from stof_kernels.baselines.bolt_compiler import profiler as profiler_module
from stof_kernels.baselines.bolt_compiler import templates
from stof_kernels.baselines.bolt_compiler.patterns import rewrite
from stof_kernels.baselines.bolt_compiler.problem import Gemm, Pair
from stof_kernels.baselines.bolt_compiler.profiler import AS_BOLT, AS_UPSTREAM, Profiler
from stof_kernels.baselines.bolt_compiler.templates import PERSISTENT, TEMPLATES, residence
from stof_kernels.baselines.models import MODELS, ModelProblem
from stof_kernels.baselines.models import bolt as method
from stof_kernels.fusion.capture import capture
from stof_kernels.integrations import models, variants
from stof_kernels.integrations.models import Shape
from stof_kernels.kernels.build import nvcc

needs_nvcc = pytest.mark.skipif(shutil.which(shlex.split(nvcc())[0]) is None, reason="no nvcc")
A100, RTX4090 = 163 * 1024, 99 * 1024


# ---- the list and its rules ------------------------------------------------------------------------------------------


def test_the_list_is_the_published_one():
    assert Counter(t.family for t in TEMPLATES) == {"sm_75": 7, "sm_80": 18}
    assert len(set(map(str, TEMPLATES))) == 25
    k32 = [(t.block[0], t.block[1], t.stages) for t in TEMPLATES if t.family == "sm_80" and t.block[2] == 32]
    assert Counter(k32) == Counter(
        [
            *((256, 128, 3), (128, 256, 3), (256, 64, 4), (64, 256, 4), (128, 128, 3), (128, 128, 4), (128, 128, 5)),
            *((128, 64, 6), (64, 128, 6), (64, 64, 10)),
        ]
    )
    k64 = [(t.block[0], t.block[1], t.stages) for t in TEMPLATES if t.family == "sm_80" and t.block[2] == 64]
    assert Counter(k64) == Counter(
        [
            (256, 128, 3),
            (128, 256, 3),
            (256, 64, 4),
            (64, 256, 4),
            (128, 128, 4),
            (128, 64, 3),
            (64, 128, 3),
            (64, 64, 5),
        ]
    )
    for template in TEMPLATES:
        warps = template.warps[0] * template.warps[1] * template.warps[2]
        assert warps in (4, 8)
        tile = [size // count for size, count in zip(template.block, template.warps, strict=True)]
        assert tile[0] * tile[1] <= 64 * 64, "accumulators of a warp above 128 registers a lane"


def test_templates_that_fit_the_shared_memory():
    assert templates.feasible(A100) == list(range(25))
    small = templates.feasible(RTX4090)
    left_out = [TEMPLATES[n].block for n in range(25) if n not in small]
    assert sorted(left_out) == sorted([(256, 128, 64), (128, 256, 64), (256, 64, 64), (64, 256, 64), (128, 128, 64)])
    assert TEMPLATES[templates.default_template(RTX4090)].block == (128, 128, 32)


@pytest.mark.parametrize(
    ("sizes", "want"), [((128, 768, 64), 8), ((65, 64, 64), 1), ((12, 8, 16), 4), ((6, 8, 8), 2), ((4, 4, 4), 4)]
)
def test_alignment_is_the_first_that_divides_all(sizes, want):
    assert templates.alignment(*sizes) == want


def test_padding():
    assert [templates.padded(n) for n in (1, 8, 65, 1025)] == [8, 8, 72, 1032]


# ---- residence -------------------------------------------------------------------------------------------------------


def test_example_of_the_persistent_kernels_is_legal():
    assert [k.residence for k in residence(81920, 64, 576, 128, 64).kernels] == ["registers"]
    assert [k.residence for k in residence(81920, 64, 576, 256, 64).kernels] == ["shared memory"]
    why = "not in registers: sums of N0 = 64 and N1 = 256 take 160 a thread, at most 128"
    assert residence(81920, 64, 576, 256, 64).registers == why
    for kernel in PERSISTENT:
        assert bool(residence(64, kernel.n0, 8, kernel.n1, kernel.n0).registers) == (kernel.residence != "registers")
        assert kernel.shared_bytes <= RTX4090


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ((512, 3072, 768, 768, 3072), "no threadblock residence: N0 = 3072 is above the widest tile, 256"),
        ((512, 64, 768, 768, 64), "no threadblock residence: N1 = 768 is above the widest tile, 256"),
        ((512, 96, 64, 128, 96), "no threadblock residence: no tile is N0 = 96 and then N1 = 128 wide"),
        ((512, 64, 64, 128, 72), "not a chain: K1 = 72 is not N0 = 64"),
        ((512, 64, 65, 128, 64), "K0 = 65 is not a multiple of 8"),
        ((512, 64, 64, 128, 64, 256), "rows differ: M = 512 then 256, both products need the same rows"),
    ],
)
def test_residence_refuses_by_name(sizes, why):
    found = residence(*sizes)
    assert found.refusal == why
    assert not found.kernels


# ---- the profiler ----------------------------------------------------------------------------------------------------


def gemm(a, b, bias, epilogue, candidate):
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert a.shape[-1] % 8 == b.shape[-2] % 8 == 0
    assert a.dtype == b.dtype == torch.float16
    assert (bias is None) == (epilogue == 0)
    assert 0 <= candidate < len(TEMPLATES)
    out = a.float() @ b.float().transpose(-1, -2)
    out = out if bias is None else out + bias.float()
    return (F.relu(out) if epilogue == 2 else F.gelu(out) if epilogue == 3 else out).half()


def persistent(a, b0, bias0, epilogue0, b1, bias1, epilogue1, kernel):
    assert (PERSISTENT[kernel].n0, PERSISTENT[kernel].n1) == (b0.shape[0], b1.shape[0])
    return gemm(gemm(a, b0, bias0, epilogue0, 0), b1, bias1, epilogue1, 0)


@pytest.fixture(scope="module")
def operators():
    if torch.cuda.is_available():
        pytest.skip("the real operators are tested here: test_cuda_bolt.py")
    library = torch.library.Library("stof_bolt", "DEF")
    for schema, function in zip(bolt_operators.SCHEMAS, (gemm, persistent), strict=True):
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CPU")
    bolt_operators.register_fakes()
    yield
    bolt_operators.register_fakes.cache_clear()
    library._destroy()


def profiler(data=AS_BOLT, seconds=lambda n: 1.0 + n, limit=A100):
    """Made-up times by the order of the calls."""
    calls = []

    def measure(call):
        call()
        calls.append(call)
        return seconds(len(calls) - 1)

    made = Profiler(data, measure=measure, shared_limit=limit, device="cpu")
    made.calls = calls
    return made


def test_the_fastest_candidate_is_kept_by_shape(operators):
    times = [5.0] * 25
    times[13], times[4] = 1.0, 2.0
    found = profiler(seconds=lambda n: times[n % 25])
    shape = Gemm(16, 24, 8, epilogue="bias_gelu")
    pick = found.pick(shape)
    assert pick.candidate == 13
    assert pick.best == 1.0
    assert len(found.calls) == found.timed == 25
    assert found.pick(shape).candidate == 13
    assert found.pick(Gemm(16, 24, 8, 3)).gemm.batch == 3
    assert len(found.calls) == 50
    assert found.seconds > 0


def test_candidates_that_do_not_fit_or_fail_are_not_taken(operators):
    def seconds(n):
        if n == 0:
            raise RuntimeError("CUDA error: made up\nand more")
        return 9.0 - n / 10

    found = profiler(seconds=seconds, limit=RTX4090)
    pick = found.pick(Gemm(8, 8, 8))
    assert len(found.calls) == 20
    assert len(pick.problems) == 6
    assert pick.problems[0] == "CUDA error: made up"
    assert TEMPLATES[pick.candidate] is TEMPLATES[24]
    assert found.timed == 25
    with pytest.raises(RuntimeError, match=r"no template runs \(8, 8, 8\) linear: .*made up"):
        profiler(seconds=lambda n: seconds(0)).pick(Gemm(8, 8, 8))


def test_a_template_that_breaks_the_device_is_named_and_ends_the_profile(operators, monkeypatch):
    def seconds(n):
        if n == 3:
            raise RuntimeError("an illegal memory access was encountered\nand more")
        return 1.0

    monkeypatch.setattr(profiler_module, "device_is_usable", lambda device: False)
    found = profiler(seconds=seconds)
    with pytest.raises(RuntimeError, match=rf"after {TEMPLATES[3]} of .* unusable in this process: an illegal"):
        found.pick(Gemm(16, 24, 8))
    assert not found.picks


def test_upstream_times_zeros_without_epilogue_and_batch(operators, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "zeros", lambda *a, _real=torch.zeros, **k: seen.append(a[0]) or _real(*a, **k))
    found = profiler(AS_UPSTREAM)
    found.pick(Gemm(16, 24, 8, epilogue="bias_gelu"))
    found.pick(Gemm(16, 24, 8, batch=6))
    assert found.pick(Gemm(16, 24, 8)).gemm == Gemm(16, 24, 8)
    assert list(found.picks) == [Gemm(16, 24, 8)], "one product for all three"
    assert seen == [(16, 8), (24, 8)]
    own = profiler(AS_BOLT)
    own.pick(Gemm(16, 24, 8, batch=6))
    assert list(own.picks) == [Gemm(16, 24, 8, batch=6)]
    assert len(seen) == 2, "random numbers"


def test_persistent_kernels_must_be_faster_than_two(operators):
    pair = Pair(Gemm(64, 64, 8, epilogue="bias_relu"), Gemm(64, 128, 64, epilogue="bias"))
    kernels = residence(64, 64, 8, 128, 64).kernels
    slow = profiler(seconds=lambda n: 1.0 if n < 50 else 2.5)
    assert slow.pick_pair(pair, kernels) is None
    fast = profiler(seconds=lambda n: 1.0 if n < 50 else 1.5)
    assert fast.pick_pair(pair, kernels) is kernels[0]


# ---- patterns --------------------------------------------------------------------------------------------------------


def problem_of(model, size="tiny", batch=2, seq_len=96, dtype="float16"):
    return ModelProblem(model, batch, seq_len, "bigbird", dtype, "cpu", size=size)


class Bench:
    """The subject that a method gets, without the benchmark's cache."""

    def __init__(self, problem):
        self.problem = problem
        self._module = variants.build(problem.case, variants.NATIVE)

    def model(self, attention):
        assert attention == variants.NATIVE
        return self._module

    def inputs(self, attention):
        return variants.arguments(self.problem.case, attention)


def error(out, want):
    return float((out.double() - want.double()).norm() / want.double().norm())


# launches of one layer (T5: of one encoder and one decoder layer) by pattern
LAYER = {
    "bert_base": {"dense+bias": 3, "dense+bias_gelu": 1, "batch_matmul": 2},
    "gpt2": {"dense+bias": 4, "batch_matmul": 2},
    "llama": {"dense": 4, "batch_matmul": 2},
    "t5": {"dense": 4 + 7, "batch_matmul": 6},
    "vit": {"dense+bias": 3, "dense+bias_gelu": 1, "batch_matmul": 2},
}


@pytest.mark.parametrize("id", LAYER)
def test_patterns_of_the_models(operators, id):
    problem = problem_of(id, seq_len=130 if id == "vit" else 96)
    bench, found = Bench(problem), profiler(seconds=lambda n: 1.0 if n % 25 == 11 else 2.0)
    with torch.no_grad():
        want = bench.model(variants.NATIVE)(**bench.inputs(variants.NATIVE)).last_hidden_state
    run, report = method.compiled(bench, found, compile_rest=lambda graph: graph)
    assert error(run(), want) < 3e-3
    wide = {"persistent in shared memory": 0, **report.launches}
    # Tiny feed-forward layers, 128 -> 256 -> 128, are legal for the persistent kernel, but the made-up times refuse it.
    assert {k: v for k, v in wide.items() if v} == {kind: 2 * count for kind, count in LAYER[id].items()}
    assert report.persistent == 0
    assert not report.left
    assert str(report).startswith(f"{2 * sum(LAYER[id].values())} CUTLASS-style launches")
    if id == "vit":
        assert problem.tokens % 8
        assert report.padded == 4
        assert {g.m for g in report.gemms if g.batch} == {problem.tokens}
        assert all(g.n % 8 == g.k % 8 == 0 for g in report.gemms)


def test_compiled_by_inductors_front_end(operators):
    bench, found = Bench(problem_of("bert_base")), profiler()
    with torch.no_grad():
        want = bench.model(variants.NATIVE)(**bench.inputs(variants.NATIVE)).last_hidden_state
    torch._dynamo.reset()
    run, _ = method.compiled(
        bench, found, lambda graph: torch.compile(graph, backend="aot_eager", dynamic=False, fullgraph=True)
    )
    assert error(run(), want) < 3e-3
    assert torch.equal(run(), run())


PAPER = {id: models.spec(id).paper for id in MODELS}


def thin(id):
    """The paper's widths in one layer of a small vocabulary: the shapes of products are the model's."""
    shape = PAPER[id]
    return Shape(1, shape.heads, shape.hidden, shape.ffn, shape.kv_heads, 128)


@pytest.fixture
def without_numbers(operators, monkeypatch):
    """Profiling without running anything, since paper sizes would take long here."""
    monkeypatch.setattr(Profiler, "_draw", lambda self, *shape: torch.empty(0))


@pytest.mark.parametrize("id", MODELS)
def test_no_persistent_fusion_in_the_six_models(without_numbers, id):
    bench = Bench(problem_of(id, size=thin(id), batch=1, seq_len=128))
    found = Profiler(measure=lambda call: 1.0, shared_limit=A100, device="cpu")
    _, report = method.compiled(bench, found, compile_rest=lambda graph: graph)
    assert report.persistent == 0
    assert "0 persistent fusions" in str(report)
    refusals = {refusal for _, refusal in report.chains}
    if id in ("bert_base", "bert_large", "vit"):  # elsewhere an operator that is no pattern stands between the two
        assert refusals == {f"no threadblock residence: N0 = {PAPER[id].ffn} is above the widest tile, 256"}
    else:
        assert not refusals
    if id.startswith("bert"):
        assert len(report.gemms) == 6
        assert found.timed == 150
        hidden, ffn = PAPER[id].hidden, PAPER[id].ffn
        assert set(report.gemms) == {
            *(Gemm(128, 3 * hidden, hidden, epilogue="bias"), Gemm(128, hidden, hidden, epilogue="bias")),
            *(Gemm(128, ffn, hidden, epilogue="bias_gelu"), Gemm(128, hidden, ffn, epilogue="bias")),
            *(Gemm(128, 128, 64, PAPER[id].heads), Gemm(128, 64, 128, PAPER[id].heads)),
        }
    assert "0 persistent fusions" in method.note_of(report, found)


class Chain(nn.Module):
    """Products of several kinds: a chain that residence allows, tanh-GELU, an odd width, one weight that is computed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(40, 64), nn.Linear(64, 128)
        self.odd, self.back = nn.Linear(128, 21), nn.Linear(21, 24, bias=False)

    def forward(self, x):
        y = self.second(F.relu(self.first(x)))
        z = F.gelu(self.odd(y), approximate="tanh")
        return F.relu(self.back(z)) + F.linear(x, self.first.weight[:24] * 2)


def chain(seed=0):
    torch.manual_seed(seed)
    return Chain().half().eval(), torch.randn(2, 33, 40).half()


@pytest.mark.parametrize("fast", [False, True])
def test_a_chain_that_fits_is_fused_when_faster(operators, fast):
    model, x = chain()
    captured = capture(model, (x,))
    found = profiler(seconds=lambda n: 1.0 if fast or n != 50 else 2.5)  # number 50 is the chain
    report = rewrite(captured.graph_module, found)
    with torch.no_grad():
        want, out = model(x), captured.graph_module(x)[0]
    assert error(out, want) < 2e-3
    assert report.persistent == fast
    assert report.padded == 2, "21 columns become 24, in the product and in the next one's input"
    kinds = {"dense+bias": 1, "dense": 2}
    assert report.launches == kinds | (
        {"persistent in registers": 1} if fast else {"dense+bias_relu": 1, "dense+bias": 2}
    )
    refusals = {""} if fast else {
        "slower than two kernels", "no threadblock residence: no tile is N0 = 128 and then N1 = 21 wide"
    }  # fmt: skip
    assert {refusal for _, refusal in report.chains} == refusals


def test_what_is_no_pattern_stays(operators):
    model, x = chain()
    captured = capture(model, (x,))
    rewrite(captured.graph_module, profiler())
    targets = Counter(str(node.target) for node in captured.graph_module.graph.nodes if node.op == "call_function")
    assert targets["aten.gelu.default"] == 1
    assert targets["aten.relu.default"] == 1, "ReLU behind a dense layer without bias"
    assert not {"aten.linear.default", "aten.matmul.default"} & set(targets)


def test_float32_is_left_alone(operators):
    model, x = chain()
    captured = capture(model.float(), (x.float(),))
    report = rewrite(captured.graph_module, profiler())
    assert report.left == {"dense in float32": 5}
    assert not report.launches


def test_layers_of_one_input_become_one_product(operators):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 24), nn.Linear(16, 8)
            self.apart = nn.Linear(16, 8, bias=False)

        def forward(self, x):
            return self.q(x).view(2, 5, 4, 2), self.k(x), self.v(x), self.apart(x)

    torch.manual_seed(1)
    model, x = Three().half().eval(), torch.randn(2, 5, 16).half()
    captured = capture(model, (x,))
    report = rewrite(captured.graph_module, profiler())
    assert report.combined == 3
    assert set(report.gemms) == {Gemm(10, 40, 16, epilogue="bias"), Gemm(10, 8, 16)}
    with torch.no_grad():
        for out, want in zip(captured.graph_module(x), model(x), strict=True):
            assert error(out, want) < 2e-3


# ---- the method ------------------------------------------------------------------------------------------------------


def test_the_method_is_in_its_experiments_and_no_others():
    spec = registry.get("bolt", "model")
    assert spec.experiments == ("end_to_end", "tuning_cost")
    assert spec.label == registry.get("bolt").label == "Bolt (reimpl.)"
    assert spec.reimplemented
    assert spec.tuned
    assert spec.devices == ("cuda",)
    assert {"baselines/bolt_compiler", "baselines/csrc/bolt", "fusion/capture.py"} <= set(spec.depends)
    assert "has no attention of its own" in registry.get("bolt").absent
    assert registry.get("bolt_as_upstream", "model").experiments == ()


def test_other_types_are_unsupported():
    class Subject:
        problem = problem_of("bert_base", dtype="bfloat16")

    with pytest.raises(Unsupported, match="Bolt's list of templates is for float16, not bfloat16"):
        registry.get("bolt", "model").prepare(Subject())


def test_without_a_library_and_a_compiler_the_reason_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "find", lambda name, target: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(Unsupported, match="the sm_90a library of bolt is not built and there is no nvcc") as caught:
        bolt_operators.load()
    assert "\n" not in str(caught.value)


@needs_nvcc
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_kernels_compile_without_spills(target):
    """Built once per digest into the user's cache, about 40 s each; the log tells registers and spills."""
    log = native.build("bolt", target).with_name("build.log").read_text()
    entries = re.findall(r"Compiling entry function '([^']+)' for '([^']+)'", log)
    assert Counter(made for _, made in entries) == {target: 25 + len(PERSISTENT)}
    assert set(re.findall(r"(\d+) bytes spill stores", log)) == {"0"}
    assert max(map(int, re.findall(r"Used (\d+) registers", log))) <= 255
