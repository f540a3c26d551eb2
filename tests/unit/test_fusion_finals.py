"""The last comparison: near choices are exchanged inside the program where a judge finds it faster, and the plan says so."""

from __future__ import annotations

import importlib.util
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stof_kernels.fusion import finals
from stof_kernels.fusion.assemble import _places, assemble
from stof_kernels.fusion.capture import capture
from stof_kernels.fusion.costs import Space
from stof_kernels.fusion.graph import build
from stof_kernels.fusion.plan import BlockPlan, Choice, FusionPlan
from stof_kernels.fusion.scheme import FusionScheme
from stof_kernels.fusion.segments import cut
from stof_kernels.fusion.templates import TEMPLATES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Layers(nn.Module):
    """Three times the same norm of a sum, so that one segment stands at three places."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(3)])

    def forward(self, x, y):
        for norm in self.norms:
            x = norm(x + y)
        return x


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A program whose segments run by `rowwise`, its plan, the segment's key, inputs, and three built choices."""
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path))
    torch.manual_seed(3)
    module = Layers().eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    inputs = [torch.randn(4, 16), torch.randn(4, 16)]
    graph = build(capture(module, tuple(inputs)))
    segment, template = cut(graph, [0, 1]), TEMPLATES["rowwise"]
    assert len(graph.ops) == 6
    choices = [Choice("rowwise", s, 1.0 + i) for i, s in enumerate(template.settings(segment)[:3])]
    built = {(segment.key, "rowwise", c.setting): template.build(segment, c.setting) for c in choices}
    plan = FusionPlan([BlockPlan(0, 2, 3, FusionScheme((2,)).encode(), (choices[0],))])
    return assemble(graph, plan, built), plan, segment.key, inputs, choices, built, module


class Fake:
    """A judge with its answers written down; it runs the program, as a real one does."""

    def __init__(self, program, inputs, answers):
        self.program, self.inputs, self.answers, self.seen = program, inputs, list(answers), []

    def faster(self):
        self.seen.append(self.program(*self.inputs)[0])
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def run_of(program, key):
    return getattr(program.function, program.calls[key]).run


def refined(tuned, answers, seconds=100.0):
    program, plan, key, inputs, choices, built, _ = tuned
    judge, lines = Fake(program, inputs, answers), []
    found = finals.refine(plan, program, {key: choices}, built, judge, time.perf_counter() + seconds, lines.append)
    return found, judge, lines


def test_one_segment_at_three_places_is_exchanged_at_all_of_them(tuned):
    program, _, key, inputs, choices, built, module = tuned
    plan, judge, _ = refined(tuned, [False, True])
    assert program.places == {key: [(0, 0)]}
    assert plan.blocks[0].choices == (choices[2],)
    assert run_of(program, key) is built[key, "rowwise", choices[2].setting]
    assert (plan.counts["finals"], plan.counts["exchanged"]) == (2, 1)
    want = module(*inputs)
    for got in (*judge.seen, program(*inputs)[0]):
        assert torch.allclose(got, want, atol=1e-5)


def test_what_is_not_faster_goes_back(tuned):
    program, _, key, _, choices, built, _ = tuned
    plan, judge, _ = refined(tuned, [False, False])
    assert len(judge.seen) == 2
    assert plan.blocks[0].choices == (choices[0],)
    assert run_of(program, key) is built[key, "rowwise", choices[0].setting]


def test_what_raises_goes_back_and_ends_the_comparison(tuned):
    program, _, key, _, choices, built, _ = tuned
    plan, judge, lines = refined(tuned, [RuntimeError("no capture\nat all"), True])
    assert len(judge.seen) == 1
    assert plan.blocks[0].choices == (choices[0],)
    assert run_of(program, key) is built[key, "rowwise", choices[0].setting]
    assert lines[0] == "finals: ended by RuntimeError: no capture"


def test_a_choice_that_has_won_stays_when_a_later_one_raises(tuned):
    program, _, key, _, choices, built, _ = tuned
    plan, _, _ = refined(tuned, [True, RuntimeError("gone")])
    assert plan.blocks[0].choices == (choices[1],)
    assert run_of(program, key) is built[key, "rowwise", choices[1].setting]


def test_out_of_time_nothing_is_tried(tuned):
    plan, judge, _ = refined(tuned, [True], seconds=-1.0)
    assert judge.seen == []
    assert plan.counts["finals"] == 0


def test_a_segment_that_differs_between_layers_has_no_place():
    keys = {(0, 0): {"a"}, (0, 1): {"b", "c"}, (1, 0): {"a"}, (1, 1): {"c"}}
    assert _places(keys) == {"a": [(0, 0), (1, 0)]}


def test_finalists_are_near_the_best_and_few():
    costs = [6.1, 4.0, 4.9, 6.0, *(4.5 + i / 100 for i in range(20))]
    measured = [Choice("gemm", (("BM", i),), cost) for i, cost in enumerate(costs)]
    found = finals.finalists(Space(None, [], measured=measured))
    assert [c.cost_us for c in found] == [4.0, *(4.5 + i / 100 for i in range(13))]
    few = finals.finalists(Space(None, [], measured=measured[:4]))
    assert [c.cost_us for c in few] == [4.0, 4.9, 6.0]


def test_a_search_keeps_what_it_has_measured():
    class Meter:
        def cost(self, segment, template, setting):
            return math.inf if template == "broken" else float(dict(setting)["n"])

    waiting = [("gemm", (("n", 3),)), ("broken", (("n", 1),)), ("gemm", (("n", 2),))]
    space = Space(None, waiting)
    space.sample(Meter(), 5)
    assert [c.cost_us for c in space.measured] == [3.0, 2.0]
    assert space.best == Choice("gemm", (("n", 2),), 2.0)


def test_an_operator_one_by_one_is_a_choice_like_any_other(tuned):
    program, _, key, inputs, choices, built, module = tuned
    graph = build(capture(module, tuple(inputs)))
    eager = TEMPLATES["eager"].build(cut(graph, [0, 1]), ())
    assert program.exchange(key, eager) is built[key, "rowwise", choices[0].setting]
    assert torch.allclose(program(*inputs)[0], module(*inputs), atol=1e-6)
    assert program.exchange(key, built[key, "rowwise", choices[1].setting]) is eager
    assert torch.allclose(program(*inputs)[0], module(*inputs), atol=1e-5)
    # One that is chosen is in line, unless it may be exchanged.
    alone = FusionPlan([BlockPlan(0, 2, 3, FusionScheme((2,)).encode(), (Choice(),))])
    assert assemble(graph, alone).places == {}
    apart = assemble(graph, alone, {(key, "eager", ()): eager}, {key})
    assert apart.places == {key: [(0, 0)]}
    apart.exchange(key, built[key, "rowwise", choices[1].setting])
    assert torch.allclose(apart(*inputs)[0], module(*inputs), atol=1e-5)


def test_second_choices_come_first_and_dear_segments_before_cheap_ones():
    near = {k: [Choice(k, (("n", i),), 9.0) for i in range(n)] for k, n in (("a", 3), ("b", 2), ("c", 1), ("gone", 2))}
    plan = FusionPlan(
        [BlockPlan(0, 3, 2, FusionScheme((1, 1, 1)).encode(), tuple(Choice("x", (), c) for c in (1.0, 5.0, 2.0)))]
    )

    placed = SimpleNamespace(places={"a": [(0, 0)], "b": [(0, 1)], "c": [(0, 2)]})
    order = [(key, dict(choice.setting)["n"]) for key, choice in finals._in_order(plan, placed, near)]
    assert order == [("b", 1), ("a", 1), ("a", 2)]
