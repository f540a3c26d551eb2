"""The planner on numbers alone."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from stof_kernels import planner
from stof_kernels.formats import CELL
from stof_kernels.kernels import instances
from stof_kernels.planner import AttentionProblem, KernelConfig, MaskStats, choose, cpu_spec, paper_score
from stof_kernels.planner.config import SHAPES
from stof_kernels.planner.device import CUDA_BLOCK_COSTS
from stof_kernels.provenance import PACKAGE_ROOT

DEVICE = cpu_spec(2)


def problem(seq_len=2048, cells_per_strip=10.0, partial=0.3, kept_per_cell=256.0, head_dim=64, dtype="float32"):
    n = -(-seq_len // 16)
    cells = round(n * cells_per_strip)
    stats = MaskStats(cells, round(cells * partial), round(cells * kept_per_cell), n, n, 1)
    return AttentionProblem(1, 12, 12, seq_len, seq_len, head_dim, dtype, stats)


def test_cheapest_feasible_candidate_is_chosen():
    plan = choose(problem(), DEVICE)
    assert plan.predicted_us == min(us for _, us in plan.ranking)
    assert plan.ranking[0][0] == plan.config
    assert {c for c, _ in plan.ranking} | {c for c, _ in plan.rejected} == set(planner.candidates(DEVICE))


def test_thin_cells_go_row_wise_and_filled_cells_block_wise():
    assert choose(problem(kept_per_cell=8, partial=1.0), DEVICE).config.kernel == planner.ROW_WISE
    assert choose(problem(kept_per_cell=256, partial=0.0), DEVICE).config.kernel == planner.BLOCK_WISE


@pytest.mark.parametrize("field", ["cells_per_strip", "seq_len", "head_dim"])
def test_more_work_is_predicted_to_take_longer(field):
    small, large = (
        {field: v} for v in ({"cells_per_strip": (10, 40), "seq_len": (512, 2048), "head_dim": (64, 128)}[field])
    )
    for config in planner.candidates(DEVICE):
        assert planner.predict_us(config, DEVICE, problem(**large)) > planner.predict_us(
            config, DEVICE, problem(**small)
        )


def test_more_threads_are_predicted_to_be_faster():
    config = KernelConfig(planner.BLOCK_WISE, 16, 256)
    times = [planner.predict_us(config, cpu_spec(n), problem()) for n in (1, 2, 8, 64)]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[1] == pytest.approx(2, rel=0.1)


def test_paper_selector_is_equation_one():
    p = problem(seq_len=1024, cells_per_strip=6.4)
    assert paper_score(p) == pytest.approx(410 / 64**2 - 1.2 / 36)
    assert choose(p, DEVICE, "paper").config.kernel == planner.BLOCK_WISE
    thin = problem(seq_len=4096, cells_per_strip=2.0)
    assert paper_score(thin) == pytest.approx(2 / 256 - 1.2 / 64)
    assert choose(thin, DEVICE, "paper").config.kernel == planner.ROW_WISE
    assert paper_score(problem(seq_len=16, cells_per_strip=1)) == -math.inf


SHORT_SHAPES = ("hopper_split", "hopper_quad")


def causal(batch, seq_len):
    """Causal attention of 12 heads of 64 dims, as a CUDA device's planner sees it."""
    strips = seq_len // 16
    tiles = tuple(
        planner.TileStats(q, sum(-(-(i + 1) * q // 64) for i in range(seq_len // q)), seq_len // 64) for q in (64, 128)
    )
    cells = strips * (strips + 1) // 2
    stats = MaskStats(cells, strips, seq_len * (seq_len + 1) // 2, strips, strips, 1, tiles)
    return AttentionProblem(batch, 12, 12, seq_len, seq_len, 64, "float16", stats)


def chosen_on_h200(batch, seq_len):
    device = planner.cuda_spec("NVIDIA H200", (9, 0), 132, 228 << 10, 64)
    return SHAPES[choose(causal(batch, seq_len), device).config.shape - 1]


# Microseconds on an H200 at (1, 4096): hopper 54, hopper_quad 96, hopper_split 130.
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 4096), (8, 1024), (16, 4096), (1, 32768)])
def test_shapes_for_short_calls_are_left_to_short_calls(batch, seq_len):
    assert chosen_on_h200(batch, seq_len) == "hopper"


# As measured there, microseconds: hopper, hopper_split, hopper_quad. Where two are within 4 % either will do.
@pytest.mark.parametrize(
    ("batch", "seq_len", "measured"),
    [
        (1, 128, (3.99, 3.03, 3.02)),
        (1, 256, (4.94, 4.12, 3.52)),
        (1, 512, (6.61, 7.49, 5.07)),
        pytest.param(
            1,
            1024,
            (10.91, 14.96, 10.38),
            marks=pytest.mark.xfail(
                strict=True, reason="the rounded costs make it a tie, and hopper comes first: 5 % slower"
            ),
        ),
        (2, 128, (3.97, 3.28, 3.08)),
        (2, 256, (5.01, 4.88, 4.25)),
        (4, 128, (4.11, 3.71, 3.59)),
        (4, 256, (5.52, 5.56, 6.78)),
        (2, 512, (7.27, 8.63, 8.27)),
        (8, 128, (4.68, 4.11, 6.15)),
        (8, 256, (6.49, 8.10, 11.21)),
        (16, 128, (6.04, 6.81, 9.80)),
        (1, 2048, (22.3, 30.1, 36.8)),
    ],
)
def test_short_causal_calls_get_the_shape_that_was_fastest(batch, seq_len, measured):
    times = dict(zip(("hopper", "hopper_split", "hopper_quad"), measured, strict=True))
    assert times[chosen_on_h200(batch, seq_len)] <= 1.04 * min(measured)


def test_items_are_shared_only_where_every_block_finds_a_multiprocessor():
    device = planner.cuda_spec("NVIDIA H200", (9, 0), 132, 228 << 10, 64)
    quad = next(c for c in planner.candidates(device) if c.id.endswith("hopper_quad"))
    halved = CUDA_BLOCK_COSTS["hopper_quad"].halves * 64

    def gain(heads, seq_len):
        """Microseconds that sharing saves."""
        p = replace(causal(1, seq_len), heads=heads, kv_heads=heads)
        with pytest.MonkeyPatch.context() as patch:
            shared = planner.predict_us(quad, device, p)
            patch.setitem(CUDA_BLOCK_COSTS, "hopper_quad", replace(CUDA_BLOCK_COSTS["hopper_quad"], halves=0))
            return planner.predict_us(quad, device, p) - shared

    assert gain(12, halved) > 0
    assert gain(12, halved - 64) == 0  # too short
    assert gain(12, 512) > gain(14, 512) > gain(17, 512) == 0  # of 96, 112 and 136 items: many, some, none


def test_a_turn_of_blocks_costs_the_same_however_few_the_last_ones_are():
    device = planner.cuda_spec("NVIDIA H200", (9, 0), 132, 228 << 10, 64)
    split = next(c for c in planner.candidates(device) if c.id.endswith("hopper_split"))
    # 264, 288 and 528 items: one turn and two
    one, two, also_two = (planner.predict_us(split, device, causal(batch, 128)) for batch in (11, 12, 22))
    assert two - one > 1.0
    assert also_two - two < 2 * (two - one)


def test_shapes_that_are_not_built_for_a_head_dim_are_not_feasible():
    card = planner.cuda_spec("NVIDIA H200", (9, 0), 132, 228 * 1024, 64)
    wide = [c for c in planner.candidates(card) if planner.infeasible(c, card, problem(head_dim=256)) is None]
    assert {c.kernel for c in wide} == {planner.ROW_WISE, planner.BLOCK_WISE}
    split = next(c for c in planner.candidates(card) if c.id.endswith("hopper_split"))
    assert "hopper_split is for head dims up to 64, here 256" in planner.infeasible(split, card, problem(head_dim=256))


def test_explain_names_kernel_time_and_reasons():
    plan = choose(problem(), DEVICE).with_notes(("q is copied",))
    text = plan.explain()
    assert str(plan.config) in text.splitlines()[0]
    assert f"{plan.predicted_us:.1f} us" in text
    assert "<- chosen" in text
    assert "note: q is copied" in text
    assert "B=1 Hq=12 Hkv=12 Lq=2048 Lk=2048 D=64 float32" in text


def test_an_empty_mask_can_be_planned():
    empty = replace(problem(), mask=MaskStats(0, 0, 0, 0, 0, 1), q_len=0, kv_len=0)
    assert choose(empty, DEVICE).predicted_us > 0


def test_unknown_policy_and_device_are_refused():
    with pytest.raises(ValueError, match="policy 'best', allowed: cost, paper"):
        choose(problem(), DEVICE, "best")
    card = planner.cuda_spec("NVIDIA A100-SXM4-80GB", (8, 0), 108, 164 * 1024, 64)
    assert (card.arch, card.units) == ("sm_80", 108)
    assert planner.cuda_spec("Some new card", (12, 0), 170, 100 * 1024, 48).arch == "sm_120"


def test_blocks_that_the_planner_counts_on_fit_on_a_multiprocessor():
    short = {unit.tile.shape: unit.tile for unit in instances.instances("sm_90a") if unit.tile.shape in SHORT_SHAPES}
    assert set(short) == set(SHORT_SHAPES)
    for shape, tile in short.items():
        assert CUDA_BLOCK_COSTS[shape].blocks == tile.blocks
        assert (CUDA_BLOCK_COSTS[shape].halves > 0) == tile.shares
        assert tile.blocks * (tile.shared_bytes + 1024) <= 228 << 10  # a block's own KiB


def test_numbers_that_kernels_and_planner_both_state_agree():
    def constant(name: str, file: str) -> int:
        source = (PACKAGE_ROOT / "kernels" / "csrc" / file).read_text()
        return int(re.search(rf"\b{name} = (\d+)", source)[1])

    assert planner.CELL == CELL
    assert instances.SHAPES == planner.config.SHAPES
    least_shared = constant("kLeastShared", "attention/cuda/hopper_split_config.cuh")
    assert least_shared == CUDA_BLOCK_COSTS["hopper_quad"].halves
    assert constant("kMinChunk", "format/cuda/layout.cuh") == planner.cost._MIN_CHUNK
    assert constant("kMinChunkSplit", "format/cuda/layout.cuh") == planner.cost._MIN_CHUNK_FEW
    assert constant("kBlocksPerMultiprocessor", "bindings/format_cuda.cpp") == planner.cost._BLOCKS_PER_UNIT
