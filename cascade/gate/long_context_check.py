"""The check of long contexts: long sequences compared with the baseline, range by range.

Both sides measured the same long sequences. Each range of positions must have the baseline's mean
similarity in every layer, within the noise of rounding.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from cascade.core.schema import known
from cascade.corpora.blocks import TokenBlocks
from cascade.corpora.long_sequences import LongSequences, found_again
from cascade.gate.baselines import StoredProfile
from cascade.gate.comparison import tolerance_of
from cascade.gate.long_context_comparison import compare_long, unchecked
from cascade.gate.records import LongContextRecord
from cascade.models.stack import DecoderStack
from cascade.saturation.long_context import default_length, measure_long
from cascade.saturation.long_statistics import LongStatistics
from cascade.saturation.profile import SaturationProfile
from cascade.saturation.records import NoiseFloor, ProfileRecord

_HOW_TO_ADD = "to add them, run `cascade analyze --output RUN` and `cascade accept RUN`"


@dataclass(frozen=True)
class LongCheck:
    """Which long sequences a gate compares with a baseline.

    Attributes:
        sequences: The long sequences of the baseline that the corpus has; None for none.
        reason: Why there are none, and how to add them; None if the model has no long contexts.

    Example:
        >>> LongCheck(None, "the baseline has no long sequences").sequences is None
        True
    """

    sequences: LongSequences | None
    reason: str | None = None

    @classmethod
    def of(
        cls, stack: DecoderStack, blocks: TokenBlocks, baseline: StoredProfile, *, full: bool
    ) -> LongCheck:
        """Return the first long sequence of a baseline, or all of them.

        Args:
            stack: The model.
            blocks: The corpus, which may have grown since.
            baseline: The stored profile.
            full: Compare all of them.
        """
        old = LongStatistics.from_arrays(baseline.arrays())
        if old is None:
            return cls(None, _why_none(stack, baseline.record()))
        first = baseline.arrays()["sequence_fingerprint"][old.starts]
        found = found_again(blocks, old.length, old.fingerprints, first)
        if not len(found.ids):
            return cls(None, "the corpus does not have the baseline's long sequences any more")
        return cls(found if full else found.only(slice(1)))

    def compare(
        self,
        stack: DecoderStack,
        profile: SaturationProfile,
        baseline: StoredProfile,
        noise: NoiseFloor | None,
    ) -> tuple[LongContextRecord | None, SaturationProfile]:
        """Measure the long sequences and compare them with the baseline's.

        Args:
            stack: The model.
            profile: The profile of the corpus's other sequences.
            baseline: The stored profile.
            noise: The noise floor of this machine, if the baseline was made on another one.

        Returns:
            The comparison, None if the model has no long contexts; and the profile together with
            the long sequences.

        Raises:
            ModelError: A hidden state is NaN or infinite, or the model raises an error for so many
                tokens.
        """
        if self.sequences is None:
            return None if self.reason is None else unchecked(self.reason), profile
        start = time.perf_counter()
        measured = measure_long(stack, self.sequences)
        seconds = time.perf_counter() - start
        old = LongStatistics.from_arrays(baseline.arrays())
        tolerance, _ = tolerance_of(profile.record(), baseline.record(), noise, long=True)
        found = compare_long(measured, old, tolerance, seconds=seconds)
        return found, replace(profile, long=measured)


def _why_none(stack: DecoderStack, record: ProfileRecord) -> str | None:
    if default_length(stack, record.provenance.corpus.seq_len) is None:
        return None
    about = known(record.long_context)
    if about is None:
        return f"the baseline has no long sequences; {_HOW_TO_ADD}"
    return f"the baseline has no long sequences: {known(about.reason)}"
