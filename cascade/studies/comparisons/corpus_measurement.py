"""Measure a model on one of several corpora: its similarities and its special layers."""

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
        profile: Statistics of every layer.
        layer: Exit layer.
        confidence: Similarities of the exit layer, `[S, T]`.
    """

    profile: SaturationProfile
    layer: int
    confidence: Array

    @property
    def provenance(self) -> Provenance:
        """Provenance of the profile."""
        return self.profile.provenance

    @cached_property
    def sequence_means(self) -> Array:
        """Mean similarity of each sequence in every layer, `[S, L]`."""
        return self.profile.rows.all().mean

    @cached_property
    def means(self) -> Array:
        """Mean similarity of every layer, `[L]`."""
        return np.asarray(self.sequence_means.mean(axis=0))

    def resampled(self, generator: np.random.Generator) -> Array:
        """Return the means of resamples of whole sequences, `[resamples, L]`."""
        return resampled_means(self.sequence_means, generator)

    def described(self, label: str, draws: Array) -> ComparedCorpus:
        """Return the corpus as stored in the record: its size, its structure and special layers.

        Args:
            label: Label of the corpus.
            draws: Means of the resamples, `[resamples, L]`.
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
            bos=corpus.bos,
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
        layer: Exit layer, from 1. With None, the profile suggests one, and the similarities of all
            layers are kept in memory during the pass.
        batch_size: Sequences per forward pass.
        command: Command that the user ran, for the provenance.
        progress: Called with the number of tokens processed since the last call.
    """
    kept: list[Array] = []

    def keep(values: Array, _: Array) -> None:
        # Copy, because a view would keep the similarities of all layers of the batch alive.
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
    """Return the share of resamples in which each layer is special, in any role.

    Args:
        labels: Layer labels.
        draws: Means of the resamples, `[resamples, L]`.
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
