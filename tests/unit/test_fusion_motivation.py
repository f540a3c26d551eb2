"""Pairs of operators: what is compared in Figures 3 and 4 is the same computation."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from stof_kernels.fusion import costs, motivation

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize(
    ("operator", "wide"), [("bias_layernorm", False), ("gemm_layernorm", True), ("gemm_gemm", False)]
)
def test_pairs_are_what_they_are_called(operator, wide):
    graph, (x,) = motivation.pair(operator, 2, 8, 16, torch.float32, "cpu", seed=4, wide=wide)
    weights = dict(graph.graph_module.named_parameters())
    named = {name.split("model.")[-1]: w for name, w in weights.items()}
    if operator == "bias_layernorm":
        want = F.layer_norm(x + named["bias"], (16,), named["second.weight"], named["second.bias"])
    elif operator == "gemm_layernorm":
        assert x.shape[-1] == 64
        inner = F.linear(x, named["first.weight"], named["first.bias"])
        want = F.layer_norm(inner, (16,), named["second.weight"], named["second.bias"])
    else:
        assert named["first.weight"].shape == (64, 16)
        inner = F.linear(x, named["first.weight"], named["first.bias"])
        want = F.linear(inner, named["second.weight"], named["second.bias"])
    torch.testing.assert_close(graph.graph_module(x)[0], want)
    assert len(graph.ops) == 2


def test_sizes_are_the_eight_published_ones_in_order():
    assert motivation.SIZES[0] == (1, 128, 512)
    assert motivation.SIZES[-1] == (8, 4096, 1024)
    assert len(set(motivation.SIZES)) == 8


@triton
@pytest.mark.parametrize("operator", motivation.OPERATORS)
def test_the_four_ways_follow_the_measured_costs(operator, monkeypatch):
    """With made-up costs: tall tiles suit an operator alone, flat ones the pair."""

    def cost(self, segment, template, setting):
        if template == "inductor":
            return float("inf")
        self.built[segment.key, template, setting] = segment.module
        height = dict(setting).get("BM", 0)
        alone = len(segment.ops) == 1
        return 10.0 * len(segment.ops) if template == "eager" else 5.0 + (1 / (1 + height) if alone else height / 100)

    monkeypatch.setattr(costs.DeviceMeter, "cost", cost)
    graph, inputs = motivation.pair(operator, 1, 64, 32, torch.float32, "cpu")
    found = motivation.measure(graph, inputs, most=1000)
    assert set(found) == set(motivation.METHODS)
    assert found["detached"].us > found["fused"].us
    want = graph.graph_module(*inputs)[0]
    for way in found.values():
        if way.run is not None:
            torch.testing.assert_close(way.run()[0], want)
    assert found["tuned_after_fusion"] == found["fused"]
    alone = found["tuned_individually"]
    assert alone.us is None or alone.us >= found["fused"].us
    if operator != "gemm_gemm":
        assert alone.us > found["fused"].us
    else:
        assert "runs neither operator alone" in alone.how


def test_only_what_is_asked_for_is_measured(monkeypatch):
    seen = []

    def cost(self, segment, template, setting):
        seen.append(len(segment.ops))
        self.built[segment.key, template, setting] = segment.module
        return 1.0

    monkeypatch.setattr(costs.DeviceMeter, "cost", cost)
    graph, inputs = motivation.pair("bias_layernorm", 1, 16, 16, torch.float32, "cpu")
    assert set(motivation.measure(graph, inputs, methods=("detached",))) == {"detached"}
    assert set(seen) == {1}
    seen.clear()
    assert set(motivation.measure(graph, inputs, methods=("fused",))) == {"fused"}
    assert set(seen) == {2}
    with pytest.raises(ValueError, match="motivation: method 'apart', allowed: detached"):
        motivation.measure(graph, inputs, methods=("apart",))


def test_without_a_fused_kernel_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(motivation, "TEMPLATES", {name: motivation.TEMPLATES[name] for name in ("eager", "rotary")})
    graph, inputs = motivation.pair("gemm_gemm", 1, 16, 16, torch.float32, "cpu")
    found = motivation.measure(graph, inputs)
    assert found["detached"].us > 0
    assert found["fused"].us is None
    assert "rotary: " in found["fused"].how


def test_an_unknown_pair_is_one_line():
    with pytest.raises(ValueError, match="operator 'softmax', allowed: bias_layernorm, gemm_layernorm, gemm_gemm"):
        motivation.pair("softmax", 1, 1, 1, torch.float32, "cpu")


@triton
def test_a_search_without_time_still_measures_what_a_method_needs(monkeypatch):
    """The first fused kernels do not run; one that does is found however little time there is, and nothing more is tried."""
    tried = []

    def first_call(self, segment, template, setting, inputs):
        tried.append((len(segment.ops), template))
        if len(segment.ops) == 2 and template != "eager" and tried.count((2, template)) == 1:
            raise RuntimeError("no registers left")
        return segment.module, segment.module(*inputs)

    monkeypatch.setattr(costs.DeviceMeter, "_first_call", first_call)
    monkeypatch.setattr(
        motivation, "TEMPLATES", {name: motivation.TEMPLATES[name] for name in ("eager", "gemm", "split_gemm")}
    )
    graph, inputs = motivation.pair("gemm_layernorm", 1, 16, 128, torch.float32, "cpu")
    found = motivation.measure(graph, inputs, budget_s=0.0)
    assert all(math.isfinite(way.us) for way in found.values())
    fused = [template for operators, template in tried if operators == 2]
    assert fused[:3] == ["eager", "gemm", "split_gemm"]
    alone = [template for operators, template in tried if operators == 1]
    assert alone.count("eager") == 2
    assert len(tried) <= 9  # both defaults and one more of the pair, one or two of each operator, and its parameters


@triton
def test_nobody_waits_for_inductor_on_a_card(monkeypatch):
    """Out of time it is passed over, and a template behind it is still found."""

    def cost(self, segment, template, setting):
        self.clock.require()
        self.built[segment.key, template, setting] = segment.module
        return 2.0

    monkeypatch.setattr(costs.DeviceMeter, "cost", cost)
    monkeypatch.setattr(motivation, "_quick", lambda segment, template: template != "inductor")
    graph, inputs = motivation.pair("gemm_gemm", 1, 16, 32, torch.float32, "cpu")
    found = motivation.measure(graph, inputs, budget_s=0.0, methods=("fused",))
    assert found["fused"].how.startswith("gemm_gemm(")
