"""MCFuser's generated kernels against torch, in Triton's interpreter where there is no GPU; its tuner and its whole models."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stof_kernels.baselines import Unsupported, get
from stof_kernels.baselines import inputs as shared
from stof_kernels.baselines.mcfuser_planner import attention, kernels
from stof_kernels.baselines.mcfuser_planner.chain import STEPS, Chain, Tiles, known_peaks
from stof_kernels.baselines.mcfuser_planner.codegen import Layout, source
from stof_kernels.baselines.mcfuser_planner.expressions import parse
from stof_kernels.baselines.mcfuser_planner.kernels import Kernel
from stof_kernels.baselines.mcfuser_planner.pruning import Candidate
from stof_kernels.baselines.mcfuser_planner.search import SearchSettings

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
A100 = known_peaks("NVIDIA A100")
EXPRESSIONS = ("mhnk", "mn(k,h)", "mnhk", "mhkn", "mkhn")
BRIEF = {"peaks": A100, "settings": SearchSettings(8, 2, most_rounds=1, budget_s=0.0)}
BRIEFEST = BRIEF | {"settings": SearchSettings(8, 1, most_rounds=1, budget_s=0.0)}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def additive(*shape, seed=1):
    """0.3 and -inf, half and half; row 1 keeps nothing."""
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[..., 0] = True
    keep[..., 1, :] = False
    return torch.full(shape, 0.3).masked_fill(~keep, -torch.inf).to(DEVICE)


def expected(q, k, v, mask, scale):
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale + (0 if mask is None else mask.double())
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v  # a row that keeps nothing gives 0


def run_attention(expression, tiles, q, k, v, mask, step="softmax", scale=0.25):
    """One kernel as it is, without a search. The output starts as nan."""
    out = torch.full_like(q, math.nan)
    chain, layout = attention.attention_problem(q, k, v, mask, out, scale, step)
    Kernel(Candidate(parse(expression), Tiles(*tiles), chain), layout)(
        [q, k, *([] if mask is None else [mask]), v, out]
    )
    return out


def text_of(expression, tiles, chain):
    strides = tuple((x, (0, 0, 64, 1)) for x in ("ABMDE" if chain.mask else "ABDE"))
    return source(Candidate(parse(expression), Tiles(*tiles), chain), Layout(strides))


# ---- the generator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["softmax", "softmax_exp"])
@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("tiles", [(32, 32, 16, 16), (32, 16, 64, 32), (16, 128, 16, 16), (64, 16, 16, 64)])
def test_attention_by_every_expression(expression, tiles, step):
    q, k, v = draw(1, 2, 40, 48), draw(1, 2, 72, 48, seed=1), draw(1, 2, 72, 48, seed=2)
    mask = additive(1, 1, 40, 72)
    got = run_attention(expression, tiles, q, k, v, mask, step)
    torch.testing.assert_close(got.double(), expected(q, k, v, mask, 0.25), atol=5e-6, rtol=1e-5)
    assert not got[:, :, 1].any()


@pytest.mark.parametrize("step", [s for s in STEPS if not s.startswith("softmax")])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_chains_of_products_by_every_expression(expression, step):
    a, b, d = draw(2, 40, 48), draw(2, 48, 56, seed=1) / 7, draw(2, 56, 40, seed=2)
    e = torch.full((2, 40, 40), math.nan, device=DEVICE)
    chain = Chain(40, 56, 48, 40, 2, step, element_bytes=4)
    strides = tuple((x, (t.stride(0), 0, *t.stride()[1:])) for x, t in zip("ABDE", (a, b, d, e), strict=True))
    Kernel(Candidate(parse(expression), Tiles(16, 16, 32, 16), chain), Layout(strides, exact=True))((a, b, d, e))
    want = attention.unfused_chain(a.double(), b.double(), d.double(), step)
    torch.testing.assert_close(e.double(), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 40, 72), (2, 1, 40, 72), (1, 4, 40, 72), (2, 4, 40, 72), (2, 1, 1, 72)])
def test_masks_broadcast_and_key_heads_are_shared(shape):
    q, k, v = draw(2, 4, 40, 32), draw(2, 2, 72, 32, seed=1), draw(2, 2, 72, 32, seed=2)
    mask = additive(*shape[:2], 40, 72)[:, :, : shape[2]]
    wide = mask.expand(2, 4, 40, 72).contiguous()
    got = run_attention("mhnk", (32, 32, 32, 32), q, k, v, mask)
    torch.testing.assert_close(got.double(), expected(q, k, v, mask, 0.25), atol=5e-6, rtol=1e-5)
    assert torch.equal(got, run_attention("mhnk", (32, 32, 32, 32), q, k, v, wide))


def test_tensors_may_lie_as_models_leave_them():
    packed = draw(2, 40, 3, 4, 32)  # batch, tokens, q k v, heads, channels
    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    got = run_attention("mn(k,h)", (16, 16, 32, 16), q, k, v, None)
    torch.testing.assert_close(got.double(), expected(q, k, v, None, 0.25), atol=5e-6, rtol=1e-5)


def test_a_mask_padded_to_16_columns_is_the_same_mask():
    q, k, v, mask = draw(1, 2, 33, 32), draw(1, 2, 37, 32), draw(1, 2, 37, 32, seed=3), additive(1, 1, 33, 37)
    wide = attention.padded_mask(mask)
    assert wide.shape == (1, 1, 33, 48)
    plain, padded = (run_attention("mhnk", (16, 32, 32, 32), q, k, v, m) for m in (mask, wide))
    assert torch.equal(plain, padded)
    torch.testing.assert_close(plain.double(), expected(q, k, v, mask, 0.25), atol=5e-6, rtol=1e-5)


def test_only_the_safe_softmax_survives_large_scores():
    q, k, v = 30 * draw(1, 1, 16, 32), 30 * draw(1, 1, 48, 32, seed=1), draw(1, 1, 48, 32, seed=2)
    safe, bare = (run_attention("mhnk", (16, 16, 32, 32), q, k, v, None, step) for step in ("softmax", "softmax_exp"))
    torch.testing.assert_close(safe.double(), expected(q, k, v, None, 0.25), atol=1e-5, rtol=1e-4)
    assert not bare.isfinite().all()


def test_the_mask_is_really_applied():
    q, k, v, mask = draw(1, 2, 32, 32), draw(1, 2, 48, 32), draw(1, 2, 48, 32, seed=3), additive(1, 1, 32, 48)
    other = mask.clone()
    other[0, 0, 20] = torch.where(mask[0, 0, 20] == 0.3, -torch.inf, 0.3)
    first, second = (run_attention("mnhk", (16, 16, 32, 16), q, k, v, m) for m in (mask, other))
    changed = (first != second).any(-1).any(0).any(0)
    assert changed.nonzero().flatten().tolist() == [20]


def test_loads_stand_where_the_dag_puts_them():
    chain = Chain(64, 64, 64, 64, 1, "softmax", True)
    hoisted, inside = text_of("mhnk", (16, 16, 64, 64), chain), text_of("mhnk", (16, 16, 32, 64), chain)
    first = lambda text, what: text.index(what)  # noqa: E731
    assert first(hoisted, "a = tl.load") < first(hoisted, "for n_at") < first(hoisted, "b = tl.load")
    assert "for k_at" not in hoisted
    assert first(inside, "for n_at") < first(inside, "for k_at") < first(inside, "a = tl.load")
    assert re.search(r"for n_at[^\n]*\n( +)n = [^\n]*\n\1mask = tl.load", text_of("mnhk", (16, 16, 32, 32), chain))
    assert text_of("mn(k,h)", (16, 16, 64, 32), chain).count("d = tl.load") == 2
    assert text_of("mhkn", (16, 16, 32, 64), chain).count("c3 = tl.dot(a, b, c3") == 1


def test_tiles_that_divide_need_no_guard():
    chain = Chain(64, 64, 64, 64, 1, "softmax", True)
    assert "<" not in text_of("mhnk", (16, 16, 64, 64), chain)
    assert text_of("mhnk", (16, 64, 64, 64), replace(chain, n=72)).count("n[:, None] < 72") == 1


@pytest.mark.parametrize(("length", "wide"), [(32768, False), (65536, True)])
def test_offsets_beyond_32_bits_are_wider(length, wide):
    chain = Chain(length, length, 64, 64, 1, "softmax", True)
    strides = tuple((x, (0, 0, length, 1) if x == "M" else (0, 0, 64, 1)) for x in "ABMDE")
    text = source(Candidate(parse("mhnk"), Tiles(64, 64, 64, 64), chain), Layout(strides))
    assert (f"mask_ptr + (m[:, None].to(tl.int64) * {length} + n[None, :].to(tl.int64))" in text) == wide
    assert "a_ptr + (m[:, None] * 64 + k[None, :])" in text


def test_a_damaged_file_of_a_kernel_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path))
    kernels.load.cache_clear()
    text = text_of("mhnk", (16, 16, 64, 64), Chain(64, 64, 64, 64))
    kernels.load(text)
    (path,) = (tmp_path / "mcfuser").glob("*.py")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    kernels.load.cache_clear()
    assert hasattr(kernels.load(text), "mcfuser_kernel")
    assert path.read_text() == whole
    assert [p.suffix for p in path.parent.iterdir() if p.is_file()] == [".py"]
    kernels.load.cache_clear()


# ---- the tuner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_mask", [True, False])
def test_tuned_attention(with_mask):
    q, k, v = draw(1, 4, 37, 32), draw(1, 2, 53, 32, seed=1), draw(1, 2, 53, 32, seed=2)
    mask = additive(1, 1, 37, 53) if with_mask else None
    found = attention.tune_attention(q, k, v, mask, attention.Form(tokens_first=True), **BRIEF)
    got = found(q, k, v, mask)
    assert got.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(got.double(), expected(q, k, v, mask, 32**-0.5), atol=5e-6, rtol=1e-5)
    assert [t.measured > 0 and t.predicted > 0 for t in found.tuned.trials] == [True, True]
    assert found.tuned.seconds > sum(t.measured for t in found.tuned.trials if math.isfinite(t.measured))
    text = str(found.tuned)
    assert re.fullmatch(r".+ \d+x\d+x\d+x\d+, [48] warps, \d stages; 2 of \d+ candidates measured in 1 rounds", text)


def test_one_tuning_serves_all_masks_of_a_shape(monkeypatch):
    monkeypatch.setattr(attention, "device_peaks", lambda device: A100)
    q, k, v = draw(1, 1, 16, 32), draw(1, 1, 16, 32, seed=1), draw(1, 1, 16, 32, seed=2)
    masks = [additive(1, 1, 16, 16, seed=s) for s in (1, 2)]
    attention.forget()
    first, second = (attention.tuned_attention(q, k, v, mask, settings=BRIEF["settings"]) for mask in masks)
    assert first is second
    assert first is not attention.tuned_attention(q, k, v, None, settings=BRIEF["settings"])
    assert len(attention.known()) == 2
    torch.testing.assert_close(
        second(q, k, v, masks[1]).double(), expected(q, k, v, masks[1], 32**-0.5), atol=5e-6, rtol=1e-5
    )
    attention.forget()
    assert attention.known() == ()


def test_a_chain_is_fused_only_where_the_model_says_so():
    a, b, d = draw(1, 64, 96), draw(1, 96, 128, seed=1) / 10, draw(1, 128, 96, seed=2)
    declined = attention.tune_chain(a, b, d, "gelu", **BRIEF)
    assert (declined.fused, declined.tuned) == (False, None)
    assert declined.fused_seconds > declined.unfused_seconds
    forced = attention.tune_chain(a, b, d, "gelu", always=True, **BRIEF)
    torch.testing.assert_close(forced(a, b, d), F.gelu(a @ b) @ d, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(declined(a, b, d), F.gelu(a @ b) @ d, atol=1e-4, rtol=1e-4)
    narrow = Chain(1024, 1024, 64, 64, batch=96)
    assert attention.fusing_pays(narrow, A100)


BAD = {
    "twice": ({"k": (1, 2, 16, 32)}, "shapes are"),
    "groups": ({"k": (1, 4, 16, 32), "v": (1, 4, 16, 32), "q": (1, 6, 16, 32)}, "shapes are"),
    "mask": ({"mask": (1, 1, 16, 20)}, "mask has shape"),
    "mask heads": ({"mask": (1, 3, 16, 16)}, "mask has shape"),
    "chains": (
        {"q": (1, 70000, 1, 16), "k": (1, 1, 1, 16), "v": (1, 1, 1, 16), "mask": None},
        "batch \\* heads is 70000",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_shapes_are_one_clear_line(case):
    changes, message = BAD[case]
    shapes = {"q": (1, 2, 16, 32), "k": (1, 1, 16, 32), "v": (1, 1, 16, 32), "mask": (1, 1, 16, 16)} | changes
    given = {name: None if shape is None else torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=rf"^attention: {message}.*allowed: "):
        attention.tune_attention(**given, **BRIEF)
    with pytest.raises(ValueError, match="step is 'relu', allowed: softmax"):
        attention.tune_attention(*(torch.zeros(1, 1, 16, 16),) * 3, form=attention.Form(step="relu"), **BRIEF)
    with pytest.raises(ValueError, match=r"^chain: shapes are .*, allowed: "):
        attention.tune_chain(torch.zeros(1, 16, 16), torch.zeros(1, 32, 16), torch.zeros(1, 16, 16), **BRIEF)


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mcfuser", "mcfuser_expanded", "mcfuser_exp"])
@pytest.mark.parametrize("family", ["causal", "bigbird"])
def test_the_methods_apply_the_mask(name, family, monkeypatch):
    from stof_kernels import masks
    from stof_kernels.baselines import Problem
    from stof_kernels.benchmarking.check import relative_error

    monkeypatch.setattr(attention, "device_peaks", lambda device: A100)
    original = attention.tune_attention
    monkeypatch.setattr(attention, "tune_attention", lambda *a, **k: original(*a, **(k | BRIEF)))
    attention.forget()
    problem = Problem(masks.get(family, 50), 1, 50, 50, 2, 2, 32, "float16", DEVICE)
    tensors = shared.make_tensors(problem)
    prepared = get(name).prepare(problem, tensors)
    assert prepared.exact
    assert "candidates measured in 1 rounds" in prepared.note
    assert relative_error(problem, tensors, prepared.applied, prepared.run()) < 2e-3
    with pytest.raises(Unsupported, match="float16 and bfloat16 only"):
        get(name).prepare(replace(problem, dtype="float32"), tensors)
    attention.forget()


@pytest.mark.parametrize("name", ["bert_base", "t5", "vit"])
def test_whole_models_with_its_attention(name, monkeypatch):
    pytest.importorskip("transformers")
    from stof_kernels.baselines.mcfuser_planner import operators
    from stof_kernels.baselines.models import ModelProblem, mcfuser
    from stof_kernels.benchmarking.model_subject import relative_error, subject

    monkeypatch.setattr(attention, "device_peaks", lambda device: A100)
    original = attention.tune_attention
    monkeypatch.setattr(attention, "tune_attention", lambda *a, **k: original(*a, **(k | BRIEFEST)))
    calls = []
    operator = operators.mcfuser_attention
    monkeypatch.setattr(operators, "mcfuser_attention", lambda *a: calls.append(a[3]) or operator(*a))
    attention.forget()
    bench = subject(ModelProblem(name, 1, 26, "bigbird", "float32", DEVICE, size="tiny"))
    want, _ = bench.reference()
    mcfuser.register(0.0)
    got = mcfuser.forward(bench.model(mcfuser.NAME), mcfuser.arguments(bench))()
    assert relative_error(got, want) < 1e-5
    assert len(calls) == (6 if name == "t5" else 2)
    assert sum(mask is None for mask in calls) == (2 if name == "t5" else 0)  # cross attention is dense
    assert {mask.stride(-1) for mask in calls if mask is not None} == {1}  # rows of keys are read in whole lines
    attention.forget()


# ---- the real compiler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "step", "expression", "tiles", "products"),
    [
        ("80", "softmax", "mhnk", "128x64x64x64", "mma.sync"),
        ("90", "softmax", "mhnk", "128x64x64x64", "wgmma"),
        ("89", "softmax_exp", "mn(k,h)", "64x64x32x32", "mma.sync"),
    ],
)
def test_kernels_compile_with_tensor_cores_and_whole_vectors(capability, step, expression, tiles, products, tmp_path):
    """The instructions are Triton's choice; tiles loaded in the loop are copied ahead, a stage for each."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("mcfuser_compile.py")
    command = [sys.executable, str(script), capability, step, expression, tiles, "4", "3"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    shared_bytes, *found = ran.stdout.split()
    assert {products, "cp.async", "st.global.v4", "ex2.approx"} <= set(found)
    assert 0 < int(shared_bytes) <= 99 * 1024
