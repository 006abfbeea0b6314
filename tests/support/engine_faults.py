"""Tasks of an engine that go wrong in a worker, once or always.

Each stands for `cascade.engines.profiles.measure_planned`. Files in the folder of the plan say what
has happened, because processes share nothing else.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cascade.engines.cluster import Cluster
from cascade.engines.config import EngineConfig
from cascade.engines.profiles import measure_planned
from cascade.engines.running import run_tasks
from cascade.engines.work import Task, Work
from cascade.models.source import model_source
from cascade.models.stack import DecoderStack
from cascade.shards.measuring import measure_shard
from cascade.shards.merging import missing_shards
from cascade.shards.plan import Plan

Function = Callable[[DecoderStack, Work, int], Any]


def work_of(found: Cluster, made: Plan, stack: DecoderStack, function: Function) -> Work:
    """Return work that measures a plan with a function of this module."""
    return Work("shard", function, model_source(stack), str(made.folder), found.engine, 1)


def run_with(
    found: Cluster,
    made: Plan,
    stack: DecoderStack,
    function: Function,
    done: Callable[[Task], None] | None = None,
) -> None:
    """Measure the missing shards of a plan with a function of this module."""
    config = EngineConfig(workers=2, threads=1)
    tasks = [Task(number, 1) for number in missing_shards(made)]
    run_tasks(found, config, work_of(found, made, stack, function), tasks, done or (lambda _: None))


def first_time(work: Work, what: str) -> bool:
    """Return whether this is the first call, of all processes, for this name."""
    folder = Path(work.folder) / "marks"
    folder.mkdir(exist_ok=True)
    try:
        (folder / what).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def measure_and_count_loads(stack: DecoderStack, work: Work, number: int) -> None:
    """Measure, and count in a file for each model that was loaded."""
    folder = Path(work.folder) / "loads"
    folder.mkdir(exist_ok=True)
    path = folder / f"{os.getpid()}-{id(stack)}"
    path.write_text(str(int(path.read_text()) + 1 if path.exists() else 1))
    measure_planned(stack, work, number)


def killed_once(stack: DecoderStack, work: Work, number: int) -> None:
    """Kill the process in the middle of shards 1 and 4, the first time."""

    def kill(_: int) -> None:
        if number in (1, 4) and first_time(work, f"killed-{number}"):
            os.kill(os.getpid(), signal.SIGKILL)

    measure_shard(Path(work.folder), number, model=stack, engine=work.engine, progress=kill)


def always_killed(stack: DecoderStack, work: Work, number: int) -> None:
    """Kill the process in the middle of shard 1, each time."""

    def kill(_: int) -> None:
        if number == 1:
            count = Path(work.folder) / f"try-{time.time_ns()}"
            count.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    measure_shard(Path(work.folder), number, model=stack, engine=work.engine, progress=kill)


def nan_in_a_layer(stack: DecoderStack, work: Work, number: int) -> None:
    """Let layer 2 return NaN in shard 1, and count the tries."""
    if number != 1:
        measure_planned(stack, work, number)
        return
    (Path(work.folder) / f"try-{time.time_ns()}").touch()

    def spoil(_: Any, __: Any, output: Any) -> Any:
        return output * torch.nan if isinstance(output, torch.Tensor) else output

    handle = stack.layers[1].register_forward_hook(spoil)
    try:
        measure_planned(stack, work, number)
    finally:
        handle.remove()


def unexpected_error(stack: DecoderStack, work: Work, number: int) -> None:
    """Raise an error that no user can mend, in shard 1."""
    if number == 1:
        raise ZeroDivisionError("one\ntwo")
    measure_planned(stack, work, number)


def full_disk(stack: DecoderStack, work: Work, number: int) -> None:
    """Let the system refuse files above 4 kB while shard 2 is measured."""
    if number != 2:
        measure_planned(stack, work, number)
        return
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    try:
        measure_planned(stack, work, number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def slow(stack: DecoderStack, work: Work, number: int) -> None:
    """Measure slowly, so that something can happen in the middle."""
    measure_shard(
        Path(work.folder),
        number,
        model=stack,
        engine=work.engine,
        progress=lambda _: time.sleep(0.3),
    )
