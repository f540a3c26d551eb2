"""The transformers integration against the models' own eager attention, with peaked attention and random biases."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing

import stof_kernels as stof

pytest.importorskip("transformers")

from stof_kernels.integrations import models
from stof_kernels.integrations import transformers as stof_transformers
from stof_kernels.integrations.transformers import Masks

LENGTH = 72
IDS = [id for id in models.MODELS if id != "bert_large"]  # the same architecture as bert_base


def run(model, kwargs):
    with torch.no_grad():
        return model(**kwargs).last_hidden_state


def additive(mask):
    """A SparseMask as the float mask that eager attention adds."""
    return torch.zeros(mask.shape).masked_fill(~mask.to_dense(), -torch.inf)


def run_eager(model, kwargs, mask):
    """The model with its own attention and the given masks; T5's encoder runs apart so that cross attention keeps its own."""
    if not isinstance(mask, Masks):
        return run(model, {**kwargs, "attention_mask": additive(mask)})
    with torch.no_grad():
        encoded = model.encoder(kwargs["input_ids"], attention_mask=additive(mask.encoder))
        return model(
            encoder_outputs=encoded,
            attention_mask=additive(mask.cross),
            decoder_input_ids=kwargs["decoder_input_ids"],
            decoder_attention_mask=additive(mask.decoder),
        ).last_hidden_state


@pytest.fixture(scope="module")
def pair():
    built = {}

    def get(id):
        if id not in built:
            built[id] = [models.build(id, LENGTH, attention=a, size="tiny", seed=3) for a in ("stof", "eager")]
        return built[id]

    return get


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("id", IDS)
def test_experiment_mask_equals_eager_attention_with_the_same_mask(id, pair):
    ours, eager = pair(id)
    kwargs = models.inputs(id, 2, LENGTH, size="tiny", seed=1)
    mask = models.masks(id, LENGTH)
    out = run(ours, {**kwargs, "stof_mask": mask})
    close(out, run_eager(eager, kwargs, mask))
    assert (out - run(ours, kwargs)).abs().max() > 0.05, "the mask must matter, or this test shows nothing"


@pytest.mark.parametrize("id", IDS)
def test_without_a_mask_the_models_own_rule_holds(id, pair):
    ours, eager = pair(id)
    kwargs = models.inputs(id, 2, LENGTH, size="tiny", seed=2)
    close(run(ours, kwargs), run(eager, kwargs))


@pytest.mark.parametrize("id", ["bert_base", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_honoured(id, side, pair):
    ours, eager = pair(id)
    kwargs = models.inputs(id, 2, LENGTH, size="tiny", seed=4)
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, :20] = 0
    real = real.flip(1) if side == "right" else real
    padded = {**kwargs, "attention_mask": real}
    out, want = run(ours, padded), run(eager, padded)
    # Rows of padding tokens mean nothing (eager averages over removed keys), except in T5, whose decoder is not padded.
    rows = slice(None) if id == "t5" else real.bool()
    close(out[rows], want[rows])
    if side == "right" and id in ("gpt2", "llama"):
        return  # tokens after the last real one: the causal rule removes them already
    assert (out[rows] - run(ours, kwargs)[rows]).abs().max() > 0.05


def test_a_pattern_is_anded_with_the_models_causal_rule_and_padding(pair):
    ours, eager = pair("gpt2")
    kwargs = models.inputs("gpt2", 2, LENGTH, size="tiny", seed=5)
    pattern = stof.masks.longformer(9, 5)
    both = stof.SparseMask.from_pattern(pattern & stof.masks.causal(), LENGTH, LENGTH)
    close(run(ours, {**kwargs, "stof_mask": pattern}), run_eager(eager, kwargs, both))
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, 50:] = False
    keep = both.to_dense() & real[:, None, None, :]
    folded = stof.SparseMask.from_dense(keep)
    want = run(ours, {**kwargs, "stof_mask": folded})
    close(run(ours, {**kwargs, "attention_mask": real.long(), "stof_mask": pattern})[real], want[real])


def test_grouped_queries():
    from transformers import LlamaConfig, LlamaModel

    stof_transformers.register()
    outs = []
    for attention in ("stof", "eager"):
        config = LlamaConfig(
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=300,
            vocab_size=500,
            use_cache=False,
            attn_implementation=attention,
        )
        model = models.randomise_(LlamaModel(config), seed=8).eval()
        ids = torch.randint(0, 500, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        outs.append(run(model, {"input_ids": ids}))
    close(*outs)


def test_decoding_with_a_cache_equals_the_whole_sequence(pair):
    ours, _ = pair("llama")
    ids = models.inputs("llama", 1, 24, size="tiny", seed=6)["input_ids"]
    with torch.no_grad():
        first = ours(ids[:, :20], use_cache=True)
        rest = ours(ids[:, 20:], past_key_values=first.past_key_values, use_cache=True).last_hidden_state
        close(rest, ours(ids).last_hidden_state[:, 20:])


@pytest.mark.parametrize("form", ["bool", "float"])
def test_four_dimensional_attention_mask(form, pair):
    ours, eager = pair("bert_base")
    kwargs = models.inputs("bert_base", 1, LENGTH, size="tiny", seed=7)
    mask = stof.SparseMask.from_pattern(stof.masks.sliding_window(6), LENGTH, LENGTH)
    given = mask.to_dense() if form == "bool" else additive(mask)
    close(run(ours, {**kwargs, "attention_mask": given}), run(eager, {**kwargs, "attention_mask": additive(mask)}))


def test_a_changed_dense_mask_is_seen(pair):
    ours, _ = pair("bert_base")
    kwargs = models.inputs("bert_base", 1, LENGTH, size="tiny", seed=7)
    keep = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    before = run(ours, {**kwargs, "attention_mask": keep})
    keep[..., 10:] = False
    assert (run(ours, {**kwargs, "attention_mask": keep}) - before).abs().max() > 0.05


def test_position_bias_of_t5_matters(pair):
    ours, eager = pair("t5")
    kwargs = models.inputs("t5", 1, LENGTH, size="tiny", seed=7)
    right = run(ours, kwargs)
    table = ours.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    kept = table.clone()
    try:
        table.zero_()
        assert (run(ours, kwargs) - right).abs().max() > 0.02
    finally:
        table.copy_(kept)
    close(right, run(eager, kwargs))


@pytest.mark.parametrize("id", ["bert_base", "t5"])
def test_compiles_in_one_graph_and_takes_another_mask_without_recompiling(id, pair):
    ours, _ = pair(id)
    kwargs = models.inputs(id, 1, LENGTH, size="tiny", seed=9)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for width in (3, 5, 9):
        mask = stof.SparseMask.from_pattern(stof.masks.sliding_window(width), LENGTH, LENGTH)
        mask = Masks(mask, mask, mask) if id == "t5" else mask
        close(run(compiled, {**kwargs, "stof_mask": mask}), run(ours, {**kwargs, "stof_mask": mask}))
    assert counter.frame_count == 1


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(match, error=ValueError):
    return pytest.raises(error, match=match)


def test_padding_beside_a_sparse_mask_is_refused_and_a_mask_of_ones_is_not(pair):
    ours, _ = pair("bert_base")
    kwargs = models.inputs("bert_base", 2, LENGTH, size="tiny")
    mask = models.masks("bert_base", LENGTH)
    ones = torch.ones(2, LENGTH, dtype=torch.long)
    close(
        run(ours, {**kwargs, "attention_mask": ones, "stof_mask": mask}),
        run(ours, {**kwargs, "stof_mask": mask}),
    )
    ones[0, 3] = 0
    with refused("fold the padding into the mask"):
        run(ours, {**kwargs, "attention_mask": ones, "stof_mask": mask})


def test_one_mask_for_a_model_with_cross_attention_is_refused(pair):
    ours, _ = pair("t5")
    kwargs = models.inputs("t5", 1, LENGTH, size="tiny")
    with refused(r"Masks\(encoder=..., decoder=..., cross=...\)"):
        run(ours, {**kwargs, "stof_mask": models.masks("t5", LENGTH).encoder})


def test_what_has_no_counterpart_is_refused(pair):
    ours, _ = pair("bert_base")
    kwargs = models.inputs("bert_base", 1, LENGTH, size="tiny")
    with refused("softcap is set"):
        run(ours, {**kwargs, "softcap": 30.0})
    with refused("stof_mask is str", TypeError):
        run(ours, {**kwargs, "stof_mask": "bigbird"})
    with refused("beside a 4-D attention_mask"):
        run(
            ours,
            {
                **kwargs,
                "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool),
                "stof_mask": stof.masks.causal(),
            },
        )
    try:
        ours.train()
        with refused("dropout is 0.1"):
            run(ours, kwargs)
    finally:
        ours.eval()


def test_a_mask_of_another_length_is_refused(pair):
    ours, _ = pair("bert_base")
    with refused("mask is for 64 x 64 positions"):
        run(
            ours,
            {**models.inputs("bert_base", 1, LENGTH, size="tiny"), "stof_mask": models.masks("bert_base", 64)},
        )


def test_building_a_mask_under_export_is_refused_in_one_line(pair):
    ours, _ = pair("bert_base")
    kwargs = models.inputs("bert_base", 1, LENGTH, size="tiny")
    with torch.no_grad(), refused("cannot be built while a compiler traces"):
        torch.export.export(ours, (), kwargs, strict=False)


def test_missing_transformers_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install 'transformers>=5'"):
        stof_transformers.register()


def test_the_package_does_not_need_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; import stof_kernels, stof_kernels.integrations.transformers; "
        "import stof_kernels.integrations.models as m; print(len(m.MODELS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "6"


# ---- the models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "tokens"), [(128, 122), (512, 485), (2048, 2026)])
def test_vit_takes_the_nearest_token_count_below(length, tokens):
    assert models.spec("vit").tokens(length) == tokens


def test_models_are_those_of_the_paper():
    depth = {id: spec.attention_modules for id, spec in models.MODELS.items()}
    assert depth == {"bert_base": 12, "bert_large": 24, "gpt2": 12, "llama": 24, "t5": 36, "vit": 12}
    with pytest.raises(ValueError, match="model 'bert' is unknown, allowed: bert_base"):
        models.spec("bert")


def test_weights_follow_the_seed_and_no_vector_is_trivial():
    first, again, other = (models.build("bert_base", 16, size="tiny", seed=s) for s in (1, 1, 2))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name
        assert a.std() > 0.1 or a.dim() > 1, f"{name} is nearly constant"


def test_attention_is_peaked(pair):
    _, eager = pair("bert_base")
    with torch.no_grad():
        weights = eager(**models.inputs("bert_base", 2, LENGTH, size="tiny"), output_attentions=True).attentions
    assert min(w.amax(-1).mean() for w in weights) > 5 / LENGTH


def test_half_precision_keeps_rotary_frequencies_in_float32():
    model = models.build("llama", 16, size="tiny", dtype=torch.float16)
    assert model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float16}
