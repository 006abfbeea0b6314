"""Compare a model on several corpora: differences per layer, and transfer of thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cascade.core.defaults import HARD_RATIOS
from cascade.core.errors import CorpusError, UsageError
from cascade.core.provenance import CorpusProvenance
from cascade.core.schema import from_plain, to_plain
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.corpora.bos import check_same_bos
from cascade.models.stack import DecoderStack
from cascade.studies.comparisons.corpus_differences import (
    CONFIDENCE,
    LABELS,
    corpus_differences,
    layer_means,
    special_layers,
    threshold_transfers,
)
from cascade.studies.comparisons.corpus_measurement import MeasuredCorpus, measure_corpus
from cascade.studies.comparisons.corpus_records import (
    CorporaProvenance,
    CorpusComparison,
    CorpusComparisonSettings,
    SharedSequences,
)

#: Smallest relevant difference of a layer's mean similarity. The published table of SmolLM2-135M
#: and ours, measured with other weights on other text of the same kind, differ by up to 0.009.
MARGIN = 0.01

#: Largest difference between the actual and the requested hard ratio of a threshold that transfers.
TOLERANCE = 0.05


@dataclass(frozen=True)
class CorpusComparisonConfig:
    """Options for comparing corpora.

    Attributes:
        layer: Exit layer whose thresholds are applied, from 1 (default: suggested by the profile
            on the first corpus).
        hard_ratios: Shares of hard tokens that thresholds are fitted to, in (0, 1).
        margin: Smallest relevant difference of a layer's mean similarity.
        tolerance: Largest difference between the actual and the requested hard ratio.
        seed: Seed of the resamples.
    """

    layer: int | None = None
    hard_ratios: tuple[float, ...] = HARD_RATIOS
    margin: float = MARGIN
    tolerance: float = TOLERANCE
    seed: int = 0

    def check(self) -> None:
        """Check the options.

        Raises:
            UsageError: An option is out of range.
        """
        if self.layer is not None and self.layer < 1:
            raise UsageError(f"expected --layer of at least 1, got {self.layer}")
        if not self.hard_ratios:
            raise UsageError("expected at least one hard ratio, got none; 0.5 is a usual value")
        for ratio in self.hard_ratios:
            if not 0 < ratio < 1:
                raise UsageError(
                    f"expected a --hard-ratio between 0 and 1, got {ratio:g}; with 0.7, 70 % of "
                    "tokens continue"
                )
        if not 0 < self.margin < 2:
            raise UsageError(
                f"expected a --margin between 0 and 2, got {self.margin:g}; it is a difference of "
                "mean similarities"
            )
        if not 0 < self.tolerance < 1:
            raise UsageError(
                f"expected a --tolerance between 0 and 1, got {self.tolerance:g}; it is a share of "
                "tokens"
            )
        if self.seed < 0:
            raise UsageError(f"expected a --seed of 0 or more, got {self.seed}")


def compare_corpora(
    stack: DecoderStack,
    corpora: Sequence[TokenBlocks],
    config: CorpusComparisonConfig | None = None,
    *,
    batch_size: int = 32,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> CorpusComparison:
    """Measure a model on several corpora and compare each with the first one.

    Each corpus takes one pass. Intervals resample whole sequences. The intervals of differences to
    the first corpus hold simultaneously for all layers and are compared with a margin. Thresholds
    of the exit layer are fitted on each corpus and applied to every other corpus.

    In addition to one batch, the similarities of the exit layer are kept in memory (4 bytes per
    token). Without a given exit layer, those of all layers are kept during the first pass.

    Args:
        stack: The model.
        corpora: Two or more corpora with at least two sequences each. The first one is the
            reference.
        config: Options of the comparison.
        batch_size: Sequences per forward pass.
        command: Command that the user ran, for the provenance.
        progress: Called with the number of tokens processed since the last call.

    Raises:
        UsageError: There are fewer than two or too many corpora, or an option is out of range.
        CorpusError: A corpus is too small, too long for the model, or given twice.
        ModelError: A state is not finite.

    Example:
        >>> from cascade import compare_corpora, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> corpora = [
        ...     load_blocks("embedded", stack.tokenizer, max_tokens=512, record_split=split)
        ...     for split in ("train", "held-out")
        ... ]
        >>> record = compare_corpora(stack, corpora)
        >>> [corpus.label for corpus in record.corpora]
        ['A', 'B']
    """
    config = config or CorpusComparisonConfig()
    check_corpora(stack, corpora, config, batch_size)
    measured: list[MeasuredCorpus] = []
    for blocks in corpora:
        # Without a given exit layer, the first corpus suggests one.
        layer = measured[0].layer if measured else config.layer
        measured.append(
            measure_corpus(
                stack, blocks, layer, batch_size=batch_size, command=command, progress=progress
            )
        )
    draws = [
        corpus.resampled(np.random.default_rng([config.seed, number]))
        for number, corpus in enumerate(measured)
    ]
    labels = stack.layer_labels
    compared = [
        corpus.described(label, draw)
        for label, corpus, draw in zip(LABELS, measured, draws, strict=False)
    ]
    hard_ratios = list(dict.fromkeys(config.hard_ratios))
    return CorpusComparison(
        provenance=_provenance(measured[0], corpora),
        settings=CorpusComparisonSettings(
            layer=measured[0].layer,
            hard_ratios=hard_ratios,
            margin=config.margin,
            tolerance=config.tolerance,
            seed=config.seed,
            layer_suggested=config.layer is None,
            confidence=CONFIDENCE,
        ),
        corpora=compared,
        shared=_shared(corpora),
        layers=layer_means(labels, measured, draws),
        differences=corpus_differences(labels, measured, draws, config.margin),
        special=special_layers(compared, labels),
        thresholds=threshold_transfers(measured, hard_ratios, config.tolerance, config.seed),
    )


def _provenance(first: MeasuredCorpus, corpora: Sequence[TokenBlocks]) -> CorporaProvenance:
    provenance = first.provenance
    return CorporaProvenance(
        tokenizer_hash=provenance.tokenizer_hash,
        model=provenance.model,
        machine=provenance.machine,
        versions=provenance.versions,
        command=provenance.command,
        corpora={
            label: from_plain(to_plain(blocks.provenance()), CorpusProvenance)
            for label, blocks in zip(LABELS, corpora, strict=False)
        },
    )


def _shared(corpora: Sequence[TokenBlocks]) -> list[SharedSequences]:
    """Return the pairs of corpora that share sequences, with the number of shared sequences."""
    prints = [set(blocks.sequence_fingerprints().tolist()) for blocks in corpora]
    pairs = [(a, b) for b in range(len(corpora)) for a in range(b)]
    return [
        SharedSequences(corpora=[LABELS[a], LABELS[b]], sequences=len(prints[a] & prints[b]))
        for a, b in pairs
        if prints[a] & prints[b]
    ]


def check_corpora(
    stack: DecoderStack,
    corpora: Sequence[TokenBlocks],
    config: CorpusComparisonConfig,
    batch_size: int,
) -> None:
    """Check the arguments of `compare_corpora` before anything is measured.

    Args:
        stack: The model.
        corpora: Corpora to compare.
        config: Options of the comparison.
        batch_size: Sequences per forward pass.

    Raises:
        UsageError: See `compare_corpora`.
        CorpusError: See `compare_corpora`.
        ModelError: A token is outside the model's vocabulary.
    """
    config.check()
    check_number(len(corpora))
    if config.layer is not None and config.layer > stack.num_layers:
        raise UsageError(
            f"expected --layer in 1..{stack.num_layers}, got {config.layer}; choose a layer of the "
            "model"
        )
    seen: dict[str, str] = {}
    for blocks in corpora:
        check_blocks(stack, blocks, batch_size)
        check_same_bos(corpora[0].bos, blocks.bos, what="the first corpus is text")
        if len(blocks.ids) < 2:
            raise CorpusError(
                f"expected at least 2 sequences of {blocks.name} for an interval, got "
                f"{len(blocks.ids)}; choose a larger corpus, a larger --max-tokens or a smaller "
                "--seq-len"
            )
        fingerprint = blocks.fingerprint()
        if fingerprint in seen:
            raise CorpusError(
                f"expected different corpora, got the same tokens from {seen[fingerprint]} and "
                f"{blocks.source}; leave one out"
            )
        seen[fingerprint] = blocks.source


def check_number(corpora: int) -> None:
    """Check the number of corpora.

    Raises:
        UsageError: There are fewer than two corpora, or more than labels.
    """
    if corpora < 2:
        raise UsageError(f"expected at least 2 corpora to compare, got {corpora}; add another one")
    if corpora > len(LABELS):
        raise UsageError(
            f"expected at most {len(LABELS)} corpora, got {corpora}; compare the others in another "
            "run, with the same first one"
        )
