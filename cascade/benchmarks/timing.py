"""What every benchmark does: its set-up, interleaved rounds, ratios with intervals, targets."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from cascade.benchmarks.records import (
    BenchmarkProvenance,
    Ratio,
    Target,
    VariantTimes,
)
from cascade.core.arrays import Array
from cascade.core.errors import CascadeError
from cascade.core.schema import from_plain, to_plain
from cascade.stats.resampling import RESAMPLES, draws, interval

#: One way to do the benchmark's work once. Its result is not looked at while time is measured.
Variant = Callable[[], Any]


#: More than these gain nothing, and very many end the process without a word.
_THREADS_PER_CORE = 8


#: How `ratio_rows` comes to its median and interval, in the record's words.
INTERVAL = (
    f"median over rounds of the ratio within each round; 95 % percentile bootstrap of the median, "
    f"{RESAMPLES} resamples of whole rounds"
)


class BenchmarkError(CascadeError):
    """The benchmark cannot be run as configured, or running it failed."""


def check_least(
    config: object, least: Mapping[str, int], reasons: Mapping[str, str] | None = None
) -> None:
    """Refuse a configuration of which a number is too small.

    Args:
        config: Its attributes have the names of options; None is allowed.
        least: Name -> the least that is allowed.
        reasons: Name -> why, in brackets behind the least.

    Raises:
        BenchmarkError: Names the option, the least and what came.
    """
    for name, minimum in least.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            option, reason = name.replace("_", "-"), (reasons or {}).get(name)
            why = "" if reason is None else f" ({reason})"
            raise BenchmarkError(f"expected --{option} of at least {minimum}{why}, got {value}")


# --- The set-up of a benchmark ---------------------------------------------------------------


class BenchmarkConfig(Protocol):
    """What the configuration of every benchmark has."""

    @property
    def rounds(self) -> int:
        """Timed rounds."""

    @property
    def threads(self) -> int | None:
        """Threads that torch computes with; None leaves the number as it is."""

    @property
    def seed(self) -> int:
        """Draws the order of the variants and the bootstrap's resamples."""


C = TypeVar("C", bound=BenchmarkConfig)


def no_progress(text: str) -> None:
    """Ignore a progress message."""


@dataclass(frozen=True)
class Session:
    """A running benchmark: how its variants are timed.

    Attributes:
        rounds: Timed rounds.
        seed: Draws the order of the variants and the bootstrap's resamples.
        load_average_before: How many processes wanted a core in the minute before the start.
        progress: Called with a message for each step.
    """

    rounds: int
    seed: int
    load_average_before: float | None
    progress: Callable[[str], None]

    def time(
        self, variants: Mapping[str, Variant], device: torch.device, *, rounds: int | None = None
    ) -> Timings:
        """Time variants in interleaved rounds (see `time_variants`).

        Args:
            variants: Name -> what to time.
            device: Where they run.
            rounds: Timed rounds, where they are not the benchmark's.
        """
        return time_variants(
            variants,
            rounds=self.rounds if rounds is None else rounds,
            seed=self.seed,
            synchronize=lambda: synchronize(device),
            progress=self.progress,
        )

    def ratios(self, timings: Timings, pairs: Iterable[tuple[str, str]]) -> list[Ratio]:
        """Return the ratios of pairs of variants (see `ratio_rows`)."""
        return ratio_rows(timings.seconds, pairs, seed=self.seed)

    def provenance(self, provenance: Any) -> BenchmarkProvenance:
        """Return a provenance whose machine has the details that matter to a time."""
        return benchmark_provenance(provenance, self.load_average_before)


@contextlib.contextmanager
def session(
    config: C, progress: Callable[[str], None] | None = None
) -> Iterator[tuple[C, Session]]:
    """Set a benchmark up: note who else is at work, and pin torch's threads while it runs.

    Args:
        config: The benchmark's configuration.
        progress: Called with a message for each step.

    Yields:
        The configuration with its number of threads, and the session.

    Raises:
        BenchmarkError: More threads than the cores can serve.
    """
    load_before = load_average()
    threads = config.threads or torch.get_num_threads()
    config = replace(config, threads=threads)  # type: ignore[type-var]  # a dataclass
    with pinned_threads(threads):
        yield config, Session(config.rounds, config.seed, load_before, progress or no_progress)


@contextlib.contextmanager
def pinned_threads(threads: int | None) -> Iterator[None]:
    """Let torch compute with `threads` threads (None: as it is); the number before comes back.

    Raises:
        BenchmarkError: More threads than the cores can serve.
    """
    most = _THREADS_PER_CORE * (os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise BenchmarkError(
            f"expected --threads of at most {most} ({_THREADS_PER_CORE} for each core), got "
            f"{threads}"
        )
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# --- Time ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timings:
    """The times of several variants.

    Attributes:
        results: What each variant returned in the round that warms up.
        order: The order of the variants in every timed round.
        seconds: Each variant's seconds, round by round.
    """

    results: dict[str, Any]
    order: list[list[str]]
    seconds: dict[str, list[float]]

    def rows(self, what: Mapping[str, str], *, tokens: int) -> dict[str, VariantTimes]:
        """Return one entry per variant, by name: what it does, its speed and its seconds.

        Args:
            what: What each variant does, in the record's words.
            tokens: Tokens that every variant takes or makes in one round.
        """
        return {
            name: VariantTimes(
                what=what[name],
                tokens_per_second=tokens / float(np.median(values)),
                seconds=list(values),
            )
            for name, values in self.seconds.items()
        }


def time_variants(
    variants: Mapping[str, Variant],
    *,
    rounds: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda _: None,
) -> Timings:
    """Time each variant once per round, every round in an order of its own.

    A machine that slows down or is shared then affects all variants alike, and a ratio within one
    round compares neighbours in time.

    Args:
        variants: Name -> what to time.
        rounds: Timed rounds; one round before them warms up and is not counted.
        seed: Draws the orders.
        clock: Seconds, from any start.
        synchronize: Waits until the device has done all that it was given.
        progress: Called with a message for each round.
    """
    shuffler = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    progress("Warming up")
    results = {name: variant() for name, variant in variants.items()}
    orders = []
    for number in range(1, rounds + 1):
        progress(f"Round {number} of {rounds}")
        order = list(variants)
        shuffler.shuffle(order)
        orders.append(order)
        for name in order:
            synchronize()
            start = clock()
            variants[name]()
            synchronize()
            seconds[name].append(clock() - start)
    return Timings(results, orders, seconds)


# --- What was found --------------------------------------------------------------------------


def ratio_rows(
    seconds: Mapping[str, Sequence[float]], pairs: Iterable[tuple[str, str]], *, seed: int
) -> list[Ratio]:
    """Return one row per pair of variants: median over rounds, 95 % interval (see `INTERVAL`).

    Args:
        seconds: Each variant's seconds, round by round.
        pairs: Variant and reference; the ratio is the variant's seconds over the reference's.
        seed: Draws the resamples.
    """
    rows = []
    for variant, reference in pairs:
        values = np.array(seconds[variant]) / np.array(seconds[reference])
        rows.append(
            Ratio(
                name=f"{variant}/{reference}",
                median=float(np.median(values)),
                interval=_bootstrap(values, seed),
                rounds=[float(value) for value in values],
            )
        )
    return rows


def _bootstrap(values: Array, seed: int) -> list[float]:
    return interval(np.median(values[draws(len(values), seed)], axis=1))


def target(
    name: str,
    sense: str,
    limit: float,
    measured: float | None,
    interval: Sequence[float] | None = None,
) -> Target:
    """Compare one measured number with its limit.

    Args:
        name: What was measured, with its unit if it has one.
        sense: On which side of the limit the number should lie: "at most", "at least" or "below".
        limit: The promised limit.
        measured: The number; None where nothing was measured.
        interval: The number's 95 % interval, where it has one.
    """
    met = None
    if measured is not None:
        met = {
            "at most": measured <= limit,
            "at least": measured >= limit,
            "below": measured < limit,
        }[sense]
    return Target(
        name=name,
        sense=sense,
        limit=limit,
        measured=measured,
        interval=None if interval is None else list(interval),
        met=met,
    )


def ratio_target(ratio: Ratio, sense: str, limit: float) -> Target:
    """Compare a ratio with its limit."""
    return target(ratio.name, sense, limit, ratio.median, ratio.interval)


# --- The machine -----------------------------------------------------------------------------


def load_average() -> float | None:
    """Return how many processes wanted a core in the last minute: who else is at work.

    Call it before a benchmark starts, since its own work counts as well. None where the system
    does not say.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def benchmark_provenance(provenance: Any, load_average_before: float | None) -> BenchmarkProvenance:
    """Return a provenance whose machine has the details that matter to a time.

    Args:
        provenance: Where a record comes from, its machine included.
        load_average_before: Of `load_average`, before the benchmark started.
    """
    plain = to_plain(provenance)
    machine = plain["machine"] | {
        "cores": os.cpu_count(),
        "load_average_before": load_average_before,
    }
    return from_plain(plain | {"machine": machine}, BenchmarkProvenance)
