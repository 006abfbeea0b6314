"""Timing variants batch by batch, in rotating order, and repeating what was disturbed."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from cascade.benchmarks.lossless.variants import (
    REFERENCE,
    DecodingVariant,
    Made,
    PromptBatch,
    reason_of,
)
from cascade.benchmarks.timing import load_average

#: A run is disturbed if its CPU time per second is below this share of the variant's median.
_LEAST_SHARE = 0.8

#: Busy processes beyond the threads of this one from which on a batch is disturbed.
_OTHERS = 1.0


@dataclass(frozen=True)
class Clocks:
    """What times are read from.

    Attributes:
        wall: Seconds, with any origin.
        cpu: CPU seconds of this process, with any origin.
        load: One-minute load average; None if unknown.
    """

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    load: Callable[[], float | None] = load_average


@dataclass(frozen=True)
class TimedRun:
    """One timed run of a variant.

    Attributes:
        seconds: Seconds.
        cpu_seconds: CPU seconds.
        made: What it made.
    """

    seconds: float
    cpu_seconds: float
    made: Made

    @property
    def cpu_share(self) -> float:
        """CPU seconds per second."""
        return self.cpu_seconds / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Round:
    """All variants on one batch.

    Attributes:
        order: Order of the variants.
        load: Load average before the round; None if unknown.
        runs: The run of each variant.
        repeated: Whether it was timed again.
        disturbed: How the times were disturbed; None if they were not.
    """

    order: list[str]
    load: float | None
    runs: dict[str, TimedRun]
    repeated: bool = False
    disturbed: str | None = None


def time_rounds(
    variants: Mapping[str, DecodingVariant],
    batches: Sequence[PromptBatch],
    *,
    seed: int,
    threads: int,
    synchronize: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda _: None,
    clocks: Clocks | None = None,
) -> tuple[list[Round], dict[str, str]]:
    """Time every variant on every batch, one variant after the other, in rotating order.

    Disturbed batches are timed once more at the end. The less disturbed times are kept.

    Args:
        variants: The variants, all of which run.
        batches: The batches.
        seed: Seed of the first order.
        threads: Threads that this process computes with.
        synchronize: Waits until the device has finished all submitted work.
        progress: Called with a message for each batch.
        clocks: What times are read from.

    Returns:
        The rounds, and the reason why a variant failed, by name. Rounds have no runs of it.

    Raises:
        Exception: The reference failed.
    """
    timer = _Timer(variants, synchronize, clocks or Clocks())
    names = list(variants)
    random.Random(seed).shuffle(names)
    rounds = []
    for number, batch in enumerate(batches):
        progress(f"Batch {number + 1} of {len(batches)}")
        turn = number % len(names)
        order = [
            name
            for name in (*names[turn:], *names[:turn])
            if variants[name].most is None or number < (variants[name].most or 0)
        ]
        rounds.append(timer.round(order, batch))
    usual = usual_shares(rounds)
    for number, found in enumerate(rounds):
        reason = disturbance(found, usual, threads)
        if reason is None:
            continue
        progress(f"Repeating batch {number + 1} ({reason})")
        again = timer.round(found.order[::-1], batches[number])
        rounds[number] = _less_disturbed(
            replace(found, disturbed=reason),
            replace(again, disturbed=disturbance(again, usual, threads)),
        )
    return [_without(found, timer.failed) for found in rounds], timer.failed


class _Timer:
    def __init__(
        self,
        variants: Mapping[str, DecodingVariant],
        synchronize: Callable[[], None],
        clocks: Clocks,
    ) -> None:
        self.variants, self.synchronize, self.clocks = variants, synchronize, clocks
        self.failed: dict[str, str] = {}

    def round(self, order: list[str], batch: PromptBatch) -> Round:
        """Time variants on a batch, without those that failed before."""
        found = Round([], self.clocks.load(), {})
        for name in order:
            if name in self.failed:
                continue
            try:
                found.runs[name] = self._run(name, batch)
                found.order.append(name)
            except Exception as error:
                # Other libraries fail in any way, e.g. on a longer text. The others go on.
                if name == REFERENCE:
                    raise
                self.failed[name] = reason_of(error)
        return found

    def _run(self, name: str, batch: PromptBatch) -> TimedRun:
        self.synchronize()
        start, cpu = self.clocks.wall(), self.clocks.cpu()
        made = self.variants[name].run(batch)
        self.synchronize()
        return TimedRun(self.clocks.wall() - start, self.clocks.cpu() - cpu, made)


def usual_shares(rounds: Sequence[Round]) -> dict[str, float]:
    """Return the median CPU time per second of each variant."""
    names = {name for found in rounds for name in found.runs}
    return {
        name: statistics.median(
            found.runs[name].cpu_share for found in rounds if name in found.runs
        )
        for name in names
    }


def disturbance(found: Round, usual: Mapping[str, float], threads: int) -> str | None:
    """Return how other processes disturbed a round, or None.

    Args:
        found: The round.
        usual: The usual CPU time per second of each variant.
        threads: Threads that this process computes with.
    """
    if found.load is not None and found.load > threads + _OTHERS:
        return f"load average {found.load:.1f} with {threads} threads on {os.cpu_count()} cores"
    for name, run in found.runs.items():
        if run.cpu_share < _LEAST_SHARE * usual[name]:
            return (
                f"{name} got {run.cpu_share:.2f} CPU seconds per second, usually {usual[name]:.2f}"
            )
    return None


def _without(found: Round, names: Collection[str]) -> Round:
    """Return a round without the runs of some variants."""
    return replace(
        found,
        order=[name for name in found.order if name not in names],
        runs={name: run for name, run in found.runs.items() if name not in names},
    )


def _less_disturbed(first: Round, again: Round) -> Round:
    """Return the round that was not disturbed; of two disturbed ones, the faster one."""
    if again.disturbed is None:
        return replace(again, repeated=True)
    faster = min(first, again, key=lambda found: found.runs[REFERENCE].seconds)
    return replace(faster, repeated=True)
