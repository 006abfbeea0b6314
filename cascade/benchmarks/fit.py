"""Fitting exit heads, timed against the forward pass that it needs: a record `bench.fit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from cascade.benchmarks.collect import bare_forward
from cascade.benchmarks.timing import (
    INTERVAL,
    Record,
    check_least,
    load_average,
    machine_provenance,
    pinned_threads,
    ratio_rows,
    synchronize,
    target_row,
    time_ways,
    way_rows,
)
from cascade.core.provenance import provenance_of
from cascade.corpora.blocks import load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.exits.head_fitting import fit_heads
from cascade.models.loading import load

#: The kind of the record.
KIND = "bench.fit"

#: What each way does, in the record's words.
WAYS = {
    "bare": "decoder forward alone, without LM head, cache and sums",
    "fit": "cascade fit-heads in closed form: the pass, the sums and the solutions",
}


@dataclass(frozen=True)
class FitSetup:
    """What is measured; the same for both ways.

    Attributes:
        model: Anything that `models.load` takes.
        layers: Exit layers, all fitted in the same pass.
        tokens: Tokens per pass, rounded down to whole sequences; the embedded corpus is taken as
            often as it needs. Solving costs the same for few tokens as for many.
        seq_len: Tokens per sequence.
        batch_size: Sequences per forward pass.
        rounds: Timed passes per way.
        threads: Threads that torch computes with; None leaves the number as it is.
        seed: Draws the order of the ways and the bootstrap's resamples.
        device: "cpu", "cuda", "mps" or "auto".

    Raises:
        BenchmarkError: A number is too small.
    """

    model: str = "smollm2-135m"
    layers: tuple[int, ...] = (20, 24, 26, 28, 29)
    tokens: int = 16384
    seq_len: int = 128
    batch_size: int = 32
    rounds: int = 3
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {"seq_len": 2, "batch_size": 1, "rounds": 2, "threads": 1, "seed": 0}
        check_least(self, least | {"tokens": self.seq_len})


def fit(
    setup: FitSetup,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Record:
    """Time fitting exit heads and the bare forward pass over the same tokens.

    Args:
        setup: What to measure.
        command: What the user ran, for the provenance.
        progress: Told what is being done.

    Returns:
        A record of kind `bench.fit`; a missed target does not raise.

    Raises:
        UsageError: An exit layer that is not there.
        ModelError: The model cannot be loaded.
        DeviceError: The device is absent.
    """
    tell = progress or (lambda _: None)
    load_before = load_average()
    setup = replace(setup, threads=setup.threads or torch.get_num_threads())
    with pinned_threads(setup.threads):
        tell(f"Loading {setup.model}")
        stack = load(setup.model, device=setup.device)
        blocks = load_blocks(EMBEDDED, stack.tokenizer, seq_len=setup.seq_len, num_samples=None)
        ids = np.resize(blocks.ids, (setup.tokens // setup.seq_len, setup.seq_len))
        blocks = replace(blocks, ids=ids)
        _, order, seconds = time_ways(
            {
                "bare": lambda: bare_forward(stack, blocks, setup.batch_size),
                "fit": lambda: fit_heads(stack, blocks, setup.layers, batch_size=setup.batch_size),
            },
            rounds=setup.rounds,
            seed=setup.seed,
            synchronize=lambda: synchronize(stack.device),
            progress=tell,
        )
    (ratio,) = ratios = ratio_rows(seconds, [("fit", "bare")], seed=setup.seed)
    return {
        "schema": 1,
        "kind": KIND,
        "provenance": machine_provenance(provenance_of(stack, blocks, command), load_before),
        "settings": asdict(setup) | {"layers": list(setup.layers), "tokens": blocks.tokens},
        "ways": way_rows(seconds, WAYS, tokens=blocks.tokens),
        "order": order,
        "ratios": ratios,
        "interval": INTERVAL,
        "targets": [
            target_row("fit/bare", "at most", 1.1, ratio["median"], ratio["interval"]),
        ],
    }
