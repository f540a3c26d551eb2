"""The timer: quantiles, budgets, and that arms really take turns. A fake clock stands in for time."""

from __future__ import annotations

import time

import pytest

from stof_kernels.benchmarking.timing import (
    Budget,
    Timing,
    WallArm,
    device_arm,
    interleave,
    quantile,
    time_alone,
    time_arms,
)


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeArm:
    """Takes ``us`` of the fake clock per sample, ``cold`` more for the first one after another arm ran."""

    note = ""
    log: list[str] = []  # noqa: RUF012

    def __init__(self, name: str, clock: FakeClock, us: float, cold: float = 0.0):
        self.name, self.clock, self.us, self.cold = name, clock, us, cold

    def sample(self) -> float:
        us = self.us + (self.cold if not self.log or self.log[-1] != self.name else 0.0)
        self.log.append(self.name)
        self.clock.now += us / 1e6
        return us


@pytest.fixture
def clock():
    FakeArm.log = []
    return FakeClock()


def test_quantile_interpolates_between_neighbours():
    assert quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert quantile([7.0], 0.8) == 7.0


def test_timing_orders_its_quantiles_and_counts():
    timing = Timing.of([9.0, 1.0, 5.0, 3.0, 7.0])
    assert timing.p20 < timing.median == 5.0 < timing.p80
    assert timing.samples == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_sample": 3}, "key 'min_sample' is unknown, allowed: min_samples"),
        ({"min_samples": 0}, "min_samples is 0, allowed: a number >= 1"),
        ({"min_samples": 9, "max_samples": 3}, "max_samples is 3, allowed: >= min_samples"),
        ({"budget_s": "long"}, "budget_s is 'long'"),
        ({"warmup": True}, "warmup is True"),
    ],
)
def test_a_bad_budget_is_one_clear_line(settings, message):
    with pytest.raises(ValueError, match="timing: ") as error:
        Budget.from_settings(settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_arms_take_turns_and_get_as_many(clock):
    arms = [FakeArm("a", clock, 1000.0), FakeArm("b", clock, 3000.0)]
    turns = interleave(arms, Budget(min_samples=5, max_samples=1000, budget_s=0.2), clock)
    assert len(turns[0]) == len(turns[1]) >= 5
    starts = [name for previous, name in zip(["", *FakeArm.log], FakeArm.log, strict=False) if name != previous]
    assert starts == ["a", "b"] * len(turns[0])


def test_the_first_call_after_another_arm_counts_only_if_it_is_alone(clock):
    arms = [FakeArm("warm", clock, 100.0, cold=900.0), FakeArm("long", clock, 500_000.0, cold=1.0)]
    turns = interleave(arms, Budget(min_samples=3, max_samples=50, budget_s=0.1), clock)
    assert {t for turn in turns[0] for t in turn} == {100.0}
    assert [t for turn in turns[1] for t in turn] == [500_001.0] * len(turns[1])


def test_the_least_samples_are_taken_even_without_budget(clock):
    turns = interleave([FakeArm("a", clock, 1e6)], Budget(min_samples=4, max_samples=9, budget_s=0.0), clock)
    assert sum(len(turn) for turn in turns[0]) == 4


def test_sampling_ends_at_the_most_samples(clock):
    turns = interleave([FakeArm("a", clock, 1.0)], Budget(min_samples=1, max_samples=30, budget_s=100.0), clock)
    assert sum(len(turn) for turn in turns[0]) == 30


def test_sampling_ends_with_the_budget(clock):
    budget = Budget(min_samples=1, max_samples=10**6, budget_s=0.5)
    interleave([FakeArm("a", clock, 1000.0), FakeArm("b", clock, 1000.0)], budget, clock)
    assert 0.5 <= clock.now < 0.6


def test_wall_time_is_that_of_the_call():
    timing = time_arms([WallArm(lambda: time.sleep(0.003))], Budget(min_samples=3, budget_s=0.0))[0]
    assert 3000 <= timing.median < 30_000


def test_warm_up_is_not_timed():
    calls = []
    arm = device_arm(lambda: calls.append(1), "cpu", Budget(warmup=4))
    assert len(calls) == 4
    assert arm.sample() >= 0
    assert len(calls) == 5


def test_whole_calls_are_timed_after_one_that_is_not():
    calls = []
    timing = time_alone(lambda: calls.append(1), "cpu", samples=6, budget_s=10.0)
    assert (timing.samples, len(calls)) == (6, 7)
