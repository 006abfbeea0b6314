"""Running tasks on Ray: it schedules them and tries again where a process or a node dies."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from cascade.core.errors import CascadeError, ModelError, first_line
from cascade.engines.cluster import Cluster
from cascade.engines.config import EngineConfig
from cascade.engines.work import Task, Work, run_task

#: How often Ray runs a task again whose process or node died. That is Ray's own default. A task
#: that raises an error is not run again.
RETRIES = 3

#: Seconds between two looks at what is running, so that Ctrl-C is noticed.
_WAIT = 1.0


def run_tasks(
    found: Cluster,
    config: EngineConfig,
    work: Work,
    tasks: Sequence[Task],
    done: Callable[[Task], None],
) -> None:
    """Run tasks, and return when all of them are done.

    A finished task has written its result. So whatever interrupts this, the next call needs to run
    the others only.

    Args:
        found: The cluster.
        config: How tasks run.
        work: What every task does.
        tasks: The tasks.
        done: Called with every task that is done, in any order.

    Raises:
        CascadeError: A task failed by itself; the error is that of the task.
        ModelError: A worker process died again and again, or raised an unexpected error.
    """
    ray = found.ray
    # By default, Ray gives every task with GPUs a process of its own, which would load the model.
    remote = ray.remote(max_calls=0)(run_task).options(
        num_cpus=work.threads,
        num_gpus=config.gpus_per_worker,
        max_retries=RETRIES,
        retry_exceptions=False,
        name=f"cascade {work.name}",
    )
    waiting, running = deque(tasks), dict[Any, Task]()
    try:
        while waiting or running:
            while waiting and len(running) < found.workers:
                task = waiting.popleft()
                running[remote.remote(work, task.number)] = task
            for ref in ray.wait(list(running), num_returns=1, timeout=_WAIT)[0]:
                task = running[ref]
                _check(ray, ref, f"{work.name} {task.number}")
                del running[ref]
                done(task)
    finally:
        for ref in running:
            with contextlib.suppress(Exception):  # the cluster may be gone
                ray.cancel(ref, force=True)


def _check(ray: Any, ref: Any, what: str) -> None:
    """Check the outcome of a task.

    Raises:
        CascadeError: That of the task.
        ModelError: Its process died, or it raised an unexpected error.
    """
    try:
        error: CascadeError | None = ray.get(ref)
    except ray.exceptions.OutOfMemoryError as death:
        raise ModelError(
            f"{what} was stopped {RETRIES + 1} times because a node ran out of memory; use fewer"
            " --workers or a smaller --batch-size, and run the same command again"
        ) from death
    except (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.LocalRayletDiedError,
    ) as death:
        raise ModelError(
            f"the process of {what} died {RETRIES + 1} times; look for the reason in the logs of"
            " the node, and run the same command again"
        ) from death
    except ray.exceptions.RayTaskError as unexpected:
        cause = unexpected.cause if isinstance(unexpected.cause, Exception) else unexpected
        if isinstance(cause, ModuleNotFoundError):
            raise ModelError(
                f"{what} cannot run: {first_line(cause)}; install the same versions on every node"
            ) from unexpected
        raise ModelError(
            f"{what} failed with {type(cause).__name__}: {first_line(cause)}; run it alone to see"
            " more, or the same command again"
        ) from unexpected
    except ray.exceptions.RayError as lost:
        raise ModelError(
            f"the cluster failed while {what} was running ({first_line(lost)}); run the same"
            " command again"
        ) from lost
    if error is not None:
        raise error
