"""An assembled program holds hardly more than the tensors that are still to be read."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import stof_kernels as stof
from live_bytes import Fewest, LiveBytes
from stof_kernels.fusion import blocks, engine
from stof_kernels.fusion.assemble import assemble
from stof_kernels.fusion.capture import capture
from stof_kernels.fusion.graph import build
from stof_kernels.fusion.plan import BlockPlan, Choice, FusionPlan
from stof_kernels.fusion.scheme import FusionScheme
from stof_kernels.fusion.segments import cut
from stof_kernels.fusion.templates import TEMPLATES
from stof_kernels.fusion.templates.library import Launch

WIDTH, LENGTH = 32, 40


class Layer(nn.Module):
    """As in BERT: projections, attention, and a feed-forward block, each with its residual and norm."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.a, self.b = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.n, self.m = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x, mask):
        q, k, v = (p(x).view(*x.shape[:2], -1, 16).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = self.n(x + self.o(stof.sparse_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape)))
        return self.m(x + self.b(nn.functional.gelu(self.a(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(4)])

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask)
        return x


@pytest.fixture
def captured(tmp_path, monkeypatch):
    """The graph of a model of four layers, and its flat inputs."""
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = Model().eval().requires_grad_(False)
    mask = stof.SparseMask.from_pattern(stof.masks.sliding_window(5), LENGTH, LENGTH)
    args = (torch.randn(2, LENGTH, WIDTH), mask)
    found = capture(model, args)
    found.signature.plan_masks(args, {})
    return build(found), found.signature.tensors(args, {})


def fused_plan(graph):
    """Projections | attention | linear + add + norm | linear + gelu | linear | add + norm, in every layer."""
    lengths = (1, 1, 3, 2, 1, 2)
    names = ("gemm", "eager", "gemm", "gemm", "eager", "rowwise")
    (block,) = blocks.split(graph)
    choices, at = [], block.start
    for length, name in zip(lengths, names, strict=True):
        segment = cut(graph, range(at, at + length))
        assert TEMPLATES[name].supports(segment) is None
        choices.append(Choice(name, TEMPLATES[name].settings(segment)[0]))
        at += length
    word = FusionScheme(lengths).encode()
    return FusionPlan([BlockPlan(block.start, block.period, block.count, word, tuple(choices))])


def measured(program, flat):
    """Peak of live bytes of a call, and the fewest that the program's order allows."""
    constants = program.constants.current(flat)
    fewest = Fewest(program.function)
    fewest.run(*flat, *program.weights, *constants)
    with LiveBytes([*flat, *program.weights, *constants]) as live:
        program(*flat)
    return live.peak, fewest.peak


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_a_program_holds_what_is_still_read(captured, monkeypatch, fused, apart):
    monkeypatch.setattr(Launch, "__call__", lambda self, grid, *arguments: None)  # the interpreter copies what it reads
    if fused and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    graph, flat = captured
    plan = fused_plan(graph) if fused else engine.eager_plan(graph)
    keys = {cut(graph, [i]).key for i in range(len(graph.ops))} if apart else ()
    with torch.no_grad():
        peak, fewest = measured(assemble(graph, plan, apart=keys), flat)
    activation = 2 * LENGTH * WIDTH * 4
    # Four activations of the feed-forward block's width and its input; without fusion GELU's result stands beside them.
    assert fewest == (6 if fused else 9) * activation
    assert fewest <= peak <= 1.15 * fewest


def test_what_is_held_needlessly_is_counted():
    kept = []

    def doubled(x, keep):
        y = x + 1.0
        if keep:
            kept.append(y)
        y = y * 2.0
        return y + 1.0

    x = torch.randn(1000)
    for keep, tensors in ((False, 2), (True, 3)):
        with LiveBytes([x]) as live:
            doubled(x, keep)
        assert live.peak == tensors * x.nbytes


class Biased(nn.Module):
    """As in T5: all layers add one bias that a small table and the distance of positions give."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 2)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x, mask):
        at = torch.arange(LENGTH)
        bias = self.table((at[None, :] - at[:, None]).clamp(-3, 3) + 3).permute(2, 0, 1).unsqueeze(0)
        for layer in self.layers:
            h = layer(x).view(*x.shape[:2], 2, 16).transpose(1, 2)
            each = bias.expand(len(x), -1, -1, -1)
            x = stof.sparse_attention(h, h, h, mask, bias=each).transpose(1, 2).reshape(x.shape)
        return x


def test_layers_share_one_bias_and_follow_its_table():
    stof.kernels.raw.load()
    torch.manual_seed(1)
    model = Biased().eval().requires_grad_(False)
    mask = stof.SparseMask.from_pattern(stof.masks.sliding_window(9), LENGTH, LENGTH)
    args = (torch.randn(2, LENGTH, WIDTH), mask)
    found = capture(model, args)
    graph, flat = build(found), found.signature.tensors(args, {})
    with torch.no_grad():
        program = assemble(graph, engine.eager_plan(graph))
        before = program(*flat)[0]
        torch.testing.assert_close(before, model(*args))
        values = [t for t in program.constants.current(flat) if t.dim() == 4]
        assert len(values) == 3
        assert len({t.data_ptr() for t in values}) == 1
        assert values[0].untyped_storage().nbytes() == 2 * LENGTH * LENGTH * 4
        assert values[0].stride()[2:] == (LENGTH, 1)
        model.table.weight.mul_(-2.0)
        after = program(*flat)[0]
        torch.testing.assert_close(after, model(*args))
        assert not torch.allclose(after, before, atol=1e-3)
        assert [t.data_ptr() for t in program.constants.current(flat) if t.dim() == 4] == [values[0].data_ptr()] * 3
