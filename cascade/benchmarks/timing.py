"""What every benchmark needs: interleaved rounds, ratios with intervals, targets, the machine."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cascade.core.arrays import Array
from cascade.core.errors import CascadeError
from cascade.stats.resampling import RESAMPLES, draws, interval

Record = dict[str, Any]


#: One way to do the benchmark's work once. What it returns is not looked at while time runs.
Way = Callable[[], Any]


#: More than these gain nothing, and very many end the process without a word.
_THREADS_PER_CORE = 8


#: How `ratio_rows` comes to its median and interval, in the record's words.
INTERVAL = (
    f"median over rounds of the ratio within each round; 95 % percentile bootstrap of the median, "
    f"{RESAMPLES} resamples of whole rounds"
)


class BenchmarkError(CascadeError):
    """What was asked for cannot be measured, or measuring it failed."""


def check_least(
    setup: object, least: Mapping[str, int], reasons: Mapping[str, str] | None = None
) -> None:
    """Refuse a setup of which a number is too small.

    Args:
        setup: Its attributes are what options of the same names say; None is not looked at.
        least: Name -> the least that is allowed.
        reasons: Name -> why, in brackets behind the least.

    Raises:
        BenchmarkError: Names the option, the least and what came.
    """
    for name, minimum in least.items():
        value = getattr(setup, name)
        if value is not None and value < minimum:
            option, reason = name.replace("_", "-"), (reasons or {}).get(name)
            why = "" if reason is None else f" ({reason})"
            raise BenchmarkError(f"expected --{option} of at least {minimum}{why}, got {value}")


# --- Time ------------------------------------------------------------------------------------


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


def time_ways(
    ways: Mapping[str, Way],
    *,
    rounds: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], list[list[str]], dict[str, list[float]]]:
    """Time each way once per round, every round in an order of its own.

    A machine that slows down or is shared then strikes all ways alike, and a ratio within one
    round compares neighbours in time.

    Args:
        ways: Name -> what to time.
        rounds: Timed rounds; one round before them warms up and is not counted.
        seed: Draws the orders.
        clock: Seconds, from any start.
        synchronize: Waits until the device has done all that it was given.
        progress: Told the round.

    Returns:
        What each way returned in the warm-up round, the order of every timed round, and each
        way's seconds, round by round.
    """
    shuffler = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    progress("Warming up")
    first = {name: way() for name, way in ways.items()}
    orders = []
    for number in range(1, rounds + 1):
        progress(f"Round {number} of {rounds}")
        order = list(ways)
        shuffler.shuffle(order)
        orders.append(order)
        for name in order:
            synchronize()
            start = clock()
            ways[name]()
            synchronize()
            seconds[name].append(clock() - start)
    return first, orders, seconds


# --- What was found --------------------------------------------------------------------------


def way_rows(
    seconds: Mapping[str, Sequence[float]], what: Mapping[str, str], *, tokens: int
) -> Record:
    """Return one entry per way, by name: what it does, its speed and its seconds.

    Args:
        seconds: Each way's seconds, round by round.
        what: What each way does, in the record's words.
        tokens: Tokens that every way takes or makes in one round.
    """
    return {
        name: {
            "what": what[name],
            "tokens_per_second": tokens / float(np.median(values)),
            "seconds": list(values),
        }
        for name, values in seconds.items()
    }


def ratio_rows(
    seconds: Mapping[str, Sequence[float]], pairs: Iterable[tuple[str, str]], *, seed: int
) -> list[Record]:
    """Return one row per pair of ways: median over rounds with a 95 % interval (see `INTERVAL`).

    Args:
        seconds: Each way's seconds, round by round.
        pairs: Way and reference; the ratio is the way's seconds over the reference's.
        seed: Draws the resamples.
    """
    rows = []
    for way, reference in pairs:
        values = np.array(seconds[way]) / np.array(seconds[reference])
        rows.append(
            {
                "name": f"{way}/{reference}",
                "median": float(np.median(values)),
                "interval": _bootstrap(values, seed),
                "rounds": [float(value) for value in values],
            }
        )
    return rows


def _bootstrap(values: Array, seed: int) -> list[float]:
    return interval(np.median(values[draws(len(values), seed)], axis=1))


def target_row(
    name: str,
    sense: str,
    limit: float,
    measured: float | None,
    interval: Sequence[float] | None = None,
) -> Record:
    """Hold one measured number against its limit.

    Args:
        name: What was measured, with its unit if it has one.
        sense: On which side of the limit the number should lie: "at most", "at least" or "below".
        limit: The promised limit.
        measured: The number; None where nothing was measured.
        interval: The number's 95 % interval, where it has one.

    Returns:
        The arguments by name, and `met`, which is None where nothing was measured.
    """
    met = None
    if measured is not None:
        met = {
            "at most": measured <= limit,
            "at least": measured >= limit,
            "below": measured < limit,
        }[sense]
    return {
        "name": name,
        "sense": sense,
        "limit": limit,
        "measured": measured,
        "interval": None if interval is None else list(interval),
        "met": met,
    }


# --- The machine -----------------------------------------------------------------------------


def load_average() -> float | None:
    """Return how many processes wanted a core in the last minute: who else was at work.

    Asked before a benchmark starts, whose own work would count otherwise. None where the system
    does not say.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine_provenance(provenance: Record, load_average_before: float | None) -> Record:
    """Return `provenance`, its machine completed by what matters to a time.

    Args:
        provenance: What a record says of where it comes from, its section `machine` included.
        load_average_before: What `load_average` said before the benchmark started.
    """
    machine = {"cores": os.cpu_count(), "load_average_before": load_average_before}
    return provenance | {"machine": provenance["machine"] | machine}
