"""The causes of what a gate found: its comparison with the attribution after running the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cascade.core.schema import known
from cascade.corpora.blocks import TokenBlocks
from cascade.corpora.long_sequences import LongSequences
from cascade.gate.baselines import StoredProfile
from cascade.gate.causes.explaining import explain
from cascade.gate.causes.long_explaining import LongSides, explain_long
from cascade.gate.causes.part_differences import differences_in_words
from cascade.gate.comparison import Comparison
from cascade.gate.records import Mismatch
from cascade.models.stack import DecoderStack
from cascade.saturation.long_statistics import LongStatistics
from cascade.saturation.profile import SaturationProfile


def explained(
    comparison: Comparison, stack: DecoderStack, blocks: TokenBlocks, baseline: StoredProfile
) -> Comparison:
    """Run the model again to find the cause, if means of the same sequences have moved.

    Args:
        comparison: What the gate found.
        stack: The model.
        blocks: The corpus with the compared sequences.
        baseline: The stored profile.
    """
    found, evidence = comparison.attribution, comparison.evidence
    if found is None or evidence is None or found.cause in ("rows", "counting"):
        return comparison
    places = {int(fingerprint): at for at, fingerprint in enumerate(blocks.sequence_fingerprints())}
    ids = blocks.ids[[places[fingerprint] for fingerprint in comparison.fingerprints]]
    record = baseline.record()
    machine = known(record.provenance.machine)
    products = None if machine is None else known(machine.products)
    found = explain(stack, ids, evidence, found, record.parts or None, products)
    return replace(comparison, attribution=found)


def explained_long(
    comparison: Comparison,
    stack: DecoderStack,
    sequences: LongSequences | None,
    profile: SaturationProfile,
    baseline: StoredProfile,
) -> Comparison:
    """Run the model again over a long sequence to find the cause, if one has moved.

    Args:
        comparison: What the gate found.
        stack: The model.
        sequences: The long sequences that were measured; None for none.
        profile: The profile with their statistics.
        baseline: The stored profile.
    """
    found, record = comparison.attribution, comparison.long_context
    if found is None or record is None or sequences is None:
        return comparison
    old = LongStatistics.from_arrays(baseline.arrays())
    if profile.long is None or old is None:
        return comparison
    sides = LongSides(sequences.ids, profile.long, old, record.tolerance)
    found = explain_long(stack, sides, found, baseline.record().parts or None)
    return replace(comparison, attribution=found)


def changed_parts(
    stack: DecoderStack, baseline: StoredProfile, mismatches: Sequence[Mismatch]
) -> tuple[str, ...]:
    """Return which weights and settings differ, if the model is another one of the same shape.

    Args:
        stack: The model.
        baseline: The stored profile.
        mismatches: What makes the two not comparable.
    """
    old = baseline.record()
    names = {mismatch.name for mismatch in mismatches}
    shapes = [
        (about.family, about.num_layers, about.hidden_size, about.dtype)
        for about in (stack.provenance, old.provenance.model)
    ]
    if "model.weights_hash" not in names or shapes[0] != shapes[1]:
        return ()
    return tuple(differences_in_words(stack, old.parts or None))
