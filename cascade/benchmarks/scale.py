"""Benchmark of Ray: one and two workers against one process, and what dividing the work costs."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cascade.benchmarks.records import BenchmarkRecord, Target
from cascade.benchmarks.timing import (
    INTERVAL,
    CorpusBenchmarkConfig,
    Timings,
    check_least,
    pinned_threads,
    session,
    target,
)
from cascade.core.arrays import Array
from cascade.core.provenance import provenance_of
from cascade.core.schema import Count, Finite, Part
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.engines.cluster import Cluster, cluster
from cascade.engines.config import EngineConfig
from cascade.engines.profiles import measure_on_ray
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import analyze
from cascade.shards.merging import merge
from cascade.shards.plan import PILOT_FILE, PLAN_FILES, Plan
from cascade.shards.planning import plan
from cascade.shards.shard_files import read_shard

#: Description of each variant, as stored in the record.
VARIANTS = {
    "process-1": "cascade.analyze in one process with one thread",
    "process-2": "cascade.analyze in one process with two threads",
    "ray-1": "the shards of a plan on Ray, one worker with one thread; the model is loaded before",
    "ray-2": "the shards of a plan on Ray, two workers with one thread each",
}

_OVERHEAD = (
    "planning without what `cascade analyze --output` measures too: the pilot, which no shard "
    "measures again, and the noise floor; scheduling: the seconds of one worker less those in "
    "which its tasks measured; merging with all checks"
)


@dataclass(frozen=True)
class ScaleBenchmarkConfig(CorpusBenchmarkConfig):
    """Options of the benchmark of Ray.

    Attributes:
        tokens: Tokens per pass, rounded down to whole sequences. The embedded corpus is repeated as
            often as needed.
        shards: Number of shards.

    Raises:
        BenchmarkError: A number is too small.
    """

    tokens: int = 32768
    rounds: int = 3
    shards: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, {"shards": 2}, {"shards": "one for each worker"})


class Overhead(Part, frozen=True, kw_only=True):
    """What dividing the work costs, in seconds.

    Attributes:
        what: What is counted.
        starting: Starting the cluster, and its workers with their models. Not in `share`.
        noise: Measuring the noise floor for the plan. Not in `share`.
        pilot: Measuring the first batches for the plan, which shards take from it. Not in `share`.
        planning: Making the plan, without the pilot and the noise floor.
        scheduling: Everything that one worker does not spend on measuring, median over rounds.
        merging: Merging the shards.
        measuring: Measuring every token by one worker, median over rounds. The timed shards take
            nothing from a pilot.
        share: Planning, scheduling and merging over measuring.
    """

    what: str
    starting: Finite
    noise: Finite
    pilot: Finite
    planning: Finite
    scheduling: Finite
    merging: Finite
    measuring: Finite
    share: Finite


class ScaleBenchmark(BenchmarkRecord, frozen=True, kw_only=True):
    """Record of the benchmark of Ray.

    Attributes:
        engine: The engine and its version.
        efficiency: The speed of two workers over twice that of one, by what they are compared with.
        overhead: What dividing the work costs.
        same: Whether all shards together have the statistics of one process with one thread.
        sequences: Sequences per pass.
    """

    KIND = "bench.scale"
    COMMAND = "bench scale --output"

    kind: Literal["bench.scale"] = "bench.scale"
    settings: ScaleBenchmarkConfig
    engine: str
    efficiency: dict[str, Finite]
    overhead: Overhead
    same: bool
    sequences: Count


@dataclass(frozen=True)
class _Divided:
    """A plan of which fresh copies are measured, and what making it took.

    Attributes:
        plan: The plan as `cascade plan` makes it, whose shards take what its pilot measured.
        whole: The same with given bin edges, so that its tasks measure every token. It is timed.
        planning: Seconds of planning that measured nothing.
        measured: Seconds of measuring for the plan, by what was measured.
        place: Where copies are made.
    """

    plan: Plan
    whole: Plan
    planning: float
    measured: dict[str, float]
    place: Path

    @contextmanager
    def fresh(self, plan: Plan) -> Iterator[Plan]:
        """Yield a copy of one of the plans, without shards."""
        with tempfile.TemporaryDirectory(dir=self.place) as folder:
            for name in (*PLAN_FILES, PILOT_FILE):
                if (plan.folder / name).exists():
                    os.link(plan.folder / name, Path(folder) / name)
            yield Plan.read(folder)


def benchmark_scale(
    config: ScaleBenchmarkConfig,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> ScaleBenchmark:
    """Time one and two workers of Ray against one process with one and two threads.

    Args:
        config: Options of the benchmark.
        command: Command that the user ran, for the provenance.
        progress: Called with a message for each step.

    Returns:
        The record. A missed target does not raise an error.

    Raises:
        UsageError: Ray is not installed, or there are more shards than batches.
        ModelError: The model cannot be loaded.
    """
    place = Path(tempfile.mkdtemp(prefix="cascade-scale-"))
    try:
        with session(replace(config, threads=1), progress) as (config, run):
            run.progress(f"Loading {config.model}")
            stack = load(config.model, device=config.device)
            blocks = _blocks(stack, config)
            run.progress("Planning")
            divided = _divided(stack, blocks, config, place)
            workers = EngineConfig(workers=2, threads=1)
            run.progress("Starting Ray and loading the model in its workers")
            start = time.perf_counter()
            with cluster(workers) as found:
                for _ in range(2):  # the second time, both workers are sure to have the model
                    _on_ray(divided, found, 2)
                starting = time.perf_counter() - start
                measured: list[tuple[float, float]] = []
                timings = run.time(
                    {
                        "process-1": lambda: _alone(stack, blocks, config, 1),
                        "process-2": lambda: _alone(stack, blocks, config, 2),
                        "ray-1": lambda: measured.append(_on_ray(divided, found, 1)),
                        "ray-2": lambda: _on_ray(divided, found, 2),
                    },
                    torch.device("cpu"),
                )
            run.progress("Merging")
            merging, same = _merged(divided, stack, blocks, config, workers)
            ratios = run.ratios(
                timings,
                [("ray-1", "process-1"), ("ray-2", "process-1"), ("ray-2", "process-2")],
            )
            made = run.provenance(provenance_of(stack, blocks, command))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    overhead = _overhead(divided, measured[1:], starting, merging)
    return ScaleBenchmark(
        provenance=made,
        settings=replace(config, tokens=blocks.tokens),
        variants=timings.rows(VARIANTS, tokens=blocks.tokens),
        order=timings.order,
        ratios=ratios,
        interval=INTERVAL,
        targets=_targets(overhead),
        engine=found.engine,
        efficiency=_efficiency(timings),
        overhead=overhead,
        same=same,
        sequences=len(blocks.ids),
    )


def _blocks(stack: DecoderStack, config: ScaleBenchmarkConfig) -> TokenBlocks:
    blocks = load_blocks(EMBEDDED, stack.tokenizer, seq_len=config.seq_len, num_samples=None)
    shape = (config.tokens // config.seq_len, config.seq_len)
    return replace(blocks, ids=np.resize(blocks.ids, shape))


def _divided(
    stack: DecoderStack, blocks: TokenBlocks, config: ScaleBenchmarkConfig, place: Path
) -> _Divided:
    def planned(name: str, edges: Array | None = None) -> Plan:
        return plan(
            stack,
            blocks,
            place / name,
            shards=config.shards,
            batch_size=config.batch_size,
            edges=edges,
            long_context=0,
        )

    start = time.perf_counter()
    made = planned("plan")
    seconds = time.perf_counter() - start
    measured = {} if made.planning is None else made.planning.seconds
    whole = planned("whole", made.edges)
    return _Divided(made, whole, seconds - sum(measured.values()), measured, place)


def _alone(
    stack: DecoderStack, blocks: TokenBlocks, config: ScaleBenchmarkConfig, threads: int
) -> None:
    with pinned_threads(threads):
        analyze(stack, blocks, batch_size=config.batch_size)


def _on_ray(divided: _Divided, found: Cluster, workers: int) -> tuple[float, float]:
    """Measure every token on Ray; return the seconds in all, and those of measuring."""
    with divided.fresh(divided.whole) as made:
        start = time.perf_counter()
        measure_on_ray(made, EngineConfig(workers=workers, threads=1))
        seconds = time.perf_counter() - start
        shards = (read_shard(made, number) for number in range(len(made.record.shards)))
        return seconds, sum(shard.record.seconds for shard in shards if shard is not None)


def _merged(
    divided: _Divided,
    stack: DecoderStack,
    blocks: TokenBlocks,
    config: ScaleBenchmarkConfig,
    workers: EngineConfig,
) -> tuple[float, bool]:
    """Return the seconds of merging, and whether the profile is that of one process."""
    with (
        divided.fresh(divided.plan) as made,
        tempfile.TemporaryDirectory(dir=divided.place) as output,
    ):
        measure_on_ray(made, workers)
        start = time.perf_counter()
        merged = merge(made, Path(output) / "run")
        seconds = time.perf_counter() - start
        alone = analyze(stack, blocks, batch_size=config.batch_size)
        return seconds, merged.record().layers == alone.record().layers


def _overhead(
    divided: _Divided, measured: list[tuple[float, float]], starting: float, merging: float
) -> Overhead:
    measuring = float(np.median([inside for _, inside in measured]))
    scheduling = float(np.median([whole - inside for whole, inside in measured]))
    return Overhead(
        what=_OVERHEAD,
        starting=round(starting, 3),
        noise=round(divided.measured["noise"], 3),
        pilot=round(divided.measured["pilot"], 3),
        planning=round(divided.planning, 3),
        scheduling=round(scheduling, 3),
        merging=round(merging, 3),
        measuring=round(measuring, 3),
        share=(divided.planning + scheduling + merging) / measuring,
    )


def _efficiency(timings: Timings) -> dict[str, float]:
    median = {name: float(np.median(seconds)) for name, seconds in timings.seconds.items()}
    return {
        "one worker": median["ray-1"] / (2 * median["ray-2"]),
        "one process with one thread": median["process-1"] / (2 * median["ray-2"]),
        "one process with two threads": median["process-2"] / median["ray-2"],
    }


def _targets(overhead: Overhead) -> list[Target]:
    name = "planning, scheduling and merging over measuring"
    return [target(name, "at most", 0.05, overhead.share)]
