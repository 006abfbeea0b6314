"""What the trials of one model share: a bench, the evidence, and how a trial is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cascade.core.arrays import Array
from cascade.gate.causes.bench import Bench, Change
from cascade.gate.causes.hypotheses import Evidence, Hypothesis
from cascade.gate.causes.part_differences import PartDifferences
from cascade.gate.records import CauseKind

#: What each kind of trial says if it succeeds.
FOUND = "the model gives the baseline's numbers"


@dataclass(frozen=True)
class TrialRuns:
    """What the trials of one model share.

    Attributes:
        bench: Runs the model.
        evidence: What was measured, of the sequences of the bench.
        plain: `[S, L, 2]`, the rows of the model as it is.
        differences: The parts that differ from the baseline's; None if it recorded none.
        products: How products were rounded in the baseline; None if they were not.
    """

    bench: Bench
    evidence: Evidence
    plain: Array
    differences: PartDifferences | None
    products: str | None = None

    @property
    def first(self) -> str:
        """The label of the first row that moved."""
        return self.evidence.layers[self.evidence.first]

    def undone(
        self, name: str, cause: CauseKind, layer: str | None, text: str, change: Change
    ) -> Iterator[Hypothesis]:
        """Yield a cause: with `change`, the model should give the baseline's rows.

        Args:
            name: What is compared.
            cause: The kind of the cause.
            layer: The layer that it names.
            text: The evidence, in one sentence.
            change: Undoes what may be the cause.
        """
        rows = self.bench.rows(change)
        if rows is not None:
            left = self.evidence.distance(rows, self.evidence.expected)
            yield Hypothesis(name, cause, layer, text, left)
