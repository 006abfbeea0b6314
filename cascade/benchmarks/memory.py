"""Peak memory of a benchmark's variants. Every pass is measured in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from cascade.benchmarks.records import MemoryUsage, PassPeak, PeakMemory
from cascade.benchmarks.timing import BenchmarkError, no_progress
from cascade.core.schema import from_plain

#: The long pass has this many times the tokens of the short one.
LONG = 8

_MEGABYTE = 1e6

#: Fixed allocator thresholds. Otherwise, glibc raises them at run time and keeps freed batches, and
#: the peak of the same pass varied by 80 MB from process to process.
STEADY_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}

_WHAT = (
    "peak resident memory of a fresh process per row: the model is loaded, one pass over the "
    "tokens warms up allocator and kernels, and the peak is read after a measured pass. "
    f"The {LONG}x pass repeats the same blocks {LONG} times. glibc is configured to return freed "
    f"memory at once ({', '.join(f'{name}={value}' for name, value in STEADY_MALLOC.items())})"
)


def measure_usage(
    kind: str,
    config: Mapping[str, Any],
    variant: str,
    *,
    others: Sequence[str] = (),
    progress: Callable[[str], None] = no_progress,
) -> MemoryUsage:
    """Measure the peak memory of variants, and its growth with the number of tokens.

    Args:
        kind: Kind of the benchmark's record, which selects the benchmark in the fresh process.
        config: Configuration of the benchmark, as JSON values.
        variant: Variant to measure over the configured tokens and over `LONG` times as many.
        others: Other variants to measure over the configured tokens.
        progress: Called with a message for each pass.

    Returns:
        The section `memory` of the record. `growth_mb` is the difference of the peaks of the long
        and the short pass. If the system reports no peak, see `not_measured`.

    Raises:
        BenchmarkError: A process failed.
    """
    try:
        import resource  # noqa: F401
    except ImportError:
        return not_measured("the operating system does not report the peak memory of a process")
    peaks: list[PeakMemory] = []
    for name, factor in ((variant, 1), (variant, LONG), *((other, 1) for other in others)):
        progress(f"Measuring the memory of {name} at {factor}x tokens")
        found = peak_in_fresh_process(kind, config, name, factor)
        peaks.append(PeakMemory(variant=name, factor=factor, **asdict(found)))
    growth = peaks[1].peak_mb - peaks[0].peak_mb
    return MemoryUsage(what=_WHAT, reason=None, growth_mb=growth, peaks=peaks)


def not_measured(reason: str) -> MemoryUsage:
    """Return the section `memory` of a record without measurements, with the reason."""
    return MemoryUsage(what=_WHAT, reason=reason, growth_mb=None, peaks=[])


def peak_in_fresh_process(
    kind: str, config: Mapping[str, Any], variant: str, factor: int
) -> PassPeak:
    """Run one pass of a variant in a fresh process (`python -m cascade.benchmarks`).

    Args:
        kind: Kind of the benchmark's record.
        config: Configuration of the benchmark, as JSON values.
        variant: Variant to run.
        factor: Number of times that the measured pass repeats the tokens.

    Raises:
        BenchmarkError: The process failed.
    """
    task = json.dumps(
        {"kind": kind, "config": dict(config), "variant": variant, "factor": factor},
        allow_nan=False,
    )
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
            f"measuring the memory of {variant} failed: {reason}; skip it with --no-memory"
        )
    return from_plain(json.loads(done.stdout.splitlines()[-1]), PassPeak)


def measure_peak(run: Callable[[int], int], factor: int) -> PassPeak:
    """Run one variant in this process and return its peak memory.

    Call this function right after loading.

    Args:
        run: Function that processes the tokens as often as its argument says, and returns the
            number of processed tokens.
        factor: Number of times that the measured pass repeats the tokens.
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
    """Return the peak resident memory of this process, in bytes."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, ru_maxrss is inherited from the parent through fork and exec: a child of a
        # 600 MB process reported 582 MB, while its own peak was 9 MB. VmHWM is not inherited.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> bool:
    """Reset the peak to the current resident memory. Return whether the system allows this."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
