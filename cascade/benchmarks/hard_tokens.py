"""Collecting hard tokens, timed against the forward pass that it needs: `bench.collect-hard`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

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
from cascade.corpora.blocks import PARTS, Part, TokenBlocks, load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.plan import CollectingConfig

#: The kind of the record.
KIND = "bench.collect-hard"

#: What each way does, in the record's words.
WAYS = {
    "bare": "decoder forward alone, every state shown to a visitor that does nothing",
    "collect": "cascade collect-hard: the pass, the similarity, the dataset on disk and its hashes",
}

#: The study's share of hard tokens.
_HARD_RATIO = 0.5


@dataclass(frozen=True)
class HardSetup:
    """What is measured; the same for both ways.

    Attributes:
        model: Anything that `models.load` takes.
        layer: The exit layer; the last but one where None.
        tokens: Tokens per pass, rounded down to whole sequences; a fifth of them is held out. The
            embedded corpus is taken as often as it needs.
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
    layer: int | None = None
    tokens: int = 20480
    seq_len: int = 128
    batch_size: int = 32
    rounds: int = 5
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {"seq_len": 2, "batch_size": 1, "rounds": 2, "threads": 1, "seed": 0}
        check_least(self, least | {"tokens": 5 * self.seq_len})


def collect_hard_tokens(
    setup: HardSetup,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Record:
    """Time collecting hard tokens and the bare forward pass over the same batches.

    Args:
        setup: What to measure.
        command: What the user ran, for the provenance.
        progress: Told what is being done.

    Returns:
        A record of kind `bench.collect-hard`; a missed target does not raise.

    Raises:
        UsageError: An exit layer that is not there.
        ModelError: The model cannot be loaded.
        DeviceError: The device is absent.
        OutputError: The system's folder for temporary files is too small.
    """
    tell = progress or (lambda _: None)
    load_before = load_average()
    setup = replace(setup, threads=setup.threads or torch.get_num_threads())
    with pinned_threads(setup.threads), tempfile.TemporaryDirectory() as folder:
        tell(f"Loading {setup.model}")
        stack = load(setup.model, device=setup.device)
        if setup.layer is None:
            setup = replace(setup, layer=max(1, stack.num_layers - 1))
        parts = _parts(stack, setup)
        tokens = sum(part.tokens for part in parts.values())
        _, order, seconds = time_ways(
            {
                "bare": lambda: bare_visit(stack, parts, setup.batch_size),
                "collect": lambda: _collect(stack, parts, setup, Path(folder) / "hard"),
            },
            rounds=setup.rounds,
            seed=setup.seed,
            synchronize=lambda: synchronize(stack.device),
            progress=tell,
        )
    (ratio,) = ratios = ratio_rows(seconds, [("collect", "bare")], seed=setup.seed)
    provenance = provenance_of(stack, parts["train"], command)
    return {
        "schema": 1,
        "kind": KIND,
        "provenance": machine_provenance(provenance, load_before),
        "settings": asdict(setup) | {"tokens": tokens},
        "ways": way_rows(seconds, WAYS, tokens=tokens),
        "order": order,
        "ratios": ratios,
        "interval": INTERVAL,
        "targets": [
            target_row("collect/bare", "at most", 1.15, ratio["median"], ratio["interval"]),
        ],
    }


def bare_visit(stack: DecoderStack, parts: dict[Part, TokenBlocks], batch_size: int) -> None:
    """Run the decoder over all batches and look at nothing: the limit to be close to.

    Args:
        stack: The model.
        parts: The parts of the corpus.
        batch_size: Sequences per forward pass.
    """
    for blocks in parts.values():
        for ids, _ in blocks.batches(batch_size):
            stack.visit(torch.from_numpy(ids).long().to(stack.device), lambda entry, hidden: None)


def _parts(stack: DecoderStack, setup: HardSetup) -> dict[Part, TokenBlocks]:
    total = setup.tokens // setup.seq_len
    rows = dict(zip(PARTS, (total - total // 5, total // 5), strict=True))
    return {part: _repeated(stack, setup, part, rows[part]) for part in PARTS}


def _repeated(stack: DecoderStack, setup: HardSetup, part: str, rows: int) -> TokenBlocks:
    blocks = load_blocks(
        EMBEDDED,
        stack.tokenizer,
        seq_len=setup.seq_len,
        num_samples=None,
        part=part,  # type: ignore[arg-type]  # one of PARTS
        marks=True,
    )
    shape = (rows, setup.seq_len)
    assert blocks.record_of is not None  # asked for
    assert blocks.response is not None
    return replace(
        blocks,
        ids=np.resize(blocks.ids, shape),
        record_of=np.resize(blocks.record_of, shape),
        response=np.resize(blocks.response, shape),
    )


def _collect(
    stack: DecoderStack, parts: dict[Part, TokenBlocks], setup: HardSetup, folder: Path
) -> None:
    assert setup.layer is not None  # chosen with the model at hand
    collect_hard(
        stack,
        parts,
        folder,
        CollectingConfig(layer=setup.layer, hard_ratio=_HARD_RATIO, batch_size=setup.batch_size),
        overwrite=True,
    )
