"""`optimize` and the torch.compile backend: right, fresh, falling back with a reason, weights shared and followed."""

from __future__ import annotations

import copy
import importlib.util
import re
import warnings

import pytest
import torch
from torch import nn

import stof_kernels as stof
from stof_kernels.fusion import FallbackWarning, blocks, engine, graph, optimize
from stof_kernels.fusion.assemble import assemble
from stof_kernels.fusion.capture import capture
from stof_kernels.fusion.costs import Clock
from stof_kernels.fusion.search import Search, SearchSettings
from stof_kernels.fusion.templates import TEMPLATES
from stof_kernels.integrations import dynamo

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
transformers = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.n, self.m = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, mask):
        q, k, v = (p(x).view(*x.shape[:2], -1, 16).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = stof.sparse_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape)
        x = self.n(x + self.o(attended))
        return self.m(x + self.b(nn.functional.gelu(self.a(x))))


class Model(nn.Module):
    """Two layers and a table that depends on weights only."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x, mask):
        table = torch.exp(self.scale) + 1.0
        for layer in self.layers:
            x = layer(x, mask)
        return {"out": x * table, "first": x[:, 0]}


def make(seed=0):
    torch.manual_seed(seed)
    model = Model().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (1.5 * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3))
    return model.requires_grad_(False)


def inputs(seed=0, n=24, width=3):
    x = torch.randn(2, n, 32, generator=torch.Generator().manual_seed(seed))
    return x, stof.SparseMask.from_pattern(stof.masks.sliding_window(width), n, n)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path))
    stof.kernels.raw.load()
    return tmp_path


def rising_times():
    """A stand-in for `time_us`: what is timed first, the tuned program, is the fastest."""
    times = iter(range(1, 10**6))
    return lambda run, args, device: float(next(times))


@pytest.fixture
def always_faster(monkeypatch):
    """Costs made up so that every fused segment wins, also at these sizes and in the interpreter."""

    def cost(self, segment, template, setting):
        return 10.0 * len(segment.ops) if template == "eager" else 9.0 * len(segment.ops) ** 0.5

    monkeypatch.setattr(engine.DeviceMeter, "cost", cost)
    monkeypatch.setattr(engine, "time_us", rising_times())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """One model tuned for real: Inductor segments, measured costs."""
    patch = pytest.MonkeyPatch()
    patch.setattr(engine, "time_us", rising_times())
    patch.setattr(
        type(TEMPLATES["inductor"]), "settings", lambda self, segment: [()]
    )  # the defaults: fewer compilations
    patch.setenv("STOF_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    stof.kernels.raw.load()
    model = make()
    try:
        yield model, optimize(model, inputs(), budget_s=300, templates=("inductor",))
    finally:
        patch.undo()


def close(a, b, tol=1e-4):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=tol, atol=tol)


# ---- right -----------------------------------------------------------------------------------------------------------


def test_a_real_search_fuses_and_the_result_is_right(compiled):
    model, fast = compiled
    assert fast.plan.use == "plan"
    used = {c.template for block in fast.plan.blocks for c in block.choices}
    assert used == {"eager", "inductor"}
    for seed, width in ((0, 3), (1, 9)):
        x, mask = inputs(seed, width=width)
        close(fast(x, mask), model(x, mask))
    assert not fast.fallbacks
    assert {"planning", "encoding", "decoding", "reward", "building", "measuring", "total"} <= fast.plan.seconds.keys()


@triton
def test_triton_plans_are_right(always_faster):
    model = make()
    fast = optimize(model, inputs(), templates=("rowwise", "gemm", "gemm_gemm", "rotary"))
    used = {c.template for block in fast.plan.blocks for c in block.choices}
    assert used & {"gemm", "gemm_gemm"}
    x, mask = inputs(5)
    close(fast(x, mask), model(x, mask))


@triton
@transformers
@pytest.mark.parametrize("id", ["bert_base", "gpt2", "llama", "t5", "vit"])
def test_the_six_models_with_every_segment_fused(id, always_faster):
    from stof_kernels.integrations import models

    model = models.build(id, 17, size="tiny")
    kwargs = {**models.inputs(id, 1, 17, size="tiny"), "stof_mask": models.masks(id, 17)}
    fast = optimize(model, kwargs, templates=("rowwise", "gemm", "rotary"))
    used = [c.template for block in fast.plan.blocks for c in block.choices]
    assert "gemm" in used
    assert ("rotary" in used) == (id == "llama")
    kwargs.update(models.inputs(id, 1, 17, size="tiny", seed=9))
    with torch.no_grad():
        want, got = model(**kwargs), fast(**kwargs)
    assert type(got) is type(want)
    bound = 1e-4 * want.last_hidden_state.abs().max()
    assert (got.last_hidden_state - want.last_hidden_state).abs().max() <= bound
    # What the comparison is worth: another mask, or any vector of weights lost, is far outside it.
    with torch.no_grad():
        other = models.masks(id, 17, "sliding_window")
        assert (
            fast(**{**kwargs, "stof_mask": other}).last_hidden_state - want.last_hidden_state
        ).abs().max() > 100 * bound
        for name, vector in vectors(model):
            kept = vector.clone()
            lost = fast(**kwargs).last_hidden_state if vector.zero_() is not None else None
            vector.copy_(kept)
            assert (lost - want.last_hidden_state).abs().max() > 10 * bound, name
    assert not fast.fallbacks


def vectors(model):
    """Some biases and norm weights of the first layer. A bias of keys moves all scores of a row alike and cannot show."""
    named = [(n, p) for n, p in model.named_parameters() if p.dim() == 1 and ".0." in n]
    return [(n, p) for n, p in named if "key.bias" not in n and "k_proj.bias" not in n][::4]


def test_a_wrong_kernel_is_never_used(monkeypatch, always_faster):
    """The costs above skip the check of candidates; what is assembled is compared with the eager operators all the same."""

    def wrong(self, segment, setting):
        return lambda *args: [t + 0.5 for t in segment.module(*args)]

    monkeypatch.setattr(type(TEMPLATES["inductor"]), "build", wrong)
    model = make()
    with pytest.warns(FallbackWarning, match="the tuned outputs differ by"):
        fast = optimize(model, inputs(), templates=("inductor",))
    x, mask = inputs()
    assert torch.equal(fast(x, mask)["out"], model(x, mask)["out"])


@triton
def test_half_precision_is_no_worse_than_eager(always_faster):
    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = nn.Linear(48, 96), nn.Linear(96, 48), nn.LayerNorm(48)

        def forward(self, x):
            return self.n(x + self.b(nn.functional.gelu(self.a(x))))

    torch.manual_seed(3)
    half = nn.Sequential(FeedForward(), FeedForward(), FeedForward()).half().eval().requires_grad_(False)
    exact, x = copy.deepcopy(half).float(), torch.randn(2, 40, 48).half()
    fast = optimize(half, (x,), templates=("rowwise", "gemm"))
    assert {c.template for block in fast.plan.blocks for c in block.choices} >= {"gemm"}
    error = (fast(x).float() - exact(x.float())).abs().max()
    assert error <= max(5e-3, 1.25 * (half(x).float() - exact(x.float())).abs().max())


def test_a_measured_candidate_that_is_wrong_is_refused(monkeypatch):
    def wrong(self, segment, setting):
        return lambda *args: [t + 0.5 for t in segment.module(*args)]

    monkeypatch.setattr(type(TEMPLATES["inductor"]), "build", wrong)
    lines = []
    fast = optimize(make(), inputs(), templates=("inductor",), progress=lines.append)
    assert fast.plan.counts["refused"] > 0
    assert any(line.startswith("refused: ") and "differs by" in line for line in lines)
    assert {c.template for block in fast.plan.blocks for c in block.choices} == {"eager"}


def test_a_template_that_crashes_is_refused(monkeypatch):
    def crash(self, segment, setting):
        raise MemoryError("no room\nfor this")

    monkeypatch.setattr(type(TEMPLATES["inductor"]), "build", crash)
    fast = optimize(make(), inputs(), templates=("inductor",))
    assert {c.template for block in fast.plan.blocks for c in block.choices} == {"eager"}


# ---- weights, aliases ------------------------------------------------------------------------------------------------


def test_weights_are_the_models_own_and_later_changes_are_seen(compiled):
    model, fast = compiled
    own = {p.data_ptr() for p in model.parameters()}
    assert {w.data_ptr() for w in fast._program.weights} <= own
    x, mask = inputs(2)
    before = fast(x, mask)["out"].clone()
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        for name in ("layers.1.a.bias", "layers.0.q.weight", "scale"):
            model.get_parameter(name).mul_(1.7)
            close(fast(x, mask), model(x, mask))
            assert (fast(x, mask)["out"] - before).abs().max() > 1e-3, name
    finally:
        fast.load_state_dict(kept)
    torch.testing.assert_close(fast(x, mask)["out"], before, rtol=0, atol=0)
    assert fast.state_dict().keys() == model.state_dict().keys()


def test_results_of_two_calls_do_not_alias(compiled):
    _, fast = compiled
    x, mask = inputs(3)
    first = fast(x, mask)
    copy = {k: v.clone() for k, v in first.items()}
    second = fast(*inputs(4))
    assert all(torch.equal(first[k], copy[k]) for k in first)
    assert all(first[k].data_ptr() != second[k].data_ptr() for k in first)


def test_a_result_that_depends_on_weights_only_is_a_copy(always_faster):
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.l = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)

        def forward(self, x):
            return torch.relu(self.l(x) + 1.0), self.w * 2

    model = Tables().eval().requires_grad_(False)
    fast = optimize(model, (torch.randn(3, 8),), templates=())
    table = fast(torch.randn(3, 8))[1]
    table.zero_()
    torch.testing.assert_close(fast(torch.randn(3, 8))[1], model.w * 2)


def test_inference_mode_at_any_time(always_faster):
    """Constants made in one mode are written again in the other."""
    for first in (True, False):
        model = make()
        with torch.inference_mode(first):
            fast = optimize(model, inputs(), templates=(), use_cache=False)
        for mode, factor in ((not first, 2.0), (first, 0.5)):
            model.scale.mul_(factor)
            with torch.inference_mode(mode):
                close(fast(*inputs(3)), model(*inputs(3)))


def test_a_view_of_a_weight_is_no_copy_and_follows_other_memory(always_faster):
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.l = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 8)

        def forward(self, x):
            return self.l(torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1))

    model, x = Token().eval().requires_grad_(False), torch.randn(3, 2, 8)
    fast = optimize(model, (x,), templates=(), use_cache=False)
    kept = model.token.data
    before = kept.clone()
    for data in (torch.randn(1, 1, 8), torch.randn(1, 1, 8)):
        model.token.data = data
        torch.testing.assert_close(fast(x), model(x))
    assert torch.equal(kept, before)  # the memory that it had before is someone else's now
    (view,) = fast._program.constants.current(())
    assert view.data_ptr() == model.token.data_ptr()


# ---- falling back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["shape", "dtype", "structure", "training", "gradient", "autocast"])
def test_another_call_runs_the_model_and_says_why(change):
    model = make()
    fast = engine.Optimized(model, *eager_program(model))
    x, mask = inputs()
    args, reason = (x, mask), ""
    context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=change == "autocast")
    if change == "shape":
        args, reason = inputs(n=20), "a tensor (2, 20, 32)"
    elif change == "dtype":
        model.to(torch.bfloat16)
        args, reason = (x.bfloat16(), mask), "torch.bfloat16"
    elif change == "structure":
        args, reason = (x, mask.to_dense()), "another structure|an argument is"
    elif change == "training":
        model.train()
        reason = "training mode"
    elif change == "gradient":
        model = make()
        fast = engine.Optimized(model, *eager_program(model))
        model.requires_grad_(True)
        reason = "gradients are wanted"
    else:
        reason = "autocast is on"
    with pytest.warns(FallbackWarning) as caught, context:
        got, want = fast(*args), model(*args)
    assert re.search(reason.replace("(", r"\(").replace(")", r"\)"), str(caught[0].message))
    assert torch.equal(got["out"], want["out"])
    with warnings.catch_warnings(), context:
        warnings.simplefilter("error")
        fast(*args)  # said once
    assert sum(fast.fallbacks.values()) == 2


def eager_program(model):
    captured = capture(model, inputs())
    found = graph.build(captured)
    plan = engine.eager_plan(found)
    return captured, assemble(found, plan), plan


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_a_model_that_cannot_be_captured_runs_as_it_is():
    with pytest.warns(FallbackWarning, match="running the model as it is: capture: ") as caught:
        fast = optimize(Branches().eval(), (torch.ones(3),))
    assert "\n" not in str(caught[0].message)
    assert torch.equal(fast(-torch.ones(3)), -2 * torch.ones(3))


def test_a_slower_plan_is_not_used(monkeypatch):
    times = iter(range(10**6, 0, -1))
    monkeypatch.setattr(engine, "time_us", lambda run, args, device: float(next(times)))
    model = make()
    with pytest.warns(FallbackWarning, match="no plan was faster"):
        fast = optimize(model, inputs(), templates=())
    x, mask = inputs(8)
    assert torch.equal(fast(x, mask)["out"], model(x, mask)["out"])


def test_without_time_every_operator_runs_eagerly(monkeypatch):
    monkeypatch.setattr(engine, "time_us", rising_times())
    fast = optimize(make(), inputs(), budget_s=0)
    assert {c.template for block in fast.plan.blocks for c in block.choices} == {"eager"}


def test_wrong_arguments_are_one_line():
    with pytest.raises(TypeError, match=r"optimize: model is int, allowed: a torch\.nn\.Module"):
        optimize(3, ())
    with pytest.raises(TypeError, match="optimize: example_inputs is Tensor, allowed: a tuple, list or dict"):
        optimize(make(), torch.ones(3))


# ---- cache -----------------------------------------------------------------------------------------------------------


def test_the_second_time_the_plan_comes_from_disk(monkeypatch, folder, always_faster):
    first = optimize(make(), inputs(), templates=())
    (file,) = (folder / "plans").iterdir()
    monkeypatch.setattr(engine, "search", lambda *args: pytest.fail("searched again"))
    again = optimize(make(1), inputs(3), templates=())
    assert again.plan.blocks == first.plan.blocks
    monkeypatch.undo()
    monkeypatch.setenv("STOF_CACHE_DIR", str(folder))
    file.write_text("{damaged")
    assert optimize(make(), inputs(), templates=()).plan.blocks[-1].period == first.plan.blocks[-1].period


def test_a_search_that_is_interrupted_leaves_nothing_behind(monkeypatch, folder):
    def interrupt(self, segment, template, setting):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.DeviceMeter, "cost", interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimize(make(), inputs())
    assert not list(folder.glob("plans/*"))


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def test_the_compile_backend_is_right_and_follows_weights_and_masks(always_faster):
    dynamo.register()
    dynamo.register()
    torch._dynamo.reset()
    model = make()
    fast = torch.compile(model, backend="stof", dynamic=False, fullgraph=True, options={"templates": ("rowwise",)})
    with torch.no_grad():
        for seed, width in ((0, 3), (1, 3), (2, 9)):
            x, mask = inputs(seed, width=width)
            close(fast(x, mask), model(x, mask))
        model.scale.mul_(2.0)
        model.layers[0].a.weight.mul_(0.5)
        close(fast(x, mask), model(x, mask))


def test_the_compile_backend_says_why_it_steps_aside():
    dynamo.register()
    torch._dynamo.reset()
    with pytest.warns(FallbackWarning, match="gradients are wanted"):
        out = torch.compile(nn.Linear(4, 4), backend="stof")(torch.ones(2, 4))
    out.sum().backward()
    torch._dynamo.reset()
    layer = nn.Linear(4, 4).requires_grad_(False)
    fast = torch.compile(layer, backend="stof", dynamic=True)
    with pytest.warns(FallbackWarning, match="sizes are symbolic"):
        got = fast(torch.ones(3, 4))
    torch.testing.assert_close(got, layer(torch.ones(3, 4)))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="option 'budget' is unknown, allowed: budget_s, samples"):
        torch.compile(layer, backend="stof", options={"budget": 1})(torch.ones(2, 4))


def test_search_runs_on_blocks_in_order():
    found = graph.build(capture(make(), inputs()))
    parts = blocks.split(found)
    assert [b.count for b in parts if b.count > 1] == [2]
    assert parts[0].start == 0
    assert sum(b.period * b.count for b in parts) == len(found.ops)

    class Free:
        def cost(self, segment, template, setting):
            return 1.0

    plan = Search(found, parts, SearchSettings(templates=()), Free(), Clock(1e9)).run()
    assert [b.start for b in plan.blocks] == [b.start for b in parts]
