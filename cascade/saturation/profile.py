"""Saturation: the similarity of every decoder layer's input and output, per token."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.defaults import HARD_RATIOS
from cascade.core.display import Displayed
from cascade.core.errors import UsageError, not_finite
from cascade.core.provenance import Provenance, provenance_of
from cascade.core.schema import UNSET, UnsetType, from_plain
from cascade.corpora.blocks import ReadingOptions, Texts, TokenBlocks, check_blocks, load_blocks
from cascade.models.loading import borrowed
from cascade.models.stack import DecoderStack
from cascade.saturation.layer_roles import find_structure, suggested_exit_layer
from cascade.saturation.long_statistics import LongStatistics
from cascade.saturation.pilot import MeasuredBatch, piloted
from cascade.saturation.records import (
    HardRatioThreshold,
    LayerRoles,
    LayerRow,
    LongContext,
    ModelParts,
    NoiseFloor,
    ProfileRecord,
    SuggestedThresholds,
)
from cascade.saturation.row_files import ROWS_HASH, hashes_of
from cascade.stats.cosine import cosine_of, norm, widened
from cascade.stats.sequence_rows import Rows
from cascade.stats.similarity_statistics import SimilarityStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class SaturationProfile(Displayed):
    """Similarity statistics of every layer, and their provenance.

    Attributes:
        statistics: One row per layer label.
        sequence_fingerprints: `[S]`, the fingerprint of each sequence.
        provenance: Model, corpus, machine, versions and command.
        noise: How far arithmetic alone moves a sequence's mean similarity (see
            `cascade.gate.noise`); None if not measured.
        long: The statistics of a few long sequences (see `cascade.saturation.long_context`); None
            if not measured.
        no_long: Why there are no long sequences; None if they were measured or not asked for.
        parts: The parts of the model (see `cascade.saturation.model_parts`); None if not read.

    Example:
        >>> import cascade
        >>> stack = cascade.load("smollm2-135m")
        >>> profile = cascade.analyze(stack, ["The cat sat on the mat."] * 20, seq_len=32)
        >>> profile.statistics.count, len(profile.record().layers)
        (128, 31)
    """

    statistics: SimilarityStatistics
    sequence_fingerprints: Array
    provenance: Provenance
    noise: NoiseFloor | None = None
    long: LongStatistics | None = None
    no_long: str | None = None
    parts: ModelParts | None = None

    def record(self) -> ProfileRecord:
        """Return the record of `profile.json`: provenance, table, layer roles and thresholds.

        Raises:
            EmptyStatisticsError: There are no tokens.
            SchemaError: A statistic is NaN or infinite.
        """
        labels = self.statistics.layers
        structure = find_structure(labels, [float(mean) for mean in self.statistics.mean()])
        return ProfileRecord(
            provenance=self.provenance,
            noise=self.noise,
            layers=from_plain(self.statistics.table(), list[LayerRow]),
            structure=structure,
            thresholds=self._thresholds(structure),
            long_context=self._long_context(),
            parts=self.parts or UNSET,
        )

    def _long_context(self) -> LongContext | UnsetType:
        if self.long is not None:
            return self.long.record()
        if self.no_long is None:
            return UNSET
        return LongContext(length=0, sequences=0, ranges=0, reason=self.no_long)

    def _thresholds(self, structure: LayerRoles) -> SuggestedThresholds:
        labels = self.statistics.layers
        num_layers = sum(not label.endswith("+norm") for label in labels)
        layer = str(suggested_exit_layer(structure, num_layers))
        row = labels.index(layer)
        return SuggestedThresholds(
            exit_layer=layer,
            by_hard_ratio=[
                HardRatioThreshold(
                    hard_ratio=ratio,
                    threshold=round(float(self.statistics.quantile(ratio)[row]), 6),
                )
                for ratio in HARD_RATIOS
            ],
        )

    @property
    def rows(self) -> Rows:
        """One row per sequence and layer, as in `profile.parquet`."""
        return self.statistics.rows

    def arrays(self) -> dict[str, Array]:
        """Return the arrays of `profile.npz`: the state of the statistics of all tokens.

        They include the hashes of the rows, which are in a file of their own.
        """
        prints = self.sequence_fingerprints
        own = {"sequence_fingerprint": prints, ROWS_HASH: hashes_of(self.rows, prints)}
        short = self.statistics.token_arrays() | own
        return short if self.long is None else short | self.long.arrays()

    def _to_show(self) -> tuple[ProfileRecord, dict[str, Array]]:
        return self.record(), self.arrays()

    def _in_one_line(self) -> str:
        return self.record()._in_one_line()


class SimilarityVisitor:
    """A visitor of the hidden history that keeps only the similarity of each layer."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self._hidden: Tensor | None = None
        self._norm: Tensor | None = None
        self._before: tuple[Tensor, Tensor] | None = None

    def __call__(self, entry: int, hidden: Tensor) -> None:
        """Take an entry of the hidden history, `[B, T, D]`."""
        # Each entry's norm is used twice: for the output of a layer and the input of the next.
        current = widened(hidden)
        size = norm(current)
        if self._hidden is not None and self._norm is not None:
            # Neighbouring layers can be on different devices (`device_map`).
            before = self._hidden.to(current.device), self._norm.to(current.device)
            self.rows.append(cosine_of(*before, current, size))
            self._before = before
        self._hidden, self._norm = current, size

    def finish(self, normed: Tensor | None) -> Tensor:
        """Return `[L, B, T]`. The row `N+norm` compares layer N's input with the normed state."""
        if normed is not None and self._before is not None:
            final = widened(normed)
            size = norm(final)
            before, before_norm = (state.to(final.device) for state in self._before)
            self.rows.append(cosine_of(before, before_norm, final, size))
        return torch.stack([row.to(self.rows[0].device) for row in self.rows])


def similarities(stack: DecoderStack, ids: Tensor) -> Tensor:
    """Return every layer's similarity for every token, `[L, B, T]` in fp32.

    Args:
        stack: The model.
        ids: Token ids, `[B, T]`, on the model's device.
    """
    similarity = SimilarityVisitor()
    return similarity.finish(stack.visit(ids, similarity))


def analyze(
    model: DecoderStack | PreTrainedModel,
    corpus: TokenBlocks | Texts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    edges: Array | None = None,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
    sink: Callable[[Array, Array], None] | None = None,
    **reading: Unpack[ReadingOptions],
) -> SaturationProfile:
    """Measure the saturation of every layer over a corpus, in one pass.

    Apart from the model and one batch, memory does not grow with the number of tokens.

    Args:
        model: The result of `load`, or a causal language model of `transformers`.
        corpus: The result of `load_blocks`, a list of texts, or a `datasets.Dataset`.
        tokenizer: The tokenizer of a `transformers` model, needed to read texts.
        batch_size: Sequences per forward pass.
        edges: `[L, 3]` bin edges for the shares of each sequence, e.g. those of a baseline to
            compare with (default: from the first 16 sequences).
        command: The command that the user ran, for the provenance.
        progress: Called with the number of tokens processed since the last call.
        sink: Called with every batch's similarities `[L, B, T]` and sequence numbers `[B]`.
        reading: Options for reading texts, as for `load_blocks`: `seq_len`, `max_tokens`,
            `num_samples` (default: all), `text_column` and `seed`.

    Raises:
        CorpusError: There is too little text for one sequence, or sequences are longer than the
            model's positions.
        ModelError: A token id is outside the model's vocabulary, or a layer's output is NaN or
            infinite (the message names the layer).
        UsageError: The model or the corpus has another type.

    Example:
        >>> from cascade import analyze, load
        >>> profile = analyze(load("smollm2-135m"), ["The cat sat on the mat."] * 20, seq_len=32)
        >>> profile.record().layers[0].layer
        '1'

        The same with a model of `transformers`:

        >>> stack = load("smollm2-135m")
        >>> model, tokenizer = stack.model, stack.tokenizer
        >>> profile = analyze(model, ["One text.", "Another."], tokenizer=tokenizer, seq_len=4)
        >>> profile.statistics.layers[-1]
        '30+norm'
    """
    with as_stack(model, tokenizer) as stack:
        blocks = _blocks_of(stack, corpus, reading)
        check_blocks(stack, blocks, batch_size)
        batches = measured_batches(stack, blocks.batches(batch_size), progress=progress, sink=sink)
        if edges is None:
            edges, batches = piloted(batches)
        statistics = statistics_of(stack.layer_labels, edges, batches)
        origin = provenance_of(stack, blocks, command)
    return SaturationProfile(statistics, blocks.sequence_fingerprints(), origin)


def as_stack(
    model: DecoderStack | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> AbstractContextManager[DecoderStack]:
    """Return a context with the model as a stack.

    Args:
        model: The result of `load`, or a causal language model of `transformers`.
        tokenizer: The tokenizer of a `transformers` model, needed to read texts.

    Raises:
        UsageError: The model has another type, or a tokenizer is given for the result of `load`.
    """
    if isinstance(model, DecoderStack):
        if tokenizer is not None:
            raise UsageError("expected no tokenizer, as the model has its own; leave it out")
        return nullcontext(model)
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"expected a model of cascade.load or of transformers, got {type(model).__name__}"
        )
    return borrowed(model, tokenizer)


def _blocks_of(
    stack: DecoderStack, corpus: TokenBlocks | Texts, reading: ReadingOptions
) -> TokenBlocks:
    if isinstance(corpus, TokenBlocks):
        if reading:
            raise UsageError(
                f"{', '.join(reading)}: the corpus is already cut into blocks; pass the options to "
                "load_blocks"
            )
        return corpus
    if isinstance(corpus, str | os.PathLike):
        raise UsageError(
            f"expected texts, a dataset or blocks, got the name {os.fspath(corpus)!r}; read it "
            "with load_blocks"
        )
    if stack.tokenizer is None:
        raise UsageError("expected a tokenizer to read texts with; pass tokenizer=")
    everything: ReadingOptions = {"num_samples": None}
    return load_blocks(corpus, stack.tokenizer, **(everything | reading))


# --- Passes over a corpus --------------------------------------------------------------------


def measured_batches(
    stack: DecoderStack,
    batches: Iterable[tuple[Array, Array]],
    *,
    progress: Callable[[int], None] | None = None,
    sink: Callable[[Array, Array], None] | None = None,
) -> Iterator[MeasuredBatch]:
    """Yield every batch's similarities `[L, B, T]` and sequence numbers `[B]`.

    Args:
        stack: The model.
        batches: Token ids `[B, T]` and sequence numbers `[B]`, as `TokenBlocks.batches` yields.
        progress: Called with the number of tokens processed since the last call.
        sink: Called with every batch's similarities and sequence numbers.

    Raises:
        ModelError: A layer's output is NaN or infinite (the message names the layer).
    """
    for ids, numbers in batches:
        tensor = torch.from_numpy(ids.astype(np.int64)).to(stack.device)
        values = similarities(stack, tensor).cpu().numpy()
        _check_finite(values, stack.layer_labels)
        if sink is not None:
            sink(values, numbers)
        yield values, numbers
        if progress is not None:
            progress(ids.size)


def statistics_of(
    layers: Sequence[str], edges: Array, batches: Iterable[MeasuredBatch]
) -> SimilarityStatistics:
    """Return the statistics of measured batches.

    Args:
        layers: Row labels.
        edges: `[L, 3]` bin edges for the shares of each sequence.
        batches: Measured batches of distinct sequences.
    """
    statistics = SimilarityStatistics(layers, edges)
    for values, numbers in batches:
        statistics.update(values, numbers)
    return statistics


def _check_finite(values: Array, labels: Sequence[str]) -> None:
    wrong = ~np.isfinite(values).all(axis=(1, 2))
    if wrong.any():
        label = labels[int(np.argmax(wrong))]
        raise not_finite(f"layer {label} is the first to give NaN or infinite hidden states")
