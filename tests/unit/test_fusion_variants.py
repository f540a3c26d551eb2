"""Every variant of a whole model computes the same function of the same weights, inputs and masks."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("transformers")

from stof_kernels.integrations import models, variants
from stof_kernels.integrations.variants import Case, Unavailable

LENGTH = 40
IDS = ["bert_base", "gpt2", "llama", "t5", "vit"]


def case(id, **options):
    return Case(id, 2, LENGTH, size="tiny", **options)


def agree(got, want):
    assert (got - want).abs().max() <= 2e-4 * want.abs().max()


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("variant", ["torch_native", "sdpa", "stof_mha_only"])
def test_eager_variants_are_the_reference(id, variant):
    ready = variants.prepare(case(id), variant)
    assert ready.tuning_s is None
    agree(ready.run(), variants.reference(case(id)))


@pytest.mark.parametrize("id", ["bert_base", "t5"])
@pytest.mark.parametrize("variant", ["stof", "stof_fusion_only"])
def test_tuned_variants_are_the_reference(id, variant, monkeypatch):
    ready = variants.prepare(case(id), variant, budget_s=0)
    agree(ready.run(), variants.reference(case(id)))
    assert ready.tuning_s > 0
    assert ready.plan is not None
    # The attention of both is one operator that fusion leaves alone.
    assert (ready.plan.use == "plan") == (ready.note == "")


@pytest.fixture
def counter(monkeypatch):
    """torch.compile with a counting backend instead of Inductor."""
    counting = torch._dynamo.testing.CompileCounter()
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, mode, dynamic, fullgraph: compile(model, backend=counting, fullgraph=fullgraph)
    )
    return counting


def test_compiled_variants_are_the_reference(counter):
    ready = variants.prepare(case("bert_base"), "torch_compile")
    agree(ready.run(), variants.reference(case("bert_base")))
    assert counter.frame_count == 1


@pytest.mark.parametrize("id", ["llama", "t5"])
def test_flex_attention_has_the_same_mask(id, counter):
    """As a compiler sees it; its own kernels are for CUDA."""
    model = variants.build(case(id), variants.FLEX)
    given = variants.arguments(case(id), variants.FLEX)
    with torch.no_grad():
        out = torch.compile(model, mode=None, dynamic=False, fullgraph=True)(**given).last_hidden_state
    agree(out, variants.reference(case(id)))
    assert counter.frame_count == 1
    with pytest.raises(Unavailable, match="compiled for CUDA only"):
        variants.prepare(case(id), "torch_compile_flex")


def test_the_broken_boundary_really_breaks_the_graph(counter):
    ready = variants.prepare(case("bert_base"), "torch_compile_no_mha_boundary")
    agree(ready.run(), variants.reference(case("bert_base")))
    assert counter.frame_count > 2


def test_the_mask_reaches_every_variant():
    for variant in ("torch_native", "sdpa", "stof_mha_only"):
        outs = [variants.prepare(case("t5", family=f), variant).run() for f in ("bigbird", "sliding_window")]
        assert (outs[0] - outs[1]).abs().max() > 0.05, variant


def test_lower_precision_is_compared_with_the_same_rounded_weights():
    low = case("bert_base", dtype=torch.bfloat16)
    want = variants.reference(low)
    assert want.dtype == torch.float32
    got = variants.prepare(low, "sdpa").run()
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.1 * want.abs().max()


def test_what_cannot_run_says_why():
    with pytest.raises(Unavailable, match="CUDA graphs need a CUDA device"):
        variants.prepare(case("bert_base"), "torch_compile_reduce_overhead")
    with pytest.raises(Unavailable, match="float16 on the CPU, allowed: float32, bfloat16"):
        variants.prepare(case("bert_base", dtype=torch.float16), "stof")
    with pytest.raises(ValueError, match="variant 'tvm' is unknown, allowed: torch_native"):
        variants.prepare(case("bert_base"), "tvm")
    with pytest.raises(ValueError, match="model 'bert' is unknown"):
        variants.prepare(Case("bert", 1, 16), "sdpa")
    assert Case("vit", 1, 128).tokens == models.spec("vit").tokens(128) == 122
