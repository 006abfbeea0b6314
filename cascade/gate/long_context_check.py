"""The check of long contexts: long sequences compared with the baseline, range by range.

Both sides measured the same long sequences. Each range of positions must have the baseline's mean
similarity in every layer, within the noise of rounding.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

import numpy as np

from cascade.core.arrays import Array
from cascade.core.schema import known
from cascade.corpora.blocks import TokenBlocks
from cascade.corpora.long_sequences import LongSequences, found_again
from cascade.gate.baselines import StoredProfile
from cascade.gate.comparison import tolerance_of
from cascade.gate.records import LongContextRecord, PositionRange
from cascade.models.stack import DecoderStack
from cascade.saturation.long_context import default_length, measure_long
from cascade.saturation.long_statistics import LongStatistics, range_edges
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


def compare_long(
    new: LongStatistics | None,
    old: LongStatistics | None,
    tolerance: float,
    *,
    seconds: float = 0.0,
) -> LongContextRecord:
    """Compare long sequences that both sides have, range by range.

    Args:
        new: The statistics of the new profile; None if it has no long sequences.
        old: Those of the baseline.
        tolerance: How far rounding alone may move the mean of a range.
        seconds: How long the new ones took to measure.

    Example:
        >>> similarity, numbers = np.full((1, 1, 128), 0.5), np.zeros(1, np.int64)
        >>> one = LongStatistics.of(["1"], similarity, numbers, numbers)
        >>> compare_long(one, one, 2e-6).verdict
        'PASS'
    """
    if new is None or old is None:
        side = "new profile" if new is None else "baseline"
        return unchecked(f"the {side} has no long sequences")
    if new.layers != old.layers or new.length != old.length:
        return unchecked("the long sequences of both sides have other layers or lengths")
    places = {int(number): place for place, number in enumerate(old.fingerprints)}
    mine = [place for place, number in enumerate(new.fingerprints) if int(number) in places]
    if not mine:
        return unchecked("both sides have other long sequences")
    theirs = [places[int(new.fingerprints[place])] for place in mine]
    new, old = new.only(mine), old.only(theirs)
    ranges = _ranges(new, old, tolerance)
    return LongContextRecord(
        verdict="PASS" if all(each.layer is None for each in ranges) else "FAIL",
        reason=None,
        length=new.length,
        sequences=len(mine),
        tolerance=tolerance,
        ranges=ranges,
        seconds=seconds,
    )


def unchecked(reason: str) -> LongContextRecord:
    """Return the record of long contexts that were not checked.

    Args:
        reason: Why they were not checked.
    """
    return LongContextRecord(
        verdict="NOT CHECKED",
        reason=reason,
        length=0,
        sequences=0,
        tolerance=0.0,
        ranges=[],
        seconds=0.0,
    )


def _ranges(new: LongStatistics, old: LongStatistics, tolerance: float) -> list[PositionRange]:
    # Both are `[R, L]`: the largest difference of any sequence.
    moved = _largest(new.means() - old.means())
    # A square moves twice as far as a similarity near 1.
    squares = _largest(new.mean_squares() - old.mean_squares())
    beyond = (moved > tolerance) | (squares > 2 * tolerance)
    found = []
    for number, (first, end) in enumerate(itertools.pairwise(range_edges(new.length).tolist())):
        layer = new.layers[int(np.argmax(beyond[number]))] if beyond[number].any() else None
        difference = float(moved[number].max())
        found.append(PositionRange(first=first + 1, last=end, difference=difference, layer=layer))
    return found


def _largest(differences: Array) -> Array:
    largest: Array = np.abs(differences).max(axis=0)
    return largest
