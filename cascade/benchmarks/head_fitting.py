"""Benchmark of fitting exit heads, compared with the forward pass that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cascade.benchmarks.passes import bare_forward
from cascade.benchmarks.records import BenchmarkRecord
from cascade.benchmarks.timing import (
    INTERVAL,
    CorpusBenchmarkConfig,
    ratio_target,
    session,
)
from cascade.core.provenance import provenance_of
from cascade.corpora.blocks import load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.exits.head_fitting import fit_heads
from cascade.models.loading import load

#: Description of each variant, as stored in the record.
VARIANTS = {
    "bare": "decoder forward pass only, without LM head, cache and sums",
    "fit": "cascade fit-heads in closed form: the pass, the sums and the solutions",
}


@dataclass(frozen=True)
class HeadFittingBenchmarkConfig(CorpusBenchmarkConfig):
    """Options of the benchmark of fitting exit heads.

    Attributes:
        layers: Exit layers, all fitted in the same pass.
        tokens: Tokens per pass, rounded down to whole sequences. The embedded corpus is repeated as
            often as needed. The cost of solving does not depend on the number of tokens.

    Raises:
        BenchmarkError: A number is too small.
    """

    layers: tuple[int, ...] = (20, 24, 26, 28, 29)
    tokens: int = 16384
    rounds: int = 3


class HeadFittingBenchmark(BenchmarkRecord, frozen=True, kw_only=True):
    """Record of the benchmark of fitting exit heads."""

    KIND = "bench.fit"
    COMMAND = "bench fit --output"

    kind: Literal["bench.fit"] = "bench.fit"
    settings: HeadFittingBenchmarkConfig


def benchmark_head_fitting(
    config: HeadFittingBenchmarkConfig,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> HeadFittingBenchmark:
    """Time fitting exit heads and the bare forward pass over the same tokens.

    Args:
        config: Options of the benchmark.
        command: Command that the user ran, for the provenance.
        progress: Called with a message for each step.

    Returns:
        The record. A missed target does not raise an error.

    Raises:
        UsageError: The model does not have an exit layer.
        ModelError: The model cannot be loaded.
        DeviceError: The device is missing.
    """
    with session(config, progress) as (config, run):
        run.progress(f"Loading {config.model}")
        stack = load(config.model, device=config.device)
        blocks = load_blocks(EMBEDDED, stack.tokenizer, seq_len=config.seq_len, num_samples=None)
        ids = np.resize(blocks.ids, (config.tokens // config.seq_len, config.seq_len))
        blocks = replace(blocks, ids=ids)
        size = config.batch_size
        timings = run.time(
            {
                "bare": lambda: bare_forward(stack, blocks, size),
                "fit": lambda: fit_heads(stack, blocks, config.layers, batch_size=size),
            },
            stack.device,
        )
    (ratio,) = run.ratios(timings, [("fit", "bare")])
    return HeadFittingBenchmark(
        provenance=run.provenance(provenance_of(stack, blocks, command)),
        settings=replace(config, tokens=blocks.tokens),
        variants=timings.rows(VARIANTS, tokens=blocks.tokens),
        order=timings.order,
        ratios=[ratio],
        interval=INTERVAL,
        targets=[ratio_target(ratio, "at most", 1.1)],
    )
