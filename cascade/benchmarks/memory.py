"""Peak memory of a benchmark's ways, every pass measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade.benchmarks.timing import BenchmarkError, Record

#: The long pass has this many times the tokens of the short one.
LONG = 8

_MEGABYTE = 1e6

#: glibc otherwise raises these thresholds while a process runs and keeps freed batches for later:
#: the peak of the same pass then varied by 80 MB from process to process. Set, they stay.
_STEADY_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}

_WHAT = (
    "peak resident memory of the process, each row in a fresh one: the model is loaded, one pass "
    "over the tokens warms allocator and kernels up, then the peak is read after a measured pass. "
    f"The {LONG}x pass takes the same blocks {LONG} times. glibc is told to return freed memory "
    f"at once ({', '.join(f'{name}={value}' for name, value in _STEADY_MALLOC.items())})"
)


def measure_usage(
    kind: str,
    setup: Mapping[str, Any],
    way: str,
    *,
    beside: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Record:
    """Measure one way's peak memory and how it grows with the tokens, and other ways' beside it.

    Args:
        kind: Kind of the benchmark's record; the fresh process finds by it what to run.
        setup: The benchmark's setup, as JSON can hold it.
        way: Measured over the setup's tokens, and over `LONG` times as many.
        beside: Ways to compare with, measured over the setup's tokens.
        progress: Told what is being measured.

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
    rows: list[Record] = []
    for name, factor in ((way, 1), (way, LONG), *((other, 1) for other in beside)):
        progress(f"Measuring the memory of {name} at {factor}x tokens")
        row = _in_fresh_process(kind, setup, name, factor)
        rows.append({"way": name, "factor": factor} | row)
    short, long = rows[0]["peak_mb"], rows[1]["peak_mb"]
    return {"what": _WHAT, "reason": None, "growth_mb": long - short, "peaks": rows}


def not_measured(reason: str) -> Record:
    """Return the record's section `memory` without a measurement, saying why there is none."""
    return {"what": _WHAT, "reason": reason, "growth_mb": None, "peaks": []}


def _in_fresh_process(kind: str, setup: Mapping[str, Any], way: str, factor: int) -> Record:
    task = json.dumps({"kind": kind, "setup": dict(setup), "way": way, "factor": factor})
    done = subprocess.run(
        [sys.executable, "-m", "cascade.benchmarks", task],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | _STEADY_MALLOC,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise BenchmarkError(
            f"measuring the memory of {way} failed: {reason}; leave it out with --no-memory"
        )
    row: Record = json.loads(done.stdout.splitlines()[-1])
    return row


def measure_peak(run: Callable[[int], int], factor: int) -> Record:
    """Run one way in this process and say how much memory it took.

    Call it as soon as everything is loaded.

    Args:
        run: Goes over the tokens as many times as it is told, and returns how many they were.
        factor: How many times the tokens are taken in the measured pass.

    Returns:
        `tokens`, those of the measured pass; `loaded_mb`, the peak up to the end of loading (what
        was asked of a fresh process); `peak_mb`, the peak of the measured pass (of the process's
        whole life where `isolated` is false: the system could not set its mark back).
    """
    loaded = _peak()
    run(1)
    isolated = _forget_peak()
    tokens = run(factor)
    return {
        "tokens": tokens,
        "loaded_mb": loaded / _MEGABYTE,
        "peak_mb": _peak() / _MEGABYTE,
        "isolated": isolated,
    }


def _peak() -> int:
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


def _forget_peak() -> bool:
    """Set the peak back to what is resident now, where the system lets us; say whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
