"""Test interleaved rounds, and ratios within one round. No test asserts a speed."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.benchmarks import timing

NAMES = ("a", "b", "c", "d")
PAIRS = (("a", "b"), ("b", "a"), ("c", "a"), ("d", "c"))


class CallCountingClock:
    """A clock that every run of a variant advances by the seconds of that variant."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.now = 0.0
        self.ran: list[str] = []
        self.seconds = seconds

    def __call__(self) -> float:
        return self.now

    def variants(self) -> dict[str, timing.Variant]:
        return {name: lambda name=name: self.run(name) for name in self.seconds}

    def run(self, name: str) -> str:
        self.ran.append(name)
        self.now += self.seconds[name]
        return name


def test_every_round_runs_every_variant_once_in_a_new_order():
    clock = CallCountingClock({"a": 1.0, "b": 2.0, "c": 4.0})
    timings = timing.time_variants(clock.variants(), rounds=20, seed=0, clock=clock)
    assert timings.results == {"a": "a", "b": "b", "c": "c"}
    rounds = [clock.ran[start : start + 3] for start in range(0, len(clock.ran), 3)]
    assert rounds[1:] == timings.order
    assert len(timings.order) == 20
    assert all(sorted(order) == ["a", "b", "c"] for order in timings.order)
    assert len({tuple(order) for order in timings.order}) > 1
    assert timings.seconds == {"a": [1.0] * 20, "b": [2.0] * 20, "c": [4.0] * 20}


def test_the_seed_determines_the_orders():
    def orders(seed: int) -> list[list[str]]:
        clock = CallCountingClock(dict.fromkeys("abcdef", 1.0))
        return timing.time_variants(clock.variants(), rounds=5, seed=seed, clock=clock).order

    assert orders(1) == orders(1)
    assert orders(1) != orders(2)


def test_the_device_is_synchronized_before_the_clock_starts_and_before_it_stops():
    events: list[str] = []
    timing.time_variants(
        {"variant": lambda: events.append("run")},
        rounds=1,
        seed=0,
        clock=lambda: float(events.append("clock") or 0),
        synchronize=lambda: events.append("wait"),
    )
    assert events == ["run", "wait", "clock", "run", "wait", "clock"]


def test_too_many_threads_are_refused():
    before, most = torch.get_num_threads(), 8 * (os.cpu_count() or 1)
    with timing.pinned_threads(most):
        assert torch.get_num_threads() == most
    for threads in (most + 1, 99_999, 10**30):
        with pytest.raises(timing.BenchmarkError) as error, timing.pinned_threads(threads):
            pytest.fail("the block was entered")
        assert str(error.value) == (
            f"expected --threads of at most {most} (8 per core), got {threads}; use fewer"
        )
    assert torch.get_num_threads() == before


def test_threads_are_restored_after_a_failure():
    before = torch.get_num_threads()
    inside = before + 1

    def fail() -> None:
        with timing.pinned_threads(inside):
            assert torch.get_num_threads() == inside
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.get_num_threads() == before


@given(
    st.lists(st.tuples(*[st.floats(0.01, 100)] * len(NAMES)), min_size=2, max_size=9),
    st.integers(0, 9),
)
def test_an_interval_contains_the_median_and_lies_within_the_rounds(
    rounds: list[tuple[float, ...]], seed: int
):
    seconds = dict(zip(NAMES, map(list, zip(*rounds, strict=True)), strict=True))
    for row in timing.ratio_rows(seconds, PAIRS, seed=seed):
        low, high = row.interval
        # Interpolation between two equal numbers can differ from them in the last bit.
        slack = 1e-12 * row.median
        assert low - slack <= row.median <= high + slack
        assert min(row.rounds) - slack <= low
        assert high <= max(row.rounds) + slack


def test_a_ratio_compares_seconds_of_the_same_round():
    seconds = {name: [10.0, 1.0, 100.0] for name in NAMES}
    seconds["a"] = [20.0, 2.0, 200.0]
    rows = {row.name: row for row in timing.ratio_rows(seconds, PAIRS, seed=0)}
    assert list(rows) == ["a/b", "b/a", "c/a", "d/c"]
    assert rows["a/b"].rounds == [2.0, 2.0, 2.0]
    assert rows["a/b"].interval == [2.0, 2.0]
    assert rows["c/a"].median == 0.5
