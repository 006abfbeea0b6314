"""Explaining a drift of long contexts: settings, positions and windows are tried.

The short sequences agree with the baseline, so weights and layers are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec.structs
import numpy as np

from cascade.core.arrays import Array
from cascade.gate.causes.bench import Bench
from cascade.gate.causes.hypotheses import MOST_LEFT, Evidence, Hypothesis, best_of, tried
from cascade.gate.causes.part_differences import part_differences, settings_in_words
from cascade.gate.causes.positions import rotary_trials, window_trials
from cascade.gate.causes.trials import Trials
from cascade.gate.records import Attribution
from cascade.models.stack import DecoderStack
from cascade.saturation.long_statistics import LongStatistics, range_edges
from cascade.saturation.records import ModelParts


@dataclass(frozen=True)
class LongSides:
    """The long sequences of both sides.

    Attributes:
        ids: `[Q, N]` token ids of the measured sequences.
        new: What was measured on them.
        old: The baseline's, of these sequences and maybe more.
        tolerance: How far rounding alone may move the mean of a range.
    """

    ids: Array
    new: LongStatistics
    old: LongStatistics
    tolerance: float

    def worst(self) -> tuple[Array, Evidence]:
        """Return the sequence that moved most, `[1, N]`, and its evidence, one row per range."""
        places = {int(number): place for place, number in enumerate(self.old.fingerprints)}
        old = self.old.only([places[int(number)] for number in self.new.fingerprints])
        sides = [np.stack([side.means(), side.mean_squares()], axis=-1) for side in (self.new, old)]
        moved = np.abs(sides[0] - sides[1]).max(axis=(1, 2, 3))
        most = int(np.argmax(moved))
        # A square moves twice as far as a similarity near 1.
        tolerance = np.tile([self.tolerance, 2 * self.tolerance], (len(self.new.layers), 1))
        evidence = Evidence(self.new.layers, sides[0][most], sides[1][most], tolerance)
        return self.ids[most : most + 1], evidence


def explain_long(
    stack: DecoderStack, sides: LongSides, known: Attribution, parts: ModelParts | None
) -> Attribution:
    """Return the cause of a drift of long contexts, after running a long sequence again.

    Args:
        stack: The model that was measured; every change is undone to the last bit.
        sides: The long sequences.
        known: What the ranges alone say: the first positions and layer.
        parts: The parts of the baseline's model, if the baseline recorded them.

    Returns:
        What is known, and behind it the named cause, if one explains the numbers clearly better
        than all others.
    """
    ids, evidence = sides.worst()
    bench = Bench(stack, ids, range_edges(ids.shape[1]).tolist())
    plain = bench.rows()
    if plain is None:
        return known
    if evidence.distance(plain, evidence.obtained) > MOST_LEFT:
        text = f"{known.text}; the model, run again on the same tokens, gives other numbers"
        return msgspec.structs.replace(known, text=text)
    differences = None if parts is None else part_differences(stack, parts)
    hypotheses = list(_tried(Trials(bench, evidence, plain, differences)))
    best = best_of(hypotheses, evidence.moved_by)
    if best is None:
        texts = [known.text, *settings_in_words(differences)]
        return msgspec.structs.replace(known, text="; ".join(texts), tried=tried(hypotheses))
    return msgspec.structs.replace(
        known, text=f"{known.text}; {best.text}", named=best.name, tried=tried(hypotheses)
    )


def _tried(trials: Trials) -> Iterator[Hypothesis]:
    """Yield causes that long contexts can have and short ones not."""
    yield from trials.settings()
    yield from rotary_trials(trials)
    yield from window_trials(trials)
    if trials.bench.stack.device.type == "cpu":  # a GPU may lack memory for all scores at once
        yield from trials.kernels()
