"""Shared code of the benchmarks: set-up, interleaved rounds, ratios with intervals, targets."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

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

#: A function that does the work of a benchmark once. Its result is not used in timed rounds.
Variant = Callable[[], Any]


#: Maximum threads per core. More do not help, and far too many crash the process silently.
_THREADS_PER_CORE = 8


#: Description of the median and interval of `ratio_rows`, as stored in records.
INTERVAL = (
    f"median over rounds of the ratio within each round; 95 % percentile bootstrap of the median, "
    f"{RESAMPLES} resamples of whole rounds"
)


class BenchmarkError(CascadeError):
    """The benchmark cannot run as configured, or it failed."""


def check_least(
    config: object, least: Mapping[str, int], reasons: Mapping[str, str] | None = None
) -> None:
    """Check that the numbers of a configuration are not too small.

    Args:
        config: Configuration whose attributes have the names of options. None is allowed.
        least: Minimum by name.
        reasons: Reason for the minimum by name, shown in parentheses.

    Raises:
        BenchmarkError: A number is too small. The message names the option, minimum and value.
    """
    for name, minimum in least.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            option, reason = name.replace("_", "-"), (reasons or {}).get(name)
            why = "" if reason is None else f" ({reason})"
            raise BenchmarkError(f"expected --{option} of at least {minimum}{why}, got {value}")


# --- The set-up of a benchmark ---------------------------------------------------------------


@dataclass(frozen=True)
class BenchmarkConfig:
    """Options that every benchmark has.

    Attributes:
        model: Source of the model, as for `load`.
        rounds: Timed passes per variant.
        threads: Number of torch threads; None to keep the current number.
        seed: Seed of the order of variants and of the resamples.
        device: "cpu", "cuda", "mps" or "auto".

    Raises:
        BenchmarkError: A number is too small.
    """

    model: str = "smollm2-135m"
    rounds: int = 7
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {"rounds": 2, "threads": 1, "seed": 0}
        check_least(self, least, {"rounds": "one round gives no interval"})


@dataclass(frozen=True)
class CorpusBenchmarkConfig(BenchmarkConfig):
    """Options of a benchmark that runs a model over sequences of the embedded corpus.

    Attributes:
        tokens: Tokens per pass, rounded down to whole sequences.
        seq_len: Tokens per sequence.
        batch_size: Sequences per forward pass.
    """

    tokens: int = 4096
    seq_len: int = 128
    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"seq_len": 2, "batch_size": 1, "tokens": self.seq_len}
        check_least(self, least, {"tokens": "one sequence of --seq-len"})


C = TypeVar("C", bound=BenchmarkConfig)


def no_progress(text: str) -> None:
    """Ignore a progress message."""


@dataclass(frozen=True)
class Session:
    """A running benchmark, which times variants.

    Attributes:
        rounds: Timed rounds.
        seed: Seed of the order of variants and of the resamples.
        load_average_before: One-minute load average before the start; None if unknown.
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
            variants: Variants to time, by name.
            device: Device of the variants.
            rounds: Timed rounds (default: those of the benchmark).
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
        """Return a provenance whose machine has the details that affect times."""
        return benchmark_provenance(provenance, self.load_average_before)


@contextlib.contextmanager
def session(
    config: C, progress: Callable[[str], None] | None = None
) -> Iterator[tuple[C, Session]]:
    """Set up a benchmark: record the load average, and pin torch's threads while it runs.

    Args:
        config: Configuration of the benchmark.
        progress: Called with a message for each step.

    Yields:
        The configuration with the number of threads filled in, and the session.

    Raises:
        BenchmarkError: There are too many threads per core.
    """
    load_before = load_average()
    threads = config.threads or torch.get_num_threads()
    config = replace(config, threads=threads)
    with pinned_threads(threads):
        yield config, Session(config.rounds, config.seed, load_before, progress or no_progress)


@contextlib.contextmanager
def pinned_threads(threads: int | None) -> Iterator[None]:
    """Set the number of torch threads inside a `with` block, and restore it afterwards.

    Args:
        threads: Number of threads; None to keep the current number.

    Raises:
        BenchmarkError: There are too many threads per core.
    """
    most = _THREADS_PER_CORE * (os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise BenchmarkError(
            f"expected --threads of at most {most} ({_THREADS_PER_CORE} per core), got {threads}; "
            "use fewer"
        )
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all submitted work. A CPU needs no waiting."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# --- Time ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timings:
    """The times of several variants.

    Attributes:
        results: Results of each variant in the warm-up round.
        order: Order of the variants in every timed round.
        seconds: Seconds of each variant, per round.
    """

    results: dict[str, Any]
    order: list[list[str]]
    seconds: dict[str, list[float]]

    def rows(
        self, what: Mapping[str, str], *, tokens: int, others: Mapping[str, int] | None = None
    ) -> dict[str, VariantTimes]:
        """Return description, speed and seconds of each variant, by name.

        Args:
            what: Description of each variant.
            tokens: Tokens that every variant processes or generates in one round.
            others: The tokens of variants that process another number.
        """
        count = others or {}
        return {
            name: VariantTimes(
                what=what[name],
                tokens_per_second=count.get(name, tokens) / float(np.median(values)),
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
    """Time each variant once per round, in a new random order every round.

    If the machine slows down or is shared, this affects all variants equally. A ratio within one
    round compares measurements that are close in time.

    Args:
        variants: Variants to time, by name.
        rounds: Timed rounds. One warm-up round before them is not counted.
        seed: Seed of the orders.
        clock: Clock in seconds, with any origin.
        synchronize: Waits until the device has finished all submitted work.
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


# --- Results ---------------------------------------------------------------------------------


def ratio_rows(
    seconds: Mapping[str, Sequence[float]], pairs: Iterable[tuple[str, str]], *, seed: int
) -> list[Ratio]:
    """Return the median ratio and its 95 % interval for each pair of variants (see `INTERVAL`).

    Args:
        seconds: Seconds of each variant, per round.
        pairs: Pairs of variant and reference. The ratio divides the variant's seconds by the
            reference's.
        seed: Seed of the resamples.
    """
    rows = []
    for variant, reference in pairs:
        values = np.array(seconds[variant]) / np.array(seconds[reference])
        rows.append(
            Ratio(
                name=f"{variant}/{reference}",
                median=float(np.median(values)),
                interval=median_interval(values, seed),
                rounds=[float(value) for value in values],
            )
        )
    return rows


def median_interval(values: Array, seed: int) -> list[float]:
    """Return the 95 % interval of the median over rounds.

    Args:
        values: One value per round.
        seed: Seed of the resamples.
    """
    return interval(np.median(values[draws(len(values), seed)], axis=1))


def target(
    name: str,
    sense: str,
    limit: float,
    measured: float | None,
    interval: Sequence[float] | None = None,
) -> Target:
    """Compare a measured value with its limit.

    Args:
        name: Measured quantity, with its unit if it has one.
        sense: Required side of the limit: "at most", "at least" or "below".
        limit: Limit of the target.
        measured: Measured value; None if not measured.
        interval: 95 % interval of the value, if it has one.
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
    """Return the one-minute load average, which shows other work on the machine.

    Call this function before a benchmark starts, because its own work counts as well. Return None
    if the system does not report a load average.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def benchmark_provenance(provenance: Any, load_average_before: float | None) -> BenchmarkProvenance:
    """Return a provenance whose machine has the details that affect times.

    Args:
        provenance: Provenance of a record.
        load_average_before: Load average before the benchmark started.
    """
    plain = to_plain(provenance)
    machine = plain["machine"] | {
        "cores": os.cpu_count(),
        "load_average_before": load_average_before,
    }
    return from_plain(plain | {"machine": machine}, BenchmarkProvenance)
