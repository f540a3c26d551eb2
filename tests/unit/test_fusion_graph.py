"""Capture, operators and repeated layers of the six models, and what capture has to refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import stof_kernels as stof
from stof_kernels.fusion import graph, repeats
from stof_kernels.fusion.capture import CaptureError, capture, capture_graph
from stof_kernels.fusion.graph import Kind
from stof_kernels.fusion.inputs import Mismatch

pytest.importorskip("transformers")

from stof_kernels.integrations import models
from stof_kernels.integrations.transformers import Masks

LENGTH = 48


def example(id, seed=0, batch=1, **kwargs):
    mask = models.masks(id, LENGTH)
    return {**models.inputs(id, batch, LENGTH, size="tiny", seed=seed, **kwargs), "stof_mask": mask}


def replay(captured, kwargs):
    with torch.no_grad():
        return captured.unflatten(captured.graph_module(*captured.signature.tensors((), kwargs)))


def build_graph(id, layers=None, **options):
    size = dataclasses.replace(models.TINY, layers=layers) if layers else "tiny"
    model = models.build(id, LENGTH, size=size, **options)
    kwargs = example(id) if options.get("attention", "stof") == "stof" else models.inputs(id, 1, LENGTH, size="tiny")
    return model, graph.build(capture(model, (), kwargs))


# ---- capture ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["bert_base", "gpt2", "llama", "t5", "vit"])
def test_the_captured_graph_is_the_model_bit_for_bit_and_shares_its_weights(id):
    model = models.build(id, LENGTH, size="tiny")
    captured = capture(model, (), example(id))
    other = example(id, seed=7)
    with torch.no_grad():
        want = model(**other)
    got = replay(captured, other)
    assert type(got) is type(want)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    own = {id_ for id_ in map(id_of, model.parameters())}
    assert {id_of(p) for p in captured.graph_module.parameters()} <= own


def id_of(tensor):
    return tensor.data_ptr(), tuple(tensor.shape)


def test_another_mask_replays_the_same_graph_even_where_the_example_used_one_twice():
    model = models.build("t5", LENGTH, size="tiny")
    kwargs = example("t5")
    encoder = kwargs["stof_mask"].encoder
    captured = capture(model, (), {**kwargs, "stof_mask": Masks(encoder, encoder, encoder)})
    window = stof.SparseMask.from_pattern(stof.masks.sliding_window(2), LENGTH, LENGTH)
    three = Masks(encoder, kwargs["stof_mask"].decoder, window)
    with torch.no_grad():
        want = model(**{**kwargs, "stof_mask": three}).last_hidden_state
    assert torch.equal(replay(captured, {**kwargs, "stof_mask": three}).last_hidden_state, want)


def test_a_call_of_another_shape_dtype_or_structure_is_a_mismatch():
    model = models.build("vit", LENGTH, size="tiny")
    kwargs = example("vit")
    captured = capture(model, (), kwargs)
    pixels = kwargs["pixel_values"]
    with pytest.raises(Mismatch, match=r"a tensor \(2, 3, 96, 96\).*captured was a tensor \(1, 3, 96, 96\)"):
        captured.signature.tensors((), {**kwargs, "pixel_values": pixels.repeat(2, 1, 1, 1)})
    with pytest.raises(Mismatch, match="float64"):
        captured.signature.tensors((), {**kwargs, "pixel_values": pixels.double()})
    with pytest.raises(Mismatch, match="another structure"):
        captured.signature.tensors((), {"pixel_values": pixels})
    mask = stof.SparseMask.from_pattern(stof.masks.causal(), 16, 16)
    with pytest.raises(Mismatch, match="a mask of 16 x 16"):
        captured.signature.tensors((), {**kwargs, "stof_mask": mask})


def test_a_model_in_training_mode_is_refused():
    model = models.build("bert_base", LENGTH, size="tiny")
    with pytest.raises(CaptureError, match=r"training mode, allowed: inference \(model\.eval\(\)\)"):
        capture(model.train(), (), example("bert_base"))


class Branches(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Writes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(3))

    def forward(self, x):
        return x + self.state.add_(1)


@pytest.mark.parametrize("module", [Branches(), Writes()])
def test_what_cannot_be_captured_is_one_clear_line(module):
    with pytest.raises(CaptureError, match=r"^capture: ") as caught:
        capture(module.eval(), (torch.ones(3),))
    assert "\n" not in str(caught.value)


def test_a_result_that_is_no_tensor_and_no_plain_value_is_refused():
    model = models.build("gpt2", LENGTH, size="tiny")
    with pytest.raises(CaptureError, match=r"returns a DynamicCache, allowed: .*use_cache=False"):
        capture(model, (), {**example("gpt2"), "use_cache": True})

    class Plain(torch.nn.Module):
        def forward(self, x):
            return {"out": x + 1, "name": "plain", "none": None, "pair": (x * 2, 3)}

    captured = capture(Plain().eval(), (torch.ones(2),))
    got = captured.unflatten(captured.graph_module(torch.zeros(2)))
    assert (got["name"], got["none"], got["pair"][1]) == ("plain", None, 3)
    assert torch.equal(got["out"], torch.ones(2))


def test_in_place_addition_to_a_temporary_becomes_functional():
    class Adds(torch.nn.Module):
        def forward(self, x):
            y = x * 2
            y.add_(x)
            return y * y

    module = Adds().eval()
    x = torch.randn(4)
    captured = capture(module, (x,))
    assert torch.equal(captured.unflatten(captured.graph_module(x)), module(x))


def test_dynamo_graphs_are_read_by_the_same_importer():
    model = models.build("gpt2", LENGTH, size="tiny")
    seen = []

    def backend(graph_module, inputs):
        captured = capture_graph(graph_module, inputs)
        seen.append(graph.build(captured))
        return captured.graph_module

    torch._dynamo.reset()
    kwargs = example("gpt2")
    with torch.no_grad():
        out = torch.compile(model, backend=backend, fullgraph=True)(**kwargs).last_hidden_state
        assert torch.equal(out, model(**kwargs).last_hidden_state)
    (found,) = seen
    assert [r.count for r in repeats.find(found)] == [2]
    assert found.captured.weights


# ---- operators and layers --------------------------------------------------------------------------------------------

LAYERS = {
    "bert_base": (
        12,
        ["linear x3 | attention | linear | add | layer_norm | linear | gelu | linear | add | layer_norm"],
    ),
    "bert_large": (
        24,
        ["linear x3 | attention | linear | add | layer_norm | linear | gelu | linear | add | layer_norm"],
    ),
    "gpt2": (12, ["linear | attention | linear | add | layer_norm | linear | gelu_tanh | linear | add | layer_norm"]),
    "llama": (
        24,
        [
            "linear x3 | rope | rope | attention | linear | add | rms_norm | linear x2 | silu | mul | linear | add | "
            "rms_norm"
        ],
    ),
    "t5": (
        12,
        [
            "linear x3 | attention | linear | add | rms_norm | linear | relu | linear | add | rms_norm",
            "linear x3 | attention | linear | add | rms_norm | linear | linear x2 | attention | linear | add | rms_norm | "
            "linear | relu | linear | add | rms_norm",
        ],
    ),
    "vit": (12, ["linear x3 | attention | linear | add | layer_norm | linear | gelu | linear | add | layer_norm"]),
}


@pytest.mark.parametrize("id", LAYERS)
def test_all_layers_are_found_by_structure(id):
    depth, layers = LAYERS[id]
    _, found = build_graph(id, layers=depth)
    layer_runs = repeats.find(found)
    assert [r.count for r in layer_runs] == [depth] * len(layers)
    for repeat, expected in zip(layer_runs, layers, strict=True):
        for i in (0, depth - 1):
            assert " | ".join(str(found.ops[j]) for j in repeat.layer(i)) == expected


def test_every_active_node_is_in_one_operator_and_the_order_is_executable():
    _, found = build_graph("t5")
    placed = [node for op in found.ops for node in op.nodes]
    computing = [n for n in found.graph_module.graph.nodes if n.op == "call_function"]
    assert sorted(map(str, [*placed, *found.constants])) == sorted(map(str, computing))
    done = set(found.constants)
    for op in found.ops:
        inside = set(op.nodes)
        assert all(
            a.op != "call_function" or a in done or a in inside for node in op.nodes for a in node.all_input_nodes
        )
        done |= inside


def test_kinds():
    _, found = build_graph("llama")
    kinds = {op.name: op.kind for op in found.ops}
    assert kinds["linear"] is Kind.COMPUTE
    assert kinds["attention"] is Kind.ATTENTION
    assert {kinds[n] for n in ("rms_norm", "rope", "silu", "mul", "add")} == {Kind.MEMORY}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_attention_is_one_attention_operator(attention):
    _, found = build_graph("bert_base", attention=attention)
    assert sum(op.kind is Kind.ATTENTION for op in found.ops) == 2
    assert not any(op.name in ("softmax", "matmul") for op in found.ops)
    assert [r.count for r in repeats.find(found)] == [2]


def test_half_precision_spells_norms_and_clamps_in_more_nodes_and_is_read_the_same():
    _, found = build_graph("t5", attention="eager", dtype=torch.float16)
    names = [op.name for op in found.ops]
    assert names.count("rms_norm") == 5 + 7
    assert names.count("clamp") == 2 * (2 + 3)
    assert not {"pow", "rsqrt", "isinf", "where", "any", "neg"} & set(names)
    assert [r.count for r in repeats.find(found)] == [2, 2]


def test_layers_that_differ_are_not_called_repeated():
    class Stack(torch.nn.Module):
        def __init__(self, widths):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.Linear(8, w), torch.nn.ReLU(), torch.nn.Linear(w, 8)) for w in widths
            )

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    def counts(widths):
        return [r.count for r in repeats.find(graph.build(capture(Stack(widths).eval(), (torch.randn(2, 8),))))]

    assert counts([16, 16, 16]) == [3]
    assert counts([16, 24, 32]) == []


def test_dataflow_that_differs_is_not_called_repeated():
    class Crossed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            outs = [x]
            for i, layer in enumerate(self.layers):
                # The same operators in every layer, but the third one adds an older value.
                outs.append(torch.relu(layer(outs[-1])) + outs[-1 if i != 2 else 0])
            return outs[-1]

    found = graph.build(capture(Crossed().eval(), (torch.randn(2, 8),)))
    assert [r.count for r in repeats.find(found)] != [4]
