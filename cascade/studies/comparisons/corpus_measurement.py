"""The similarities of a model on one of several corpora, and the layers that are special there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cascade.core.arrays import Array
from cascade.core.provenance import Provenance
from cascade.core.schema import from_plain, known, to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from cascade.saturation.layer_roles import find_structure, suggested_exit_layer
from cascade.saturation.profile import SaturationProfile, analyze
from cascade.saturation.records import LayerRoles, ProfileRecord
from cascade.stats.resampling import resampled_means
from cascade.studies.comparisons.corpus_records import ComparedCorpus, SpecialLayer


@dataclass(frozen=True)
class MeasuredCorpus:
    """A model's similarities on one corpus.

    Attributes:
        profile: The statistics of every layer.
        layer: The exit layer.
        confidence: The similarities of the exit layer, `[S, T]`.
    """

    profile: SaturationProfile
    layer: int
    confidence: Array

    @property
    def provenance(self) -> Provenance:
        """Where the profile comes from."""
        return self.profile.provenance

    @cached_property
    def sequence_means(self) -> Array:
        """Each sequence's mean of every layer, `[S, L]`."""
        return np.asarray(self.profile.arrays()["sequence_mean"])

    @cached_property
    def means(self) -> Array:
        """Every layer's mean, `[L]`."""
        return np.asarray(self.sequence_means.mean(axis=0))

    def resampled(self, generator: np.random.Generator) -> Array:
        """Return the means of resamples of whole sequences, `[resamples, L]`."""
        return resampled_means(self.sequence_means, generator)

    def described(self, label: str, draws: Array) -> ComparedCorpus:
        """Return what the record says of the corpus: its size, its structure, how sure that is.

        Args:
            label: The corpus's label.
            draws: Means of resamples, `[resamples, L]`.
        """
        layers = self.profile.statistics.layers
        found = find_structure(layers, [float(mean) for mean in self.means])
        structure = from_plain(to_plain(found), LayerRoles)
        corpus = self.provenance.corpus
        num_layers = sum(layer.isdigit() for layer in layers)
        return ComparedCorpus(
            label=label,
            name=corpus.name,
            tokens=corpus.tokens,
            sequences=corpus.sequences,
            seq_len=corpus.seq_len,
            spread=known(corpus.spread),
            structure=structure,
            suggested_exit_layer=suggested_exit_layer(found, num_layers),
            special=_special_layers(layers, structure, draws),
        )


def measure_corpus(
    stack: DecoderStack,
    blocks: TokenBlocks,
    layer: int | None,
    *,
    batch_size: int,
    command: str | None,
    progress: Callable[[int], None] | None,
) -> MeasuredCorpus:
    """Measure a corpus in one pass, and keep the exit layer's similarity of every token.

    Args:
        stack: The model.
        blocks: The corpus.
        layer: The exit layer, from 1. None: the one that the corpus's structure suggests; then all
            layers' similarities are held in memory during the pass.
        batch_size: Sequences per forward pass.
        command: The command that the user ran, for the provenance.
        progress: Called with the number of tokens done since the last call.
    """
    kept: list[Array] = []

    def keep(values: Array, _: Array) -> None:
        # A copy, because a view would hold the batch's similarities of every layer.
        kept.append(values.copy() if layer is None else values[layer - 1].copy())

    profile = analyze(
        stack, blocks, batch_size=batch_size, command=command, progress=progress, sink=keep
    )
    if layer is not None:
        return MeasuredCorpus(profile, layer, np.concatenate(kept))
    record = from_plain(to_plain(profile.record()), ProfileRecord)
    suggested = int(record.thresholds.exit_layer)
    confidence = np.concatenate([values[suggested - 1] for values in kept])
    return MeasuredCorpus(profile, suggested, confidence)


def roles_of(structure: LayerRoles) -> dict[str, str]:
    """Return the role of every special layer."""
    return {
        layer: role
        for role, layers in (
            ("input_transform", structure.input_transform),
            ("dips", structure.dips),
            ("output_transform", structure.output_transform),
        )
        for layer in layers
    }


def special_shares(labels: Sequence[str], draws: Array) -> dict[str, float]:
    """Return the share of resamples in which each layer is special, in whatever role.

    Args:
        labels: The layers.
        draws: Means of resamples, `[resamples, L]`.
    """
    counts = dict.fromkeys(labels, 0)
    for means in draws:
        structure = from_plain(to_plain(find_structure(labels, means.tolist())), LayerRoles)
        for layer in roles_of(structure):
            counts[layer] += 1
    return {layer: count / len(draws) for layer, count in counts.items()}


def _special_layers(
    labels: Sequence[str], structure: LayerRoles, draws: Array
) -> list[SpecialLayer]:
    roles, shares = roles_of(structure), special_shares(labels, draws)
    return [
        SpecialLayer(layer=layer, role=roles.get(layer), share_of_resamples=shares[layer])
        for layer in labels
        if layer in roles or shares[layer] > 0
    ]
