"""How an engine runs shards: workers, GPUs and threads. Nothing here changes a result."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cascade.core.errors import UsageError

#: Shards per worker where no number is given: a worker that dies loses little, and the last shards
#: keep all workers busy.
SHARDS_PER_WORKER = 8


@dataclass(frozen=True)
class EngineConfig:
    """How many tasks run at once, where, and with what.

    Attributes:
        workers: Tasks at once; None for as many as the cluster has CPUs or GPUs for.
        address: The address of a running Ray cluster, or "auto"; None to start one here.
        gpus_per_worker: GPUs of each worker; may be a fraction.
        threads: CPU threads of each worker; None for OMP_NUM_THREADS, else for this machine's
            CPUs divided by the workers. The last digits of a result can depend on it.
    """

    workers: int | None = None
    address: str | None = None
    gpus_per_worker: float = 0.0
    threads: int | None = None

    def check(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: One is too small, or the GPUs are more than one and no whole number.
        """
        for name, value in (("--workers", self.workers), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise UsageError(f"expected {name} of at least 1, got {value}")
        gpus = self.gpus_per_worker
        if not gpus >= 0 or gpus == float("inf") or (gpus > 1 and gpus % 1):
            raise UsageError(
                f"expected --gpus-per-worker of 0, a fraction or a whole number, got {gpus:g}"
            )

    def threads_of(self) -> int:
        """Return the CPU threads of each worker."""
        if self.threads is not None:
            return self.threads
        given = os.environ.get("OMP_NUM_THREADS", "")
        if given.isdecimal() and int(given):
            return int(given)
        if self.address is not None or self.gpus_per_worker:
            return 1
        return max(1, cpus() // (self.workers or cpus()))


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
