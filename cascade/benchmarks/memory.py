"""Peak memory of a benchmark's variants, every pass measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade.benchmarks.records import MemoryUsage, PeakMemory
from cascade.benchmarks.timing import BenchmarkError, no_progress
from cascade.core.schema import UNSET, Count, Finite, Part, UnsetType, from_plain

#: The long pass has this many times the tokens of the short one.
LONG = 8

_MEGABYTE = 1e6

#: glibc otherwise raises these thresholds while a process runs and keeps freed batches for later:
#: the peak of the same pass then varied by 80 MB from process to process. Set, they stay.
STEADY_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}

_WHAT = (
    "peak resident memory of the process, each row in a fresh one: the model is loaded, one pass "
    "over the tokens warms allocator and kernels up, then the peak is read after a measured pass. "
    f"The {LONG}x pass takes the same blocks {LONG} times. glibc is told to return freed memory "
    f"at once ({', '.join(f'{name}={value}' for name, value in STEADY_MALLOC.items())})"
)


class PassPeak(Part, frozen=True, kw_only=True):
    """The peak memory of one pass, as a fresh process reports it.

    Attributes:
        tokens: Tokens of the measured pass.
        loaded_mb: The peak up to the end of loading (of what runs in the fresh process).
        peak_mb: The peak of the measured pass; of the process's whole life where `isolated` is
            false.
        isolated: Whether the system could reset its mark before the pass.
    """

    tokens: Count
    loaded_mb: Finite
    peak_mb: Finite
    isolated: bool | UnsetType = UNSET


def measure_usage(
    kind: str,
    config: Mapping[str, Any],
    variant: str,
    *,
    others: Sequence[str] = (),
    progress: Callable[[str], None] = no_progress,
) -> MemoryUsage:
    """Measure one variant's peak memory and how it grows with the tokens, and other variants'.

    Args:
        kind: Kind of the benchmark's record; the fresh process finds by it what to run.
        config: The benchmark's configuration, as JSON can hold it.
        variant: Measured over the configured tokens, and over `LONG` times as many.
        others: Variants to compare with, measured over the configured tokens.
        progress: Called with a message for each pass.

    Returns:
        The record's section `memory`: `growth_mb` is the long pass's peak above the short one's.
        Where the system reports no peak, as `not_measured` returns it.

    Raises:
        BenchmarkError: A process failed.
    """
    try:
        import resource  # noqa: F401
    except ImportError:
        return not_measured("the operating system reports no peak of a process")
    peaks: list[PeakMemory] = []
    for name, factor in ((variant, 1), (variant, LONG), *((other, 1) for other in others)):
        progress(f"Measuring the memory of {name} at {factor}x tokens")
        found = peak_in_fresh_process(kind, config, name, factor)
        peaks.append(
            PeakMemory(
                variant=name,
                factor=factor,
                tokens=found.tokens,
                loaded_mb=found.loaded_mb,
                peak_mb=found.peak_mb,
                isolated=found.isolated,
            )
        )
    growth = peaks[1].peak_mb - peaks[0].peak_mb
    return MemoryUsage(what=_WHAT, reason=None, growth_mb=growth, peaks=peaks)


def not_measured(reason: str) -> MemoryUsage:
    """Return the record's section `memory` without a measurement, and why there is none."""
    return MemoryUsage(what=_WHAT, reason=reason, growth_mb=None, peaks=[])


def peak_in_fresh_process(
    kind: str, config: Mapping[str, Any], variant: str, factor: int
) -> PassPeak:
    """Run one pass of a variant in a fresh process (`python -m cascade.benchmarks`).

    Args:
        kind: Kind of the benchmark's record.
        config: The benchmark's configuration, as JSON can hold it.
        variant: What to run.
        factor: How many times the tokens are taken in the measured pass.

    Raises:
        BenchmarkError: The process failed.
    """
    task = json.dumps({"kind": kind, "config": dict(config), "variant": variant, "factor": factor})
    done = subprocess.run(
        [sys.executable, "-m", "cascade.benchmarks", task],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | STEADY_MALLOC,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise BenchmarkError(
            f"measuring the memory of {variant} failed: {reason}; leave it out with --no-memory"
        )
    return from_plain(json.loads(done.stdout.splitlines()[-1]), PassPeak)


def measure_peak(run: Callable[[int], int], factor: int) -> PassPeak:
    """Run one variant in this process and return how much memory it took.

    Call it as soon as everything is loaded.

    Args:
        run: Goes over the tokens as many times as its argument says, and returns how many they
            were.
        factor: How many times the tokens are taken in the measured pass.
    """
    loaded = peak_memory()
    run(1)
    isolated = reset_peak_memory()
    tokens = run(factor)
    return PassPeak(
        tokens=tokens,
        loaded_mb=loaded / _MEGABYTE,
        peak_mb=peak_memory() / _MEGABYTE,
        isolated=isolated,
    )


def peak_memory() -> int:
    """Return this process's peak resident memory, bytes."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        # On Linux ru_maxrss comes down from the parent through fork and exec: a process started
        # by one of 600 MB reported 582 MB, its own peak being 9 MB. VmHWM is this process's own.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> bool:
    """Set the peak back to what is resident now; return whether the system let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
