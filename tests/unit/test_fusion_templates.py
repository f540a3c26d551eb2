"""Every template against the segment that it stands for; Triton's kernels run in its interpreter where there is no GPU."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusion_modules import Fn, Norm, rotate, tanh_gelu
from stof_kernels.fusion import graph, segments
from stof_kernels.fusion.capture import capture
from stof_kernels.fusion.costs import Space
from stof_kernels.fusion.templates import TEMPLATES, gemm, gemm_gemm, gemm_maps, projection_rotary, split_gemm
from stof_kernels.fusion.templates.base import setting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def linear(i=40, o=48, bias=True):
    return nn.Linear(i, o, bias=bias)


def heads(x):
    return x.view(*x.shape[:-1], -1, 8).transpose(1, 2)


def split(x):
    return x.view(*x.shape[:-1], -1, 32).transpose(1, 2)


X, Y, H = (2, 9, 40), (2, 9, 48), (2, 3, 9, 16)
# name: template, operators, module, shapes of its inputs
CASES = {
    "residual, layer norm": ("rowwise", "add + layer_norm", Fn(lambda m, x, y: m.n(x + y), n=nn.LayerNorm(40)), [X, X]),
    "both results of a residual": (
        "rowwise",
        "add + layer_norm",
        Fn(lambda m, x, y: ((z := x + y), m.n(z)), n=nn.LayerNorm(40)),
        [X, X],
    ),
    "residual, rms norm": ("rowwise", "add + rms_norm", Fn(lambda m, x, y: m.n(x + y), n=Norm(40)), [X, X]),
    "norm without weights": ("rowwise", "layer_norm", Fn(lambda m, x: F.layer_norm(x, (40,), eps=0.1)), [X]),
    "gelu": ("rowwise", "gelu", Fn(lambda m, x: F.gelu(x)), [X]),
    "gelu by tanh": ("rowwise", "gelu_tanh", Fn(lambda m, x: tanh_gelu(x)), [X]),
    "gelu by tanh in one": ("rowwise", "gelu", Fn(lambda m, x: F.gelu(x, approximate="tanh")), [X]),
    "gate": ("rowwise", "silu + mul", Fn(lambda m, x, y: F.silu(x) * y), [X, X]),
    "chain": (
        "rowwise",
        "relu + mul + sub + div",
        Fn(lambda m, x, y: (2.5 * F.relu(x) - y) / (m.w.abs() + 1), w=nn.Parameter(torch.ones(40))),
        [X, X],
    ),
    "one row": ("rowwise", "add + layer_norm", Fn(lambda m, x, y: m.n(x + y), n=nn.LayerNorm(40)), [(1, 40), (1, 40)]),
    "repeated rows": (
        "rowwise",
        "add + layer_norm",
        Fn(lambda m, x, y: m.n(x + y), n=nn.LayerNorm(40)),
        [X, (1, 9, 40)],
    ),
    "bias": ("gemm", "linear", Fn(lambda m, x: m.a(x), a=linear()), [X]),
    "no bias": ("gemm", "linear", Fn(lambda m, x: m.a(x), a=linear(bias=False)), [X]),
    "gelu after": ("gemm", "linear + gelu", Fn(lambda m, x: F.gelu(m.a(x)), a=linear()), [X]),
    "relu after": ("gemm", "linear + relu", Fn(lambda m, x: F.relu(m.a(x)), a=linear()), [X]),
    "residual after": ("gemm", "linear + add", Fn(lambda m, x, y: y + m.a(x), a=linear()), [X, Y]),
    "residual and layer norm after": (
        "gemm",
        "linear + add + layer_norm",
        Fn(lambda m, x, y: m.n(m.a(x) + y), a=linear(), n=nn.LayerNorm(48)),
        [X, Y],
    ),
    "residual and rms norm after, sum kept": (
        "gemm",
        "linear + add + rms_norm",
        Fn(lambda m, x, y: ((z := m.a(x) + y), m.n(z)), a=linear(), n=Norm(48)),
        [X, Y],
    ),
    "query, key, value with head split": (
        "gemm",
        "linear x3",
        Fn(lambda m, x: tuple(heads(p(x)) for p in (m.a, m.b, m.c)), a=linear(), b=linear(bias=False), c=linear()),
        [X],
    ),
    "gate and what it gates": (
        "gemm",
        "linear x2 + silu + mul",
        Fn(lambda m, x: F.silu(m.a(x)) * m.b(x), a=linear(bias=False), b=linear(bias=False)),
        [X],
    ),
    "weights stored (in, out)": (
        "gemm",
        "linear + gelu_tanh",
        Fn(
            lambda m, x: tanh_gelu(torch.addmm(m.b, x.view(-1, 40), m.w).view(2, 9, 48)),
            w=nn.Parameter(torch.ones(40, 48)),
            b=nn.Parameter(torch.ones(48)),
        ),
        [X],
    ),
    "feed forward": (
        "gemm_gemm",
        "linear + gelu + linear",
        Fn(lambda m, x: m.b(F.gelu(m.a(x))), a=linear(40, 72), b=linear(72, 48)),
        [X],
    ),
    "feed forward, residual, norm": (
        "gemm_gemm",
        "linear + relu + linear + add + layer_norm",
        Fn(lambda m, x, y: m.n(y + m.b(F.relu(m.a(x)))), a=linear(40, 72), b=linear(72, 48), n=nn.LayerNorm(48)),
        [X, Y],
    ),
    "gated feed forward": (
        "gemm_gemm",
        "linear x2 + silu + mul + linear",
        Fn(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), a=linear(40, 72, False), b=linear(40, 72), c=linear(72, 48)),
        [X],
    ),
    "feed forward of stored (in, out), sum kept": (
        "gemm_gemm",
        "linear + gelu_tanh + linear + add + layer_norm",
        Fn(
            lambda m, x, y: (
                (z := y + torch.addmm(m.c, tanh_gelu(torch.addmm(m.b, x.view(-1, 40), m.v)), m.w).view(2, 9, 48)),
                m.n(z),
            ),
            v=nn.Parameter(torch.ones(40, 72)),
            b=nn.Parameter(torch.ones(72)),
            w=nn.Parameter(torch.ones(72, 48)),
            c=nn.Parameter(torch.ones(48)),
            n=nn.LayerNorm(48),
        ),
        [X, Y],
    ),
    "split depth": ("split_gemm", "linear + gelu", Fn(lambda m, x: F.gelu(m.a(x)), a=linear(256)), [(2, 9, 256)]),
    "split depth, residual, norm": (
        "split_gemm",
        "linear + add + layer_norm",
        Fn(lambda m, x, y: m.n(y + m.a(x)), a=linear(256), n=nn.LayerNorm(48)),
        [(2, 9, 256), Y],
    ),
    "rotation": ("rotary", "rope", Fn(lambda m, x, c, s: rotate(x, c, s)), [H, (1, 1, 9, 16), (1, 1, 9, 16)]),
    "projections and rotations": (
        "projection_rotary",
        "linear x3 + rope + rope",
        Fn(
            lambda m, x, c, s: (rotate(split(m.a(x)), c, s), rotate(split(m.b(x)), c, s), split(m.c(x))),
            a=linear(64, 96),
            b=linear(64, 96),
            c=linear(64, 96),
        ),
        [(2, 9, 64), (1, 1, 9, 32), (1, 1, 9, 32)],
    ),
    "rotation of strided heads": (
        "rotary",
        "rope + rope",
        Fn(lambda m, x, y, c, s: (rotate(x.transpose(1, 2), c, s), rotate(y.transpose(1, 2), c, s))),
        [(2, 9, 4, 16), (2, 9, 2, 16), (2, 1, 9, 16), (2, 1, 9, 16)],
    ),
}


def segment_of(case, dtype=torch.float32):
    """The case as one segment, with tensors for its inputs: weights random too, so that a lost bias or weight shows."""
    _, operators, module, shapes = CASES[case] if isinstance(case, str) else case
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]
    module = copy.deepcopy(module).eval().to(DEVICE, dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0))
    found = graph.build(capture(module, tuple(inputs)))
    segment = segments.cut(found, range(len(found.ops)))
    assert str(segment) == operators
    named = dict(zip([n for n in found.graph_module.graph.nodes if n.op == "placeholder"], inputs, strict=True))
    return segment, [tensor_of(node, found, named) for node in segment.sources]


def tensor_of(node, found, inputs):
    """What a node of the captured graph holds: an input, a weight, or something computed from weights."""
    if node.op == "placeholder":
        return inputs[node]
    if node.op == "get_attr":
        return found.graph_module.get_parameter(node.target)
    return node.target(*torch.fx.map_arg(node.args, lambda n: tensor_of(n, found, inputs)), **node.kwargs)


def some(settings):
    """First, last and two between: the whole space would take minutes in the interpreter."""
    return [settings[i] for i in sorted({0, len(settings) // 3, 2 * len(settings) // 3, len(settings) - 1})]


@triton
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_segment(case):
    segment, inputs = segment_of(case)
    template = TEMPLATES[CASES[case][0]]
    assert template.supports(segment) is None
    with torch.no_grad():
        want = segment.module(*inputs)
        for setting in some(template.settings(segment)):
            got = template.build(segment, setting)(*inputs)
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@triton
@pytest.mark.parametrize("case", [c for c, v in CASES.items() if "rotary" not in v[0]])
def test_every_input_matters(case):
    segment, inputs = segment_of(case)
    template = TEMPLATES[CASES[case][0]]
    with torch.no_grad():
        run = template.build(segment, template.settings(segment)[0])
        want = [t.clone() for t in run(*inputs)]
        for i in range(len(inputs)):
            changed = [t if j != i else torch.zeros_like(t) for j, t in enumerate(inputs)]
            assert any((a - b).abs().max() > 1e-3 for a, b in zip(run(*changed), want, strict=True)), f"input {i}"


@triton
@pytest.mark.parametrize(
    "case", ["residual, rms norm", "gate and what it gates", "feed forward", "residual after", "rotation"]
)
def test_half_precision_is_no_worse_than_eager(case):
    segment, inputs = segment_of(case, torch.float16)
    exact = [t.float() for t in inputs]
    template = TEMPLATES[CASES[case][0]]
    wide, _ = segment_of(case)
    with torch.no_grad():
        want = wide.module(*exact)
        eager = segment.module(*inputs)
        got = template.build(segment, template.settings(segment)[0])(*inputs)
    for a, b, w in zip(got, eager, want, strict=True):
        assert a.dtype == torch.float16
        assert (a.float() - w).abs().max() <= max(5e-3, 1.25 * (b.float() - w).abs().max())


@triton
@pytest.mark.parametrize("blocks", [0, 3])
@pytest.mark.parametrize("case", ["gelu after", "residual after", "gate and what it gates", "no bias"])
def test_tensor_maps_read_the_same_tiles(monkeypatch, case, blocks):
    monkeypatch.setattr(gemm_maps, "_FEWEST_ROWS", 1)
    segment, inputs = segment_of(case, torch.float16)
    template = TEMPLATES["gemm_maps"]
    assert template.supports(segment) is None
    with torch.no_grad():
        want = segment.module(*inputs)
        # Tiles that reach over every edge: 18 rows, 48 columns, depth 40.
        got = template.build(segment, setting(BM=16, BN=32, BK=16, warps=4, stages=2, blocks=blocks))(*inputs)
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3)


@triton
def test_tensor_maps_say_what_they_cannot(monkeypatch):
    template = TEMPLATES["gemm_maps"]
    assert "float32" in template.supports(segment_of("gelu after")[0])
    assert "fewer than 1024 rows" in template.supports(segment_of("gelu after", torch.float16)[0])
    monkeypatch.setattr(gemm_maps, "_FEWEST_ROWS", 1)
    assert "weights (in, out)" in template.supports(segment_of("weights stored (in, out)", torch.float16)[0])


def test_short_activations_are_within_the_rounding_of_half_precision():
    """The formulas of `HELPERS` with tanh.approx's worst error, 2 ** -11 of its value, on either side."""
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    square = (x * x).clamp(max=20.0)
    by_erf = x * (0.79750788 + square * (0.0370056495 - 0.000351517322 * square))
    by_tanh = x * (0.7978845608028654 + 0.03567740813636141 * x * x)
    for inner, want in ((by_erf, F.gelu(x)), (by_tanh, F.gelu(x, approximate="tanh")), (x / 2, F.silu(x))):
        for error in (-(2.0**-11), 0.0, 2.0**-11):
            got = x / 2 + x / 2 * torch.tanh(inner) * (1 + error)
            assert ((got - want).abs() <= 5e-5 + abs(error) * x.abs() / 2).all()


@triton
def test_the_overflow_guard_of_float16_is_one_operator():
    """T5's: infinities become the largest number less 1000, everything else stays."""

    def guarded(m, x, y):
        z = x + y
        largest = torch.finfo(z.dtype).max
        bound = torch.where(torch.isinf(z).any(), largest - 1000, largest)
        return torch.clamp(z, min=-bound, max=bound)

    module = Fn(guarded).eval()
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    y = torch.zeros_like(x)
    for value, place in ((math.inf, 3), (-math.inf, 5), (math.nan, 7), (65504.0, 9)):
        y[0, place] = value
    x[0, 9] = 64.0  # the sum is beyond float16: an infinity as well
    found = graph.build(capture(module, (x, y)))
    segment = segments.cut(found, range(len(found.ops)))
    assert str(segment) == "add + clamp"
    run = TEMPLATES["rowwise"].build(segment, TEMPLATES["rowwise"].settings(segment)[0])
    torch.testing.assert_close(run(x, y)[0], guarded(None, x, y), rtol=0, atol=0, equal_nan=True)
    # Bounds that are something else are no such guard.
    other = Fn(lambda m, x, y: torch.clamp(x + y, min=-y.abs(), max=y.abs())).eval()
    found = graph.build(capture(other, (x, y)))
    assert TEMPLATES["rowwise"].supports(segments.cut(found, range(len(found.ops)))) is not None


@triton
def test_relu_keeps_what_is_not_a_number_and_no_infinity_below_zero():
    module = Fn(lambda m, x: F.relu(x)).eval()
    x = torch.tensor([[1.5, -2.0, math.inf, -math.inf, math.nan, 0.0]] * 2).to(DEVICE)
    found = graph.build(capture(module, (x,)))
    segment = segments.cut(found, range(len(found.ops)))
    run = TEMPLATES["rowwise"].build(segment, TEMPLATES["rowwise"].settings(segment)[0])
    torch.testing.assert_close(run(x)[0], F.relu(x), rtol=0, atol=0, equal_nan=True)


@triton
def test_an_embedding_reads_its_rows_and_a_wrong_index_is_nan():
    module = Fn(lambda m, ids: m.n(m.e(ids)), e=nn.Embedding(20, 40), n=nn.LayerNorm(40)).eval().to(DEVICE)
    ids = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = graph.build(capture(module.requires_grad_(False), (ids,)))
    segment = segments.cut(found, range(len(found.ops)))
    named = {n: ids for n in found.graph_module.graph.nodes if n.op == "placeholder"}
    run = TEMPLATES["rowwise"].build(segment, TEMPLATES["rowwise"].settings(segment)[0])
    inputs = [tensor_of(node, found, named) for node in segment.sources]
    torch.testing.assert_close(run(*inputs)[0], module(ids), rtol=1e-5, atol=1e-5)
    ids[0, 2], ids[1, 4] = 20, -1
    assert run(*inputs)[0].isnan().any(-1).nonzero().tolist() == [[0, 2], [1, 4]]


@triton
@pytest.mark.parametrize(
    ("case", "template", "limit"),
    [
        ("bias", "gemm", "_MANY_ROWS"),
        ("residual and layer norm after", "gemm", "_FEW_ROWS"),
        ("feed forward", "gemm_gemm", "_MOST_ROWS"),
    ],
)
def test_a_search_leaves_out_what_loses_by_far(monkeypatch, case, template, limit):
    segment, _ = segment_of(case)
    assert TEMPLATES[template].promising(segment)
    monkeypatch.setattr({"gemm": gemm, "gemm_gemm": gemm_gemm}[template], limit, 17)  # the case has 18 rows
    assert not TEMPLATES[template].promising(segment)
    assert TEMPLATES[template].supports(segment) is None
    assert template not in {name for name, _ in Space.of(segment, 0, lambda name: True).waiting}
    assert TEMPLATES["gemm"].promising(segment_of("gelu after")[0])


CHAINS = [c for c, v in CASES.items() if v[0] == "gemm_gemm"]


@triton
@pytest.mark.parametrize("case", CHAINS)
def test_a_chain_in_parts_is_the_same_every_time_and_equals_whole_rows(monkeypatch, case):
    """72 inner columns are 5 parts of 16 or 2 of 48, the last one in part beyond the end; many parts are added in one tile."""
    segment, inputs = segment_of(case)
    template = TEMPLATES["gemm_gemm"]
    second = {"RM": 1, "RN": 64, "row_warps": 1, "warps": 4, "stages": 2}
    ways = [
        setting(parts=1, BM=16, BH=32, BN=64, BK=16, warps=8),
        setting(parts=5, slices=1, BM=16, BH=16, BN=32, BK=32, **second),
        setting(parts=2, slices=3, BM=32, BH=16, BN=16, BK=16, **second),
    ]
    with torch.no_grad():
        want = segment.module(*inputs)
        for limit in (8, 1):
            monkeypatch.setattr(split_gemm, "_FEW_PARTS", limit)
            for way in ways:
                run = template.build(segment, way)
                for a, b, w in zip(run(*inputs), run(*inputs), want, strict=True):
                    assert torch.equal(a, b)
                    assert (a.shape, a.dtype, a.stride()) == (w.shape, w.dtype, w.stride())
                    torch.testing.assert_close(a, w, rtol=1e-5, atol=1e-5)


@triton
def test_a_chain_may_be_wider_than_a_block_and_empty_of_anything_else():
    wide = Fn(lambda m, x: m.b(m.a(x)), a=linear(24, 40), b=linear(40, 1040))
    segment, inputs = segment_of(("", "linear + linear", wide, [(3, 24)]))
    template = TEMPLATES["gemm_gemm"]
    settings = [dict(s) for s in template.settings(segment)]
    assert settings
    assert all(s["parts"] > 1 for s in settings)
    with torch.no_grad():
        for s in (settings[0], settings[-1]):
            got = template.build(segment, setting(**s))(*inputs)[0]
            torch.testing.assert_close(got, segment.module(*inputs)[0], rtol=1e-5, atol=1e-5)


@triton
def test_a_chain_too_narrow_for_parts_and_too_wide_for_whole_rows_says_so():
    wide = Fn(lambda m, x: m.b(m.a(x)), a=linear(24, 16), b=linear(16, 1040))
    segment, _ = segment_of(("", "linear + linear", wide, [(3, 24)]))
    assert "16 columns between the products and 1040" in TEMPLATES["gemm_gemm"].supports(segment)


@triton
def test_a_segment_without_a_setting_is_not_supported(monkeypatch):
    """Tiles have whole halves of heads: where none of those worth trying has, a search leaves the template out."""
    segment, _ = segment_of("projections and rotations")
    assert TEMPLATES["projection_rotary"].supports(segment) is None
    narrow = [setting(BM=64, BN=n, BK=32, warps=4, stages=3) for n in (32, 64)]
    monkeypatch.setattr(projection_rotary, "candidates", lambda *sizes, most: narrow)
    assert TEMPLATES["projection_rotary"].supports(segment) == "no tile fits 96 columns of depth 64"
    assert "projection_rotary" not in {name for name, _ in Space.of(segment, 0, lambda name: True).waiting}


@triton
def test_results_are_fresh_tensors():
    segment, inputs = segment_of("residual, layer norm")
    run = TEMPLATES["rowwise"].build(segment, TEMPLATES["rowwise"].settings(segment)[0])
    with torch.no_grad():
        (first,), (second,) = run(*inputs), run(*inputs)
    assert first.data_ptr() != second.data_ptr()


REASONS = {
    "rowwise": {
        "bias": "only memory-intensive operators",
        "rotation": "aten.slice.Tensor|a view that changes|does not broadcast|cat",
    },
    "gemm": {"gelu": "one linear operator first", "feed forward": "one linear operator first"},
    "gemm_gemm": {"gelu after": "two linear operators", "gelu": "two linear operators"},
    "rotary": {"gelu": "only rotary embeddings"},
    "projection_rotary": {
        "rotation": "one linear operator",
        "query, key, value with head split": "one linear operator",
    },
    "split_gemm": {"bias": "rows of depth 40"},
    "cublas": {"gelu": "cuBLASLt's|one linear layer"},
    "inductor": {"bias": "nothing to fuse"},
}


@triton
@pytest.mark.parametrize(("template", "case"), [(t, c) for t, cases in REASONS.items() for c in cases])
def test_what_a_template_cannot_do_it_says(template, case):
    segment, _ = segment_of(case)
    assert re.search(REASONS[template][case], TEMPLATES[template].supports(segment) or "supported")


@triton
def test_sizes_that_do_not_fit_are_refused():
    wide = Fn(lambda m, x, y: m.n(m.a(x) + y), a=linear(16, 1040), n=nn.LayerNorm(1040))
    segment, _ = segment_of(("", "linear + add + layer_norm", wide, [(3, 16), (3, 1040)]))
    assert "a norm over 1040 columns, allowed: up to 1024" in TEMPLATES["gemm"].supports(segment)
    # The same without the norm is fine, and so is a transposed residual in no template.
    segment, _ = segment_of(("", "add", Fn(lambda m, x, y: x + y.t()), [(6, 4), (4, 6)]))
    assert "is a view that changes rows or columns" in TEMPLATES["rowwise"].supports(segment)
    segment, _ = segment_of(("", "add", Fn(lambda m, x, y: x + y), [(2, 9, 40), (2, 1, 40)]))
    assert "does not broadcast" in TEMPLATES["rowwise"].supports(segment)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's limit")
@triton
def test_the_interpreters_wrong_bfloat16_is_refused():
    for case in ("bias", "feed forward", "gelu", "rotation"):
        segment, _ = segment_of(case, torch.bfloat16)
        assert "bfloat16" in TEMPLATES[CASES[case][0]].supports(segment)


def test_triton_templates_say_why_the_cpu_cannot(monkeypatch):
    segment, _ = segment_of("gelu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert TEMPLATES["rowwise"].supports(segment) == "triton is not installed"


@pytest.mark.parametrize("case", ["residual, layer norm", "feed forward", "rotation of strided heads"])
def test_eager_runs_everything(case):
    segment, inputs = segment_of(case)
    assert TEMPLATES["eager"].supports(segment) is None
    assert TEMPLATES["eager"].settings(segment) == [()]
    with torch.no_grad():
        for a, b in zip(TEMPLATES["eager"].build(segment, ())(*inputs), segment.module(*inputs), strict=True):
            assert torch.equal(a, b)


def test_inductor_compiles_a_segment():
    segment, inputs = segment_of("both results of a residual")
    assert TEMPLATES["inductor"].supports(segment) is None
    settings = TEMPLATES["inductor"].settings(segment)
    with torch.no_grad():
        for setting in (settings[0], settings[-1]):
            for a, b in zip(
                TEMPLATES["inductor"].build(segment, setting)(*inputs), segment.module(*inputs), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_equal_segments_have_one_key_and_different_ones_do_not():
    keys = {case: segment_of(case)[0].key for case in CASES}
    assert keys["residual, layer norm"] == segment_of("residual, layer norm")[0].key
    same = [p for p in itertools.combinations(keys, 2) if keys[p[0]] == keys[p[1]]]
    assert same == []
