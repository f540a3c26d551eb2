"""Moves, the two-stage search with costs that are made up, and the plan cache."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stof_kernels.fusion import blocks, cache, costs, graph, segments
from stof_kernels.fusion.capture import capture
from stof_kernels.fusion.costs import Clock, OutOfTime
from stof_kernels.fusion.graph import Kind
from stof_kernels.fusion.moves import COMPETE, EXPAND, SEIZE, moves
from stof_kernels.fusion.plan import BlockPlan, Choice, FusionPlan
from stof_kernels.fusion.scheme import FusionScheme
from stof_kernels.fusion.search import Search, SearchSettings, reward

C, M, A = Kind.COMPUTE, Kind.MEMORY, Kind.ATTENTION


# ---- moves -----------------------------------------------------------------------------------------------------------


@st.composite
def situations(draw):
    kinds = draw(st.lists(st.sampled_from([C, M, M]), min_size=1, max_size=12))
    scheme = FusionScheme.decode(draw(st.integers(0, (1 << len(kinds)) - 1)), len(kinds))
    products = [i for i, kind in enumerate(kinds) if kind is C]
    if scheme.illegal(kinds) or not products:
        scheme, kinds, products = FusionScheme.unfused(2), [C, M], [0]
    return scheme, kinds, draw(st.sampled_from(products))


@given(situations())
def test_every_move_is_legal_and_changes_one_boundary(situation):
    scheme, kinds, product = situation
    for name, moved in moves(scheme, kinds, product):
        assert moved.illegal(kinds) is None
        gone = set(scheme.boundaries) - set(moved.boundaries)
        come = set(moved.boundaries) - set(scheme.boundaries)
        if name == EXPAND:
            assert (len(gone), len(come)) == (1, 0)
        else:
            assert (len(gone), len(come)) == (1, 1)
            assert abs(gone.pop() - come.pop()) == 1


def found(scheme, kinds, product):
    return {(name, str(moved)) for name, moved in moves(scheme, kinds, product)}


def test_expand_takes_a_whole_neighbour_and_attention_never_moves():
    scheme = FusionScheme((1, 1, 2, 1))
    assert found(scheme, [C, A, M, M, C], 0) == set()
    assert (EXPAND, "[1] [2] [3-5]") in found(scheme, [C, A, M, M, C], 4)


def test_seize_takes_one_operator_of_a_memory_intensive_segment():
    assert (SEIZE, "[1-2] [3]") in found(FusionScheme((1, 2)), [C, M, M], 0)
    assert (SEIZE, "[1] [2-3]") in found(FusionScheme((2, 1)), [M, M, C], 2)


def test_compete_takes_from_a_segment_with_as_many_products():
    scheme = FusionScheme((1, 2))
    assert (COMPETE, "[1-2] [3]") in found(scheme, [C, M, C], 0)
    # Two products against one: the segment with one goes first and gives nothing away.
    assert not any(name == COMPETE for name, _ in found(FusionScheme((3, 2)), [C, M, C, M, C], 0))
    assert (COMPETE, "[1-2] [3-5]") not in found(FusionScheme((3, 2)), [C, M, C, C, M], 0)


def test_no_third_product():
    assert not any(s == "[1-3]" for _, s in found(FusionScheme((2, 1)), [C, C, C], 0))


# ---- search ----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.a, self.b, self.n = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.LayerNorm(width)

    def forward(self, x):
        return self.n(x + self.b(torch.relu(self.a(x))))


class Stack(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def stack():
    return graph.build(capture(Stack().eval(), (torch.randn(300, 16),)))


class Table:
    """Costs by the names of a segment's operators; remembers what it was asked."""

    def __init__(self, table, noise=None, limit=math.inf):
        self.table, self.asked, self.noise, self.limit = table, [], noise, limit
        self.named = []

    def cost(self, segment, template, setting):
        if len(self.asked) >= self.limit:
            raise OutOfTime
        self.asked.append((segment.key, template, setting))
        self.named.append((str(segment), template, setting))
        base = self.table.get(str(segment), 10.0 * len(segment.ops))
        return base if self.noise is None else base + self.noise(template, setting)


def run(stack, table, **settings):
    parts = blocks.split(stack)
    lines = []
    search = Search(stack, parts, SearchSettings(**settings), table, Clock(1e9), lines.append)
    return search.run(), lines


def test_the_best_scheme_is_found_and_the_rest_rolled_back(stack):
    table = Table(
        {"linear + relu": 12.0, "add + layer_norm": 11.0, "linear + add": 40.0, "linear + add + layer_norm": 50.0}
    )
    plan, lines = run(stack, table, templates=())
    (block,) = plan.blocks
    assert (block.count, str(block.scheme)) == (3, "[1-2] [3] [4-5]")
    assert block.cost_us == 3 * (12 + 10 + 11)
    assert any("expand -> [1-2] [3] [4-5]" in line for line in lines)


def test_a_chain_of_products_may_win(stack):
    plan, _ = run(stack, Table({"linear + relu + linear": 5.0, "linear + relu": 15.0}), templates=())
    assert "[1-3]" in str(plan.blocks[0].scheme)


def test_without_gain_nothing_is_fused(stack):
    class Additive(Table):
        def cost(self, segment, template, setting):
            return 10.0 * len(segment.ops)

    plan, _ = run(stack, Additive({}), templates=())
    assert plan.counts["kept"] == 0
    assert plan.blocks[0].scheme == FusionScheme.unfused(5)


def test_no_candidate_is_measured_twice(stack):
    table = Table({}, noise=lambda template, setting: hash((template, setting)) % 7)
    run(stack, table, samples=3)
    assert len(table.asked) == len(set(table.asked))


def test_a_seed_makes_it_repeatable(stack):
    def cost(template, setting):
        return sum(v for _, v in setting) % 11 - (5 if template == "gemm" else 0)

    results = []
    for seed in (1, 1, 2):
        table = Table({}, noise=cost)
        plan, lines = run(stack, table, samples=2, seed=seed)
        results.append((plan.blocks, table.asked, lines))
    assert results[0] == results[1]
    assert results[0][1] != results[2][1]


def test_the_second_stage_tries_everything_that_is_left(stack):
    table = Table({"linear": 10.0}, noise=lambda template, setting: -1.0 if dict(setting).get("BM") == 32 else 0.0)
    plan, _ = run(stack, table, samples=1)
    if any(t != "eager" and t != "inductor" for _, t, _ in table.asked):  # Triton is there
        assert plan.counts["rounds"] > 1
        assert any(dict(c.setting).get("BM") == 32 for c in plan.blocks[0].choices)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The search as it goes on CUDA, where Inductor has to be worth its seconds."""
    monkeypatch.setattr(segments.Segment, "device", property(lambda self: torch.device("cuda")))


def test_on_cuda_inductor_is_asked_where_it_is_worth_it(stack, as_on_cuda):
    single = {"linear": 100.0, "relu": 30.0, "add": 1.0, "layer_norm": 20.0}
    # Fused segments cost what their operators cost apart, but for one.
    runs = [list(single)[i:j] for i in range(4) for j in range(i + 1, 5)]
    prices = {" + ".join(names): sum(single[n] for n in names) for names in (*runs, ["relu", "linear"])}
    prices |= {
        "linear + relu": 105.0,
        "linear + relu + linear": 230.0,
        "linear + add": 101.0,
        "relu + linear + add": 131.0,
    }
    prices |= {"linear + add + layer_norm": 121.0, "relu + linear + add + layer_norm": 151.0}
    prices |= {"linear + relu + linear + add": 231.0, "linear + relu + linear + add + layer_norm": 251.0}
    table = Table(prices, noise=lambda template, setting: -8.0 if template == "inductor" else 0.0)
    plan, _ = run(stack, table, templates=("inductor",))
    asked = {(str(k), template) for k, template, _ in table.named}
    assert ("relu", "inductor") in asked
    assert ("add", "inductor") not in asked  # less than 5 % of a layer
    assert ("linear", "inductor") not in asked  # nothing to fuse
    # Several operators that only eager could run are not measured: they cost what they cost apart.
    assert not any("+" in name and template == "eager" and (name, "inductor") not in asked for name, template in asked)
    assert plan.blocks[0].cost_us < 3 * 215


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_on_cuda_inductor_is_not_asked_to_join_what_templates_run(stack, as_on_cuda):
    joined = {
        "relu + linear": 1.0,
        "add + layer_norm + linear": 1.0,
    }  # no template runs these, but one runs each operator
    table = Table(joined, noise=lambda template, setting: -1.0 if template == "inductor" else 0.0)
    run(stack, table, templates=("rowwise", "inductor"))
    assert {template for _, template, _ in table.named} == {"eager", "rowwise"}
    run(stack, table, templates=("inductor",))
    assert ("add + layer_norm", "inductor") in {(name, template) for name, template, _ in table.named}


@pytest.mark.parametrize("limit", [0, 1, 3, 5])
def test_out_of_time_the_plan_is_the_best_so_far(stack, limit):
    plan, lines = run(stack, Table({"add + layer_norm": 1.0}, limit=limit), templates=())
    assert plan.blocks[0].scheme.operators == 5
    assert len(plan.blocks[0].choices) == len(plan.blocks[0].scheme.segments)
    assert any("budget" in line for line in lines)


def test_a_candidate_that_cannot_run_never_wins(stack):
    table = Table({}, noise=lambda template, setting: math.inf if template != "eager" else 0.0)
    plan, _ = run(stack, table, samples=2)
    assert {c.template for c in plan.blocks[0].choices} == {"eager"}


def test_bad_settings_are_one_line():
    with pytest.raises(ValueError, match="budget_s is -1, allowed: seconds >= 0"):
        SearchSettings(budget_s=-1)
    with pytest.raises(ValueError, match="integers from there on"):
        SearchSettings(samples=-1)


def test_the_least_gain_there_is_takes_the_whole_reward():
    assert reward({"a": 1.0}, {"a": 5e-324}, ["a"]) == {"a": 1.0}


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(-5, 100), min_size=1),
    st.data(),
)
def test_reward_gives_every_segment_a_share_and_the_larger_gain_the_larger_one(gains, data):
    left = data.draw(st.lists(st.sampled_from(sorted(gains)), unique=True))
    shares = reward(dict.fromkeys(gains, 1.0), gains, left)
    assert set(shares) == set(left)
    if left:
        assert sum(shares.values()) == pytest.approx(1.0)
        assert min(shares.values()) >= 0.5 / len(left) - 1e-9
    ordered = sorted(left, key=lambda key: max(0.0, gains[key]))
    assert all(shares[a] <= shares[b] + 1e-9 for a, b in itertools.pairwise(ordered))


def test_the_start_joins_frequent_runs_and_with_few_rows_a_chain(stack):
    (block,) = blocks.split(stack)
    assert [str(s) for s in blocks.start_schemes(stack, block)] == ["[1] [2] [3] [4-5]"]
    few = graph.build(capture(Stack().eval(), (torch.randn(8, 16),)))
    starts = blocks.start_schemes(few, blocks.split(few)[0])
    assert [str(s) for s in starts] == ["[1] [2] [3] [4-5]", "[1-3] [4-5]"]


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_wrong_results_are_refused():
    good = torch.randn(4, 5)
    assert costs.disagreement([good.clone()], (good,)) is None
    assert "differs by" in costs.disagreement([good + 0.01], (good,))
    assert "differs by" in costs.disagreement([good * torch.nan], (good,))
    assert "expected" in costs.disagreement([good.half()], (good,))
    assert "an integer result differs" in costs.disagreement([torch.tensor([1])], (torch.tensor([2]),))


def test_the_clock_keeps_its_budget():
    clock = Clock(0.0)
    with pytest.raises(OutOfTime):
        clock.require()
    roomy = Clock(100.0)
    roomy.require(50.0)
    with pytest.raises(OutOfTime):
        roomy.require(101.0)
    with roomy.on("encoding"):
        pass
    assert 0 < roomy.spent["encoding"] < 1


# ---- cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path))
    return tmp_path


def some_plan(cost=3.0):
    choices = (Choice("gemm", (("BM", 16), ("BN", 32)), cost), Choice())
    return FusionPlan([BlockPlan(0, 3, 2, 0b001, choices)], {"total": 1.0}, {"schemes": 4})


def test_a_plan_comes_back_as_it_went(folder):
    depends = {"graph": "g", "search": {"seed": 0}}
    assert cache.load(depends) is None
    cache.store(depends, some_plan())
    assert cache.load(depends) == some_plan()
    assert cache.load({**depends, "search": {"seed": 1}}) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", "truncate", "edit", "binary", "template", "scheme"])
def test_a_damaged_file_is_as_good_as_none(folder, damage):
    depends = {"graph": "g"}
    cache.store(depends, some_plan())
    path = cache.path_of(depends)
    text = path.read_text()
    if damage == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif damage in ("template", "scheme"):
        data = json.loads(text)
        data["plan"]["blocks"][0]["choices"][0]["template"] = "unknown"
        if damage == "scheme":
            data["plan"]["blocks"][0]["choices"].pop()
        data["checksum"] = cache._checksum(data["plan"])
        path.write_text(json.dumps(data))
    else:
        changed = {"truncate": text[: len(text) // 2], "edit": text.replace("3.0", "4.0")}
        path.write_text(changed.get(damage, damage))
    assert cache.load(depends) is None
    cache.store(depends, some_plan())
    assert cache.load(depends) == some_plan()


def test_concurrent_writers_leave_a_whole_file(folder):
    depends = {"graph": "g"}
    plans = [some_plan(float(i)) for i in range(20)]

    def write_and_read(plan):
        cache.store(depends, plan)
        return cache.load(depends)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(write_and_read, plans))
    assert all(plan in plans for plan in read)
    assert [p.suffix for p in (folder / "plans").iterdir()] == [".json"]


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path / "file"))
    cache.store({"graph": "g"}, some_plan())
    assert cache.load({"graph": "g"}) is None


def test_the_key_follows_structure_and_dataflow(stack):
    settings = {"seed": 0}
    depends = cache.dependencies(stack, settings)
    again = graph.build(capture(Stack().eval(), (torch.randn(300, 16),)))
    assert cache.dependencies(again, settings) == depends
    for other in (Stack(2), Stack()):
        shape = (300, 16) if len(other.layers) == 2 else (301, 16)
        changed = cache.dependencies(graph.build(capture(other.eval(), (torch.randn(shape),))), settings)
        assert cache.path_of(changed) != cache.path_of(depends)
