"""Benchmark of collecting hard tokens, compared with the forward pass that it needs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cascade.benchmarks.records import BenchmarkRecord
from cascade.benchmarks.timing import (
    INTERVAL,
    CorpusBenchmarkConfig,
    check_least,
    ratio_target,
    session,
)
from cascade.core.provenance import SPLITS, Split, provenance_of
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.decoding.exit_support import check_exits
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.plan import CollectingConfig

#: Description of each variant, as stored in the record.
VARIANTS = {
    "bare": "decoder forward pass only, with a visitor that ignores every state",
    "collect": "cascade collect-hard: the pass, the similarity, the dataset on disk and its hashes",
}

#: Share of hard tokens in the original study.
HARD_RATIO = 0.5


@dataclass(frozen=True)
class HardTokenBenchmarkConfig(CorpusBenchmarkConfig):
    """Options of the benchmark of collecting hard tokens.

    Attributes:
        layer: Exit layer (default: second to last).
        tokens: Tokens per pass, rounded down to whole sequences; a fifth of them is held out. The
            embedded corpus is repeated as often as needed.

    Raises:
        BenchmarkError: A number is too small.
    """

    layer: int | None = None
    tokens: int = 20480
    rounds: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, {"tokens": 5 * self.seq_len})


class HardTokenBenchmark(BenchmarkRecord, frozen=True, kw_only=True):
    """Record of the benchmark of collecting hard tokens."""

    KIND = "bench.collect-hard"
    COMMAND = "bench collect-hard --output"

    kind: Literal["bench.collect-hard"] = "bench.collect-hard"
    settings: HardTokenBenchmarkConfig


def benchmark_hard_tokens(
    config: HardTokenBenchmarkConfig,
    *,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> HardTokenBenchmark:
    """Time collecting hard tokens and the bare forward pass over the same batches.

    Args:
        config: Options of the benchmark.
        command: Command that the user ran, for the provenance.
        progress: Called with a message for each step.

    Returns:
        The record. A missed target does not raise an error.

    Raises:
        UsageError: The model does not have the exit layer.
        ModelError: The model cannot be loaded.
        DeviceError: The device is missing.
        OutputError: The system's folder for temporary files is too small.
    """
    with session(config, progress) as (config, run), tempfile.TemporaryDirectory() as folder:
        run.progress(f"Loading {config.model}")
        stack = load(config.model, device=config.device)
        check_exits(stack)  # runs the model once; the timed rounds find the answer
        layer = max(1, stack.num_layers - 1) if config.layer is None else config.layer
        splits = _splits(stack, config)
        size, output = config.batch_size, Path(folder) / "hard"
        timings = run.time(
            {
                "bare": lambda: bare_visit(stack, splits, size),
                "collect": lambda: collect(stack, splits, layer, size, output),
            },
            stack.device,
        )
    tokens = sum(blocks.tokens for blocks in splits.values())
    (ratio,) = run.ratios(timings, [("collect", "bare")])
    return HardTokenBenchmark(
        provenance=run.provenance(provenance_of(stack, splits["train"], command)),
        settings=replace(config, layer=layer, tokens=tokens),
        variants=timings.rows(VARIANTS, tokens=tokens),
        order=timings.order,
        ratios=[ratio],
        interval=INTERVAL,
        targets=[ratio_target(ratio, "at most", 1.15)],
    )


def bare_visit(stack: DecoderStack, splits: Mapping[Split, TokenBlocks], batch_size: int) -> None:
    """Run the decoder over all batches and ignore the states. Collecting cannot be faster.

    Args:
        stack: The model.
        splits: Splits of the corpus.
        batch_size: Sequences per forward pass.
    """
    for blocks in splits.values():
        for ids, _ in blocks.batches(batch_size):
            stack.visit(torch.from_numpy(ids).long().to(stack.device), lambda entry, hidden: None)


def collect(
    stack: DecoderStack,
    splits: Mapping[Split, TokenBlocks],
    layer: int,
    batch_size: int,
    folder: Path,
) -> None:
    """Collect the hard tokens of a corpus as `cascade collect-hard` does.

    Args:
        stack: The model.
        splits: Splits of the corpus.
        layer: Exit layer.
        batch_size: Sequences per forward pass.
        folder: Output folder. An existing dataset is replaced.
    """
    collect_hard(
        stack,
        splits,
        folder,
        CollectingConfig(layer=layer, hard_ratio=HARD_RATIO, batch_size=batch_size),
        overwrite=True,
    )


def _splits(stack: DecoderStack, config: HardTokenBenchmarkConfig) -> dict[Split, TokenBlocks]:
    total = config.tokens // config.seq_len
    rows = dict(zip(SPLITS, (total - total // 5, total // 5), strict=True))
    return {split: _repeated(stack, config.seq_len, split, rows[split]) for split in SPLITS}


def _repeated(stack: DecoderStack, seq_len: int, split: Split, rows: int) -> TokenBlocks:
    """Return a split of the embedded corpus, repeated up to the given number of sequences."""
    blocks = load_blocks(
        EMBEDDED,
        stack.tokenizer,
        seq_len=seq_len,
        num_samples=None,
        record_split=split,
        marks=True,
    )
    shape = (rows, seq_len)
    if blocks.record_of is None or blocks.response is None:
        raise ValueError("expected blocks with marks of their records, got none")
    return replace(
        blocks,
        ids=np.resize(blocks.ids, shape),
        record_of=np.resize(blocks.record_of, shape),
        response=np.resize(blocks.response, shape),
    )
