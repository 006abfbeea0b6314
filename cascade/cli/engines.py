"""Options of commands that can run on a cluster, and what these commands share."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from cascade.cli import completion
from cascade.cli.console import message, progress_bar
from cascade.core.errors import UsageError

if TYPE_CHECKING:
    from cascade.engines.config import EngineConfig
    from cascade.models.stack import DecoderStack


@dataclass(frozen=True)
class EngineOptions:
    """Where the work runs: in this process, or in many on one machine or a cluster."""

    panel: ClassVar[str] = "Engine"

    engine: Annotated[
        str | None,
        typer.Option(
            help="ray: run shards on Ray (default: in this process).",
            autocompletion=completion.engines,
        ),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster: auto or its address (default: start one here)."),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Tasks at once (default: as many as there is room for)."),
    ] = None
    gpus_per_worker: Annotated[
        float, typer.Option(min=0, help="GPUs of each worker, e.g. 1 or 0.5.")
    ] = 0.0
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of each worker (default: OMP_NUM_THREADS, or CPUs over workers).",
            rich_help_panel="Engine",
        ),
    ] = None
    shards: Annotated[
        int | None, typer.Option(min=1, help="Tasks in all (default: 8 for each worker).")
    ] = None

    def config(self) -> EngineConfig | None:
        """Return how tasks run; None for this process.

        Raises:
            UsageError: The engine is unknown, Ray is not installed, or an option needs an engine.
        """
        given = [
            f"--{field.name.replace('_', '-')}"
            for field in dataclasses.fields(self)
            if field.name != "engine" and getattr(self, field.name) != field.default
        ]
        if self.engine is None:
            if given:
                raise UsageError(f"{given[0]} needs --engine ray; add it, or leave {given[0]} out")
            return None
        if self.engine != "ray":
            raise UsageError(
                f"expected --engine ray, got {self.engine}; other schedulers run `cascade"
                " measure-shard`"
            )
        from cascade.engines.cluster import import_ray
        from cascade.engines.config import EngineConfig

        import_ray()
        config = EngineConfig(
            workers=self.workers,
            address=self.address,
            gpus_per_worker=self.gpus_per_worker,
            threads=self.threads,
        )
        config.check()
        return config


def use_threads(config: EngineConfig) -> int:
    """Let this process compute with the threads of a worker, and return their number.

    The last digits of a result can depend on the number of threads.
    """
    import torch

    threads = config.threads_of()
    torch.set_num_threads(threads)
    return threads


def requested(stack: DecoderStack, *groups: Any, **others: Any) -> dict[str, Any]:
    """Return what the results of a task depend on: model, versions and options.

    Args:
        stack: The model.
        groups: Groups of options.
        others: Other values by name.
    """
    from cascade.core.provenance import library_versions

    found: dict[str, Any] = {"weights": stack.weights_hash(), "dtype": str(stack.dtype)}
    for group in groups:
        found |= dataclasses.asdict(group)
    return found | others | library_versions()


@contextlib.contextmanager
def shard_bar(
    what: str, output: Path | None, *, shards: int, missing: int, tokens: int
) -> Iterator[Callable[[int], None]]:
    """Show the shards and tokens that are done, and say at the end what happened.

    Args:
        what: E.g. "Analyzing".
        output: The output of the command, named where the work is interrupted; None if the command
            says so itself.
        shards: The number of shards.
        missing: How many of them are not done.
        tokens: The tokens of these.
    """
    if missing < shards:
        message(f"Continuing: {shards - missing:,} of {shards:,} shards are done already")
    done, start = 0, time.perf_counter()
    try:
        with progress_bar(what, tokens, parts=missing) as advance:

            def finished(count: int) -> None:
                nonlocal done
                done += 1
                advance(count)

            yield finished
    except BaseException as error:
        left = missing - done
        if output is not None and isinstance(error, KeyboardInterrupt | SystemExit):
            message(
                f"Stopped; {shards - left:,} of {shards:,} shards are kept in {output}: run the"
                " same command again to continue"
            )
        raise
    seconds = time.perf_counter() - start
    message(f"{missing:,} shards, {tokens:,} tokens in {seconds:.1f} s")
