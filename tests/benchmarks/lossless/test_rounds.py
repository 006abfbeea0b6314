"""Variants take turns, and batches that other processes disturbed are timed once more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from cascade.benchmarks.lossless.rounds import Clocks, Round, time_rounds
from cascade.benchmarks.lossless.variants import DecodingVariant, Made, PromptBatch

_IDS = torch.zeros((1, 2), dtype=torch.long)


@dataclass
class Machine:
    """A machine on which every variant takes a second, with two threads.

    Attributes:
        stolen: The share of CPU time that other processes take, by the number of the run.
        loads: The load average of each round; the last one holds.
        runs: The names of the variants that ran.
    """

    stolen: dict[int, float] = field(default_factory=dict)
    loads: list[float] = field(default_factory=lambda: [0.0])
    runs: list[str] = field(default_factory=list)
    wall: float = 0.0
    cpu: float = 0.0

    def variant(self, name: str, most: int | None = None) -> DecodingVariant:
        def run(batch: PromptBatch) -> Made:
            stolen = self.stolen.get(len(self.runs), 0.0)
            self.runs.append(name)
            self.cpu += 2.0
            self.wall += 1.0 / (1.0 - stolen)
            return Made(batch.ids)

        return DecodingVariant(name, run, most)

    def load(self) -> float:
        return self.loads.pop(0) if len(self.loads) > 1 else self.loads[0]

    def time(self, count: int, **most: int) -> list[Round]:
        names = ("generate", "full", "lookup")
        rounds, failed = time_rounds(
            {name: self.variant(name, most.get(name)) for name in names},
            [PromptBatch(_IDS, torch.ones_like(_IDS), 4, 8)] * count,
            seed=0,
            threads=2,
            clocks=Clocks(lambda: self.wall, lambda: self.cpu, self.load),
        )
        assert not failed
        return rounds


def test_each_variant_is_first_in_turn() -> None:
    rounds = Machine().time(6)
    orders = [found.order for found in rounds]
    assert {order[0] for order in orders[:3]} == {"generate", "full", "lookup"}
    assert orders[3:] == orders[:3]
    assert not any(found.repeated for found in rounds)


def test_a_slow_variant_is_timed_on_few_batches() -> None:
    rounds = Machine().time(5, full=2)
    assert ["full" in found.runs for found in rounds] == [True, True, False, False, False]


def test_a_round_that_lost_cpu_time_is_repeated_once() -> None:
    machine = Machine(stolen={4: 0.5})  # in the second round
    rounds = machine.time(4)
    assert [found.repeated for found in rounds] == [False, True, False, False]
    assert rounds[1].disturbed is None
    assert all(run.seconds == 1.0 for run in rounds[1].runs.values())
    assert len(machine.runs) == 4 * 3 + 3


def test_a_round_that_is_disturbed_twice_keeps_the_faster_times() -> None:
    steal = dict.fromkeys(range(3, 6), 0.5) | dict.fromkeys(range(12, 15), 0.3)
    rounds = Machine(stolen=steal).time(4)
    assert rounds[1].repeated
    assert "CPU seconds per second, usually 2.00" in str(rounds[1].disturbed)
    assert rounds[1].runs["generate"].seconds < 1.5


def test_a_round_under_load_is_repeated() -> None:
    rounds = Machine(loads=[0.0, 3.5, 0.0]).time(3)
    assert [found.repeated for found in rounds] == [False, True, False]
    assert rounds[1].disturbed is None


def test_a_load_that_lasts_is_in_the_result() -> None:
    rounds = Machine(loads=[9.0]).time(2)
    assert all(found.repeated for found in rounds)
    assert str(rounds[0].disturbed).startswith("load average 9.0 with 2 threads on ")


def test_the_device_is_waited_for_before_and_after_each_run() -> None:
    machine, waits = Machine(), []
    wait: Callable[[], None] = lambda: waits.append(len(machine.runs))  # noqa: E731
    time_rounds(
        {"generate": machine.variant("generate")},
        [PromptBatch(_IDS, torch.ones_like(_IDS), 4, 8)],
        seed=0,
        threads=2,
        synchronize=wait,
        clocks=Clocks(lambda: machine.wall + 1, lambda: machine.cpu, lambda: None),
    )
    assert waits == [0, 1]


@pytest.mark.parametrize("bad", ["full", "generate"])
def test_a_variant_that_fails_later_is_left_out_and_the_others_go_on(bad: str) -> None:
    machine, runs = Machine(), []

    def fail(batch: PromptBatch) -> Made:
        runs.append(batch)
        if len(runs) == 2:
            raise MemoryError("no memory for the second batch")
        return Made(batch.ids)

    found = {name: machine.variant(name) for name in ("generate", "full")}
    found[bad] = DecodingVariant(bad, fail)
    batches = [PromptBatch(_IDS, torch.ones_like(_IDS), 4, 8)] * 4
    if bad == "generate":
        with pytest.raises(MemoryError):
            time_rounds(found, batches, seed=0, threads=2)
        return
    rounds, failed = time_rounds(found, batches, seed=0, threads=2)
    assert failed == {"full": "no memory for the second batch"}
    assert [found.order for found in rounds] == [["generate"]] * 4
    assert [list(found.runs) for found in rounds] == [["generate"]] * 4
    assert len(runs) == 2
