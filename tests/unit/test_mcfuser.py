"""MCFuser's planner: expressions, programs, rules, model and search, against the numbers of its published description."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stof_kernels.baselines import get
from stof_kernels.baselines.mcfuser_planner import model, pruning, tuning
from stof_kernels.baselines.mcfuser_planner.chain import (
    INDICES,
    LOOPS,
    Chain,
    Tiles,
    attention_chain,
    known_peaks,
    memory_bound,
)
from stof_kernels.baselines.mcfuser_planner.expressions import Expression, all_expressions, parse
from stof_kernels.baselines.mcfuser_planner.program import build
from stof_kernels.baselines.mcfuser_planner.pruning import Candidate, counts, space_of
from stof_kernels.baselines.mcfuser_planner.search import Moves, SearchSettings, mutated, search

A100 = known_peaks("NVIDIA A100-PCIE-40GB")
H200 = known_peaks("NVIDIA H200")
NK, FLAT, NHK, KN, KN_H = (parse(text) for text in ("mhnk", "mn(k,h)", "mnhk", "mhkn", "mkhn"))
GEMMS = Chain(1024, 1024, 512, 512)
# B * H = 96, S = 512, D = 64, no mask: the example that the model's published formulas were worked out for.
EXAMPLE = attention_chain(8, 12, 512, 512, 64, mask=False)


def candidate(tiles, chain=EXAMPLE, expression=NK) -> Candidate:
    return Candidate(expression, Tiles(*tiles), chain)


# ---- expressions and programs ----------------------------------------------------------------------------------------


def test_there_are_26_expressions_and_each_reads_back():
    found = all_expressions()
    assert len(set(found)) == 26
    assert [str(e) for e in found if e.flat] == ["mn(k,h)", "nm(k,h)"]
    assert all(parse(str(e)) == e for e in found)


@pytest.mark.parametrize("text", ["mnk", "mnkk", "mn(h,k)", "mn(k,h", "mnkhx", ""])
def test_other_expressions_are_refused(text):
    with pytest.raises(ValueError, match="allowed"):
        parse(text)


def test_the_programs_of_the_five_distinct_expressions():
    assert {str(e): str(build(e)) for e in pruning.deduplicated()} == {
        "mn(k,h)": "[m] n{k{L_A L_B C_C} h{L_D C_E}} h{S_E}",
        "mhnk": "[mh] n{k{L_A L_B C_C} L_D C_E} S_E",
        "mhkn": "[mh] k{L_A n{L_B C_C}} n{L_D C_E} S_E",
        "mnhk": "[m] n{h{k{L_A L_B C_C} L_D C_E}} h{S_E}",
        "mkhn": "[m] k{L_A n{L_B C_C}} n{h{L_D C_E}} h{S_E}",
    }


def test_a_dead_reduction_lets_the_load_of_a_leave_the_loop():
    live, dead = (dict(m=4, n=4, k=k, h=1) for k in (2, 1))
    assert str(build(NK, live, step=True, mask=True)) == "[m] n{k{L_A L_B C_C} L_M P_C L_D C_E} S_E"
    for expression in (NK, FLAT, NHK):
        assert str(build(expression, dead, step=True, mask=True)) == "[m] L_A n{L_B C_C L_M P_C L_D C_E} S_E"


def test_loads_that_do_not_depend_on_h_leave_it():
    assert str(build(NHK, step=True, mask=True)) == "[m] n{L_M h{k{L_A L_B C_C} P_C L_D C_E}} h{S_E}"


def test_a_chain_of_one_tile_needs_no_loop():
    ones = dict.fromkeys(LOOPS, 1)
    assert {str(build(e, ones)) for e in all_expressions()} == {"[] L_A L_B C_C L_D C_E S_E"}


@given(st.sampled_from(all_expressions()), st.fixed_dictionaries({loop: st.sampled_from((1, 2, 3)) for loop in LOOPS}))
def test_every_program_respects_scope_and_order(expression, extents):
    program = build(expression, extents, step=True, mask=True)
    place = {str(s): i for i, s in enumerate(program.statements)}
    for pair in ("L_A C_C", "L_B C_C", "C_C P_C", "L_M P_C", "P_C C_E", "L_D C_E", "C_E S_E"):
        before, after = pair.split()
        assert place[before] < place[after]
    for statement in program.statements:
        around = {loop[0] for loop in statement.scope} | set(program.grid)
        needed = {loop for loop in INDICES[statement.tensor] if extents[loop] > 1}
        assert needed <= around
        assert all(extents[loop] > 1 for loop in around)
        if statement.kind == "L":  # nothing keeps it inside a loop that does not index it
            assert not statement.scope or statement.scope[-1][0] in INDICES[statement.tensor]
    # What consumes a sum stands outside the loop that makes it.
    for tensor, reduction, consumers in (("C", "k", "P_C C_E S_E"), ("E", "n", "S_E")):
        made_in = {loop for loop in program.statement("C", tensor).scope if loop[0] == reduction}
        for name in consumers.split():
            assert not made_in & set(program.statement(*name.split("_")).scope)


def test_partial_tiles_by_expression():
    assert {str(e): (build(e).partial_tiles("C"), build(e).partial_tiles("E")) for e in (NK, FLAT, NHK, KN, KN_H)} == {
        "mhnk": ((), ()),
        "mn(k,h)": ((), ("h",)),
        "mnhk": ((), ("h",)),
        "mhkn": (("n",), ()),
        "mkhn": (("n",), ("h",)),
    }
    whole_n = build(KN, dict(m=4, n=1, k=4, h=2))
    assert whole_n.tiles_on_chip("C") == 1
    assert str(whole_n) == str(build(NK, dict(m=4, n=1, k=4, h=2)))


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_counts_after_each_rule_are_the_published_ones(capsys):
    found = counts(GEMMS, A100)
    print(*found, sep="\n")
    assert [(c.expressions, c.candidates) for c in found[:5]] == [
        (26, 109_051_904),
        (5, 5 * 64 * 64 * 32 * 32),
        (3, 12_582_912),
        (3, 5_292),
        (3, 2_283),
    ]
    assert counts(GEMMS, A100, powers=False)[3].candidates == 37_632
    print("survivors:", *(pruning.without_partial_tiles(pruning.deduplicated())))
    assert "mn(k,h) mhnk mnhk" in capsys.readouterr().out


@pytest.mark.parametrize(("seq_len", "after_padding"), [(512, 972), (2048, 1728)])
def test_the_space_of_attention_is_small_enough_to_estimate_whole(seq_len, after_padding):
    chain = attention_chain(8, 12, seq_len, seq_len, 64)
    assert counts(chain, A100)[3].candidates == after_padding
    space = space_of(chain, A100)
    assert 300 < len(space) < after_padding
    assert all(pruning.fits_shared(c.tiles, A100.shared_bytes) for c in space)
    assert all(pruning.accumulators(c) <= pruning.ACCUMULATORS for c in space)


def test_padding_rule():
    assert pruning.tiles_with_little_padding(64) == [16, 32, 64]
    assert pruning.tiles_with_little_padding(96) == [16, 32, 48, 96]
    assert pruning.buildable_tiles(96) == [16, 32]
    assert pruning.tiles_with_little_padding(96, threshold=0.34) == [16, 32, 48, 64, 96]
    assert pruning.buildable_tiles(122) == [16, 32, 64, 128]  # tensors are padded to 16 first: 128
    assert pruning.buildable_tiles(485) == [16, 32, 64, 128, 256]
    assert pruning.buildable_tiles(1) == [16]


def test_shared_memory_rule_counts_one_tile_of_each_tensor():
    assert pruning.shared_estimate(Tiles(128, 64, 32, 16)) == 2 * (128 * 32 + 32 * 64 + 128 * 64 + 64 * 16 + 128 * 16)
    tiles = Tiles(256, 256, 32, 32)
    exact = pruning.shared_estimate(tiles) / 1.2
    assert pruning.fits_shared(tiles, math.ceil(exact))
    assert not pruning.fits_shared(tiles, math.floor(exact) - 1)


@pytest.mark.parametrize("bad", [dict(m=0), dict(k=True), dict(batch=-1), dict(step="tanh"), dict(mask=True)])
def test_a_bad_chain_is_one_clear_line(bad):
    with pytest.raises(ValueError, match=r"^chain: .*, allowed: "):
        Chain(**({"m": 16, "n": 16, "k": 16, "h": 16} | bad))


# ---- model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiles", "megabytes", "blocks", "us"),
    [((64, 64, 64, 64), 113.2, 768, 106.6), ((128, 64, 64, 64), 62.9, 384, 78.3)],
)
def test_the_worked_example(tiles, megabytes, blocks, us):
    found = model.estimate(candidate(tiles), A100)
    assert round(found.bytes / 1e6, 1) == megabytes
    assert found.flops == pytest.approx(6.442e9, rel=1e-3)
    assert found.blocks == blocks
    assert round(found.seconds * 1e6, 1) == us


TILE = st.sampled_from((16, 32, 64, 128))


@given(TILE, TILE, TILE, TILE)
def test_traffic_follows_the_published_formulas(tm, tn, tk, th):
    chain = Chain(512, 768, 256, 128)
    c = candidate((tm, tn, tk, th), chain)
    m, n, k, h = (-(-chain.length(loop) // t) for loop, t in zip("mnkh", (tm, tn, tk, th), strict=True))
    moved = {str(s): model.traffic(c, s) / 2 for s in c.program.statements if s.kind in "LS"}
    assert moved == {
        "L_A": tm * tk * m * h * (1 if k == 1 else n * k),
        "L_B": tk * tn * m * h * n * k,
        "L_D": tn * th * m * h * n,
        "S_E": tm * th * m * h,
    }
    assert model.estimate(c, A100).flops == 2 * (512 * 768 * 256 * h + 512 * 768 * 128)  # C anew for each tile of h


def test_a_mask_is_traffic_like_any_other():
    tiles = (128, 64, 64, 64)
    plain, masked = (model.estimate(candidate(tiles, replace(EXAMPLE, mask=mask)), A100) for mask in (False, True))
    assert masked.bytes - plain.bytes == 2 * 96 * 512 * 512
    assert masked.flops == plain.flops


def test_flat_expressions_do_not_compute_c_again():
    chain = Chain(512, 512, 256, 256, batch=4)
    flat, deep = (model.estimate(candidate((64, 64, 64, 64), chain, e), A100) for e in (FLAT, NK))
    assert deep.flops - flat.flops == 3 * 2 * 4 * 512 * 512 * 256
    assert deep.blocks == 4 * flat.blocks


def test_memory_bound_means_a_short_reduction():
    assert memory_bound(EXAMPLE, A100)
    assert not memory_bound(Chain(4096, 3072, 768, 768), A100)
    assert Chain(1024, 1024, 64, 64).intensity() == pytest.approx(2 * 1024 * 64 / (2 * (64 + 64 + 1024)))


def test_cards_are_found_by_the_longest_name():
    assert known_peaks("NVIDIA A100-SXM4-80GB").bytes_per_s == 2.039e12
    assert A100.bytes_per_s == 1.555e12
    assert known_peaks("NVIDIA H200 NVL").name == "NVIDIA H200"
    assert known_peaks("Radeon") is None


def test_rank_correlation():
    assert model.rank_correlation([1, 2, 3, 4], [10, 20, 25, 70]) == pytest.approx(1)
    assert model.rank_correlation([1, 2, 3, 4], [9, 7, 3, 1]) == pytest.approx(-1)
    assert model.rank_correlation([1, 1, 2, 2], [1, 2, 3, 4]) == pytest.approx(2 / math.sqrt(5))


@pytest.mark.parametrize("card", ["NVIDIA A100", "NVIDIA GeForce RTX 4090", "NVIDIA H200"])
def test_the_model_declines_every_feed_forward_chain_of_the_experiments(card):
    pytest.importorskip("torch")
    from stof_kernels.baselines.mcfuser_planner.attention import predicted
    from stof_kernels.integrations.models import MODELS

    peaks = known_peaks(card)
    chains = {
        Chain(batch * spec.tokens(seq_len), spec.paper.ffn, spec.paper.hidden, spec.paper.hidden, step="gelu")
        for spec in MODELS.values()
        for batch, seq_len in ((1, 128), (8, 512), (16, 2048))
    }
    assert len(chains) == 12
    for chain in chains:
        assert predicted(chain, peaks) > 2 * model.unfused_seconds(chain, peaks), chain


# ---- search ----------------------------------------------------------------------------------------------------------


def device_of(seed: int):
    """Times of a made-up device: the model's, with costs of small tiles, spilled registers and noise that it knows not of."""

    def time(c: Candidate) -> float:
        noise = random.Random(f"{seed} {c.key}").uniform(0.95, 1.05)
        spill = 1.0 if pruning.accumulators(c) <= 96 else 1.5
        return model.estimate(c, H200).seconds * (1 + 24 / c.tiles.n + 8 / c.tiles.h) * spill * noise

    return time


def run_search(chain, seed=0, time=None, most=SearchSettings(), **values):  # noqa: B008  # frozen
    values["settings"] = replace(most, seed=seed)
    time = time or device_of(seed)
    measured = []

    def measure(candidates):
        measured.extend(candidates)
        return [time(c) for c in candidates]

    space = space_of(chain, H200)
    found = search(space, lambda c: model.estimate(c, H200).seconds, measure, **values)
    return found, measured, min(map(time, space))


@pytest.mark.parametrize(("batch", "seq_len"), [(1, 512), (8, 1024), (16, 2048)])
def test_the_search_comes_within_ten_percent_by_measuring_few(batch, seq_len):
    chain = attention_chain(batch, 12, seq_len, seq_len, 64)
    regrets = []
    for seed in range(5):
        found, measured, best = run_search(chain, seed)
        regrets.append(device_of(seed)(found.best) / best)
        assert found.ended == "converged"
        assert len(measured) <= 0.25 * len({c.key for c in space_of(chain, H200)})
        assert len({c.key for c in measured}) == len(measured)  # no kernel is measured twice
    assert sorted(regrets)[3] <= 1.05


@pytest.mark.parametrize(
    ("singles", "replays", "hopeless", "us", "asked"),
    [
        ([44.0], 5.0, math.inf, 5.0, [45]),  # what a launch takes on the host is not taken for the kernel's time
        ([44.0], 5.0, 20.0, 5.0, [45]),  # nor does it make a kernel hopeless
        ([900.0, 30.0], 6.0, 20.0, 6.0, [66]),  # one that was disturbed once
        ([400.0, 390.0, 380.0, 385.0], 0.0, math.inf, 380.0, []),
        ([400.0, 390.0], 0.0, 300.0, 390.0, []),
        ([60_000.0], 0.0, math.inf, 60_000.0, []),
        ([1.0], 1.0, math.inf, 1.0, [100]),
    ],
)
def test_a_kernel_is_timed_by_the_device_and_not_by_its_launch(singles, replays, hopeless, us, asked):
    left, calls = list(singles), []
    found = tuning.device_us(lambda: left.pop(0), lambda n: calls.append(n) or replays, hopeless)
    assert (found, calls, left) == (us, asked, [])


def test_a_kernel_that_breaks_the_device_is_named_and_ends_the_search(monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tuning, "seconds_of", broken)
    meter = tuning.Meter(None, [torch.empty(0, device="meta")], H200)
    monkeypatch.setattr(tuning.Meter, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    kernel = tuning.Kernel(pruning.Candidate(NK, Tiles(64, 64, 64, 64), attention_chain(1, 12, 128, 128, 64)), None)
    with pytest.raises(
        RuntimeError, match=r"after mhnk 64x64x64x64, 4 warps, 3 stages the device is unusable .*illegal"
    ):
        meter._time(kernel, "")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert meter._time(kernel, "") == math.inf
    assert meter.trials[-1].problem == "an illegal memory access was encountered"


def test_a_seed_repeats_a_search_and_another_differs():
    chain = attention_chain(8, 12, 1024, 1024, 64)
    first, again, other = (run_search(chain, seed, time=device_of(9))[1] for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_out_of_time_ends_after_the_round():
    found, measured, _ = run_search(EXAMPLE, out_of_time=lambda: True, most=SearchSettings(measured=5))
    assert (found.rounds, found.ended, len(measured)) == (1, "out of time", 5)


def test_kernels_that_cannot_run_are_passed_over():
    time = device_of(1)
    found, _, _ = run_search(EXAMPLE, 1, time=lambda c: math.inf if c.tiles.m >= 128 else time(c))
    assert found.best.tiles.m < 128
    found, _, _ = run_search(EXAMPLE, 1, time=lambda c: math.inf)
    with pytest.raises(ValueError, match="no candidate could be built and run"):
        _ = found.best
    with pytest.raises(ValueError, match="no candidate survives the rules"):
        search([], lambda c: 1.0, lambda cs: [1.0] * len(cs))


def test_a_mutation_changes_one_thing_inside_the_space():
    space = space_of(EXAMPLE, A100)
    moves, rng = Moves.of(space), random.Random(5)
    for parent in rng.sample(space, 50):
        child = mutated(parent, moves, rng)
        assert child in moves.allowed
        changed = (child.expression != parent.expression) + sum(
            child.tiles.size(loop) != parent.tiles.size(loop) for loop in LOOPS
        )
        assert changed == 1
    alone = Moves.of(space[:1])
    assert mutated(space[0], alone, rng) == space[0]


# ---- registration ----------------------------------------------------------------------------------------------------


def test_the_methods_are_registered_with_their_label():
    spec = get("mcfuser")
    assert (spec.label, spec.devices, spec.reimplemented) == ("MCFuser (reimpl.)", ("cuda",), True)
    assert spec.exact_by_design
    assert "baselines/mcfuser_planner" in spec.depends
    whole = get("mcfuser", "model")
    assert (whole.label, whole.tuned, whole.experiments) == (spec.label, True, ("end_to_end", "tuning_cost"))
    assert get("mcfuser_expanded").experiments == get("mcfuser_exp").experiments == ()


def test_planning_needs_no_torch():
    code = (
        "import sys\nfrom stof_kernels.baselines.mcfuser_planner import pruning, model, search\n"
        "from stof_kernels.baselines import get; get('mcfuser')\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_expressions_are_checked():
    with pytest.raises(ValueError, match="allowed"):
        Expression("mnkk")
