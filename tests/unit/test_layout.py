"""T5's position bias in rows, for compilers that read it where it lies: the same numbers, another place in memory."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("transformers")

from stof_kernels.fusion.capture import capture
from stof_kernels.integrations import models, variants
from stof_kernels.integrations.layout import keep_bias_in_rows
from stof_kernels.integrations.variants import NATIVE, Case

CASE = Case("t5", 2, 96, size="tiny")
IN_ROWS = torch.ops.stof_kernels.in_rows.default


@pytest.fixture
def t5():
    return variants.build(CASE, NATIVE), variants.arguments(CASE, NATIVE)


def forward(model, given):
    with torch.no_grad():
        return model(**given).last_hidden_state


def test_the_bias_is_the_same_with_its_keys_side_by_side(t5):
    model, given = t5
    tables = [layer for layer in model.modules() if getattr(layer, "has_relative_attention_bias", False)]
    assert len(tables) == 2  # one a stack
    want, before = forward(model, given), [table.compute_bias(5, 7) for table in tables]
    for _ in range(2):
        keep_bias_in_rows(model)
    for table, bias in zip(tables, before, strict=True):
        assert bias.stride(-1) == bias.shape[1]
        assert len(table.relative_attention_bias._forward_hooks) == 1
        assert table.compute_bias(5, 7)[0].is_contiguous()
        assert torch.equal(table.compute_bias(5, 7), bias)
    assert torch.equal(forward(model, given), want)


def test_a_captured_graph_lays_it_out_once_a_stack(t5):
    model, given = t5
    assert not any(node.target is IN_ROWS for node in capture(model, (), given).graph_module.graph.nodes)
    keep_bias_in_rows(model)
    laid = [node for node in capture(model, (), given).graph_module.graph.nodes if node.target is IN_ROWS]
    assert len(laid) == 2
    for bias in laid:
        while len(bias.users) == 1:
            (bias,) = bias.users
        assert bias.meta["val"][0].is_contiguous()
        assert len(bias.users) == 2  # every layer of the stack reads that one


def test_it_is_compiled_once_with_the_model(t5):
    model, given = t5
    want = forward(model, given)
    keep_bias_in_rows(model)
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    for _ in range(2):
        assert torch.allclose(forward(compiled, given), want, atol=1e-5)
    assert backend.frame_count == 1
    assert sum("in_rows" in str(node.target) for node in backend.graphs[0].graph.nodes) == 2


def test_a_model_without_such_a_table_is_left_alone():
    model = models.build("bert_base", 96, NATIVE, size="tiny")
    keep_bias_in_rows(model)
    assert not any(module._forward_hooks for module in model.modules())
