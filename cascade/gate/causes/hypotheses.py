"""Hypotheses about the cause of a drift, and which of them is named.

A hypothesis says which values the rows would have if it were true. What it leaves unexplained is
the largest distance from these values, in tolerances. It is named only if it leaves little, and
every hypothesis of another name, and no hypothesis at all, leave clearly more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cascade.core.arrays import Array
from cascade.gate.records import Attribution, CauseKind, TriedCause

#: A named hypothesis leaves at most this many tolerances. Over the faults of
#: `tests/suites/test_sensitivity.py`, the true causes left at most 0.09, because undoing a fault
#: gives the baseline's numbers but for rounding.
MOST_LEFT = 1.0


#: The hypothesis of another name that explains most, and no hypothesis at all, have to leave this
#: many times as much, and at least this many tolerances. Over the same faults, they left at least
#: 16 (an epsilon of 1e-6 instead of 1e-5), and mostly more than 100.
CLEARLY = 4.0


NORMED = "+norm"


@dataclass(frozen=True)
class Evidence:
    """What was measured: the rows of the compared sequences on both sides.

    Attributes:
        layers: Labels of the rows, in order of depth.
        obtained: `[S, L, K]`, means and, where K is 2, mean squares of each sequence.
        expected: The same of the baseline.
        tolerance: `[L, K]`, the largest differences that do not count as movement.
    """

    layers: Sequence[str]
    obtained: Array
    expected: Array
    tolerance: Array

    @property
    def moved(self) -> Array:
        """`[L]`, whether a row has moved in any sequence; NaN has moved."""
        within = np.abs(self.obtained - self.expected)[..., 0] <= self.tolerance[:, 0]
        moved: Array = ~within.all(axis=0)
        return moved

    @property
    def first(self) -> int:
        """The place of the first row that moved; 0 if none did."""
        return int(np.argmax(self.moved))

    @property
    def residual(self) -> list[int]:
        """The places of the rows on the residual stream."""
        return [place for place, label in enumerate(self.layers) if not label.endswith(NORMED)]

    @property
    def normed(self) -> int | None:
        """The place of the row after the final norm; None without one."""
        places = (place for place, label in enumerate(self.layers) if label.endswith(NORMED))
        return next(places, None)

    def of(self, sequences: Sequence[int]) -> Evidence:
        """Return the evidence of some sequences."""
        chosen = list(sequences)
        return Evidence(self.layers, self.obtained[chosen], self.expected[chosen], self.tolerance)

    def distance(self, one: Array, other: Array) -> float:
        """Return the largest distance of two sides in tolerances; infinite if one has NaN.

        Rows that are NaN in every sequence of `one` are left out: nothing is said about them.
        """
        said = ~np.isnan(one).all(axis=(0, 2))
        far = np.abs(one - other)[:, said] / self.tolerance[said]
        return float(np.where(np.isnan(far), math.inf, far).max(initial=0.0))

    @property
    def moved_by(self) -> float:
        """The largest difference of both sides in tolerances: what no hypothesis leaves."""
        return self.distance(self.obtained, self.expected)


@dataclass(frozen=True)
class Hypothesis:
    """A possible cause, and how much of the movement it leaves unexplained.

    Attributes:
        name: What is compared: two hypotheses of one name do not compete.
        cause: The kind of the cause.
        layer: The layer that it names.
        text: The evidence, in one sentence.
        left: The largest distance of a row from what it predicts, in tolerances.
    """

    name: str
    cause: CauseKind
    layer: str | None
    text: str
    left: float

    @property
    def row(self) -> TriedCause:
        """The hypothesis as stored in a record."""
        return TriedCause(name=self.name, left=self.left if math.isfinite(self.left) else None)


def best_of(hypotheses: Sequence[Hypothesis], moved_by: float) -> Hypothesis | None:
    """Return the hypothesis that explains the movement clearly better than all others.

    Args:
        hypotheses: Those that were tried.
        moved_by: What no hypothesis leaves, in tolerances.

    Returns:
        None if the best leaves too much, or another one explains about as much.
    """
    ranked = sorted(hypotheses, key=lambda one: one.left)
    if not ranked or not ranked[0].left <= MOST_LEFT:
        return None
    best = ranked[0]
    others = [one.left for one in ranked if one.name != best.name]
    return best if min([*others, moved_by]) >= CLEARLY * max(1.0, best.left) else None


def tried(hypotheses: Sequence[Hypothesis]) -> list[TriedCause]:
    """Return the hypotheses as stored in a record, the best of each name, the best first."""
    best: dict[str, TriedCause] = {}
    for one in sorted(hypotheses, key=lambda one: one.left):
        best.setdefault(one.name, one.row)
    return list(best.values())


def named(hypothesis: Hypothesis, hypotheses: Sequence[Hypothesis]) -> Attribution:
    """Return the attribution to a hypothesis.

    Args:
        hypothesis: The one that is named.
        hypotheses: All that were tried.
    """
    return Attribution(
        cause=hypothesis.cause,
        layer=hypothesis.layer,
        text=hypothesis.text,
        named=hypothesis.name,
        tried=tried(hypotheses),
    )


def growth(evidence: Evidence) -> str:
    """Return the first layer that moved, and by how much the layers move, in words.

    Args:
        evidence: What was measured.
    """
    size = np.abs(evidence.obtained - evidence.expected)[..., 0].max(axis=0)
    first, largest = evidence.first, int(np.argmax(np.nan_to_num(size, nan=np.inf)))
    text = f"layer {evidence.layers[first]} is the first that moved, by {size[first]:.0e}"
    if largest != first:
        text += f", and layer {evidence.layers[largest]} moved most, by {size[largest]:.0e}"
    return text
