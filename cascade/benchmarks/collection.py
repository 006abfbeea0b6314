"""Benchmark of collecting similarities: time several variants and compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from msgspec import field

from cascade.benchmarks.memory import LONG, measure_peak, measure_usage, not_measured
from cascade.benchmarks.passes import angular_distances, bare_forward, seed_means
from cascade.benchmarks.records import BenchmarkRecord, MemoryUsage, PassPeak, Ratio, Target
from cascade.benchmarks.timing import (
    INTERVAL,
    BenchmarkError,
    CorpusBenchmarkConfig,
    Session,
    Timings,
    Variant,
    pinned_threads,
    ratio_target,
    session,
    target,
)
from cascade.core.arrays import Array
from cascade.core.schema import Finite, Part
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import SaturationProfile, analyze

#: Description of each variant, as stored in the record.
VARIANTS = {
    "seed_fp32": "whole model, output_hidden_states=True, normalized product per layer",
    "bare_fp32": "decoder forward pass only, without LM head, cache and statistics",
    "analyze_fp32": "cascade analyze",
    "bare_bf16": "decoder forward pass only, in bfloat16",
    "analyze_bf16": "cascade analyze, in bfloat16",
    "angular_fp32": "peer method: whole model, angular distance per layer, last token only",
}

#: Ratios of seconds, variant over reference.
RATIOS = (
    ("analyze_fp32", "bare_fp32"),
    ("seed_fp32", "analyze_fp32"),
    ("seed_fp32", "analyze_bf16"),
    # Upper bound for any analysis of all layers on the same machine.
    ("seed_fp32", "bare_fp32"),
    ("bare_bf16", "analyze_bf16"),
    ("angular_fp32", "analyze_fp32"),
)


@dataclass(frozen=True)
class CollectionBenchmarkConfig(CorpusBenchmarkConfig):
    """Options of the benchmark of collecting similarities.

    Raises:
        BenchmarkError: A number is too small.
    """


class Peer(Part, frozen=True, kw_only=True):
    """The peer method that collecting is compared with.

    Attributes:
        variant: Variant that runs the method.
        rebuilt: Whether the method is reimplemented here.
        reason: Reason for the reimplementation.
        source: Publication of the method.
    """

    variant: str = field(name="way")
    rebuilt: bool
    reason: str
    source: str


PEER = Peer(
    variant="angular_fp32",
    rebuilt=True,
    reason=(
        "short-transformers 1.0.0 does not run on transformers 5: it expects a tuple as output of "
        "a decoder layer, but transformers 5 returns a tensor (RuntimeError in the first forward "
        "pass); it also supports no batches. The method is reimplemented here with batches, so "
        "the ratio says nothing about the speed of that package"
    ),
    source=(
        "Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers; "
        "block influence: Men et al. 2024, ShortGPT"
    ),
)


class LargestDifference(Part, frozen=True, kw_only=True):
    """The layer whose mean similarity differs most between two variants.

    Attributes:
        layer: Label of the layer, for example "30+norm".
        difference: Difference of the means.
    """

    layer: str
    difference: Finite


class Agreement(Part, frozen=True, kw_only=True):
    """The largest differences between variants. A faster variant must give the same results.

    Attributes:
        bf16: `analyze` in bfloat16, compared with `analyze` in fp32.
        seed: The original study's pass, compared with `analyze` in fp32.
    """

    bf16: LargestDifference
    seed: LargestDifference


class CollectionBenchmark(BenchmarkRecord, frozen=True, kw_only=True):
    """Record of the benchmark of collecting similarities."""

    KIND = "bench.collect"
    COMMAND = "bench collect --output"

    kind: Literal["bench.collect"] = "bench.collect"
    settings: CollectionBenchmarkConfig
    agreement: Agreement
    peer: Peer
    memory: MemoryUsage


def benchmark_collection(
    config: CollectionBenchmarkConfig,
    *,
    memory: bool = True,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> CollectionBenchmark:
    """Time every variant of collecting similarities over the embedded corpus.

    Args:
        config: Options of the benchmark.
        memory: Also measure peak memory, in separate processes.
        command: Command that the user ran, for the provenance.
        progress: Called with a message for each step.

    Returns:
        The record. A missed target does not raise an error.

    Raises:
        BenchmarkError: The corpus has too few tokens, or a process that measures memory failed.
        ModelError: The model cannot be loaded.
        DeviceError: The device is missing or does not support bfloat16.
    """
    with session(config, progress) as (config, run):
        timings, tokens = _timings(config, run, command)
    usage = not_measured("disabled by --no-memory")
    if memory:
        usage = measure_usage(
            CollectionBenchmark.KIND,
            asdict(config),
            "analyze_fp32",
            others=("seed_fp32",),
            progress=run.progress,
        )
    ratios, agreement = run.ratios(timings, RATIOS), _agreement(timings.results)
    return CollectionBenchmark(
        provenance=run.provenance(timings.results["analyze_fp32"].provenance),
        settings=replace(config, tokens=tokens),
        variants=timings.rows(VARIANTS, tokens=tokens),
        order=timings.order,
        ratios=ratios,
        interval=INTERVAL,
        agreement=agreement,
        peer=PEER,
        memory=usage,
        targets=collection_targets(ratios, agreement, usage.growth_mb),
    )


def _timings(
    config: CollectionBenchmarkConfig, run: Session, command: str | None
) -> tuple[Timings, int]:
    """Return the times and the tokens of one pass. The models are freed afterwards."""
    run.progress(f"Loading {config.model} in fp32 and bf16")
    stack = load(config.model, device=config.device)
    narrow = load(config.model, dtype="bfloat16", device=config.device)
    blocks = _read_blocks(config, stack)
    variants = collection_variants(stack, narrow, blocks, config.batch_size, command=command)
    return run.time(variants, stack.device), blocks.tokens


def _read_blocks(config: CollectionBenchmarkConfig, stack: DecoderStack) -> TokenBlocks:
    blocks = load_blocks(
        EMBEDDED,
        stack.tokenizer,
        seq_len=config.seq_len,
        num_samples=None,
        max_tokens=config.tokens,
    )
    wanted = config.tokens // config.seq_len * config.seq_len
    if blocks.tokens < wanted:
        raise BenchmarkError(
            f"expected {wanted} tokens, but the embedded corpus has only {blocks.tokens} in "
            f"sequences of {config.seq_len}; use a smaller --tokens"
        )
    return blocks


def collection_variants(
    stack: DecoderStack,
    narrow: DecoderStack,
    blocks: TokenBlocks,
    batch_size: int,
    *,
    command: str | None = None,
) -> dict[str, Variant]:
    """Return all variants. Each processes the same blocks in the same batches.

    Args:
        stack: The model in fp32.
        narrow: The same model in bfloat16.
        blocks: Token blocks.
        batch_size: Sequences per forward pass.
        command: Command that the user ran, for the provenance of the profile.
    """
    return {
        "seed_fp32": lambda: seed_means(stack, blocks, batch_size),
        "bare_fp32": lambda: bare_forward(stack, blocks, batch_size),
        "analyze_fp32": lambda: analyze(stack, blocks, batch_size=batch_size, command=command),
        "bare_bf16": lambda: bare_forward(narrow, blocks, batch_size),
        "analyze_bf16": lambda: analyze(narrow, blocks, batch_size=batch_size),
        "angular_fp32": lambda: angular_distances(stack, blocks, batch_size),
    }


# --- Results ---------------------------------------------------------------------------------


def _agreement(results: Mapping[str, Any]) -> Agreement:
    """Return the largest differences between the layer means of the variants."""
    wide: SaturationProfile = results["analyze_fp32"]
    narrow: SaturationProfile = results["analyze_bf16"]
    labels = wide.statistics.layers
    means = wide.statistics.mean()
    normed = labels[-1].endswith("+norm")
    # If the model has a final norm, the original study's pass has no row for layer N itself.
    seen = np.array([not normed or row != len(labels) - 2 for row in range(len(labels))])
    by_seed = [label for label, present in zip(labels, seen, strict=True) if present]
    return Agreement(
        bf16=_farthest(labels, narrow.statistics.mean() - means),
        seed=_farthest(by_seed, results["seed_fp32"] - means[seen]),
    )


def _farthest(labels: Sequence[str], difference: Array) -> LargestDifference:
    row = int(np.argmax(np.abs(difference)))
    return LargestDifference(layer=labels[row], difference=float(difference[row]))


def collection_targets(
    ratios: Sequence[Ratio], agreement: Agreement, growth_mb: float | None
) -> list[Target]:
    """Compare the results with the targets for 2 cores and 4,096 tokens.

    Args:
        ratios: Ratios of the record.
        agreement: Differences between variants.
        growth_mb: Additional memory of the long pass in MB; None if not measured.

    Returns:
        One row per target. `met` is None if nothing was measured.
    """
    found = {row.name: row for row in ratios}
    return [
        ratio_target(found["analyze_fp32/bare_fp32"], "at most", 1.05),
        ratio_target(found["seed_fp32/analyze_fp32"], "at least", 1.3),
        ratio_target(found["seed_fp32/analyze_bf16"], "at least", 2.4),
        target("layer mean, bf16 from fp32", "at most", 2e-3, abs(agreement.bf16.difference)),
        target(f"memory growth at {LONG}x, MB", "below", 10.0, growth_mb),
    ]


# --- Memory ----------------------------------------------------------------------------------


def peak_of_variant(config: CollectionBenchmarkConfig, variant: str, factor: int) -> PassPeak:
    """Run one variant in this process and return its peak memory.

    Args:
        config: Options of the benchmark.
        variant: "analyze_fp32" or "seed_fp32".
        factor: Number of times that the measured pass repeats the blocks.
    """
    size = config.batch_size
    passes: dict[str, Callable[[DecoderStack, TokenBlocks], object]] = {
        "analyze_fp32": lambda stack, blocks: analyze(stack, blocks, batch_size=size),
        "seed_fp32": lambda stack, blocks: seed_means(stack, blocks, size),
    }
    run_pass = passes[variant]
    with pinned_threads(config.threads):
        stack = load(config.model, device=config.device)
        blocks = _read_blocks(config, stack)

        def repeat(times: int) -> int:
            many = replace(blocks, ids=np.tile(blocks.ids, (times, 1)))
            run_pass(stack, many)
            return many.tokens

        return measure_peak(repeat, factor)
