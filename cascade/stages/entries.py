"""Entries of stages: which tokens are hard and enter, and where the others exit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cascade.core.arguments import read_threshold
from cascade.decoding.forward import Exit
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.heads import LogitLens
from cascade.exits.history import exit_entries
from cascade.exits.rules import deciding_at, find_rule
from cascade.models.stack import DecoderStack
from cascade.stages.records import EntryRecord


@dataclass(frozen=True)
class Entry:
    """Select the tokens that enter a stage: those that the exit rule finds hard.

    Easy tokens exit below the stage.

    Attributes:
        layer: Layer whose state the rule reads, 1..N of the model below the stage.
        threshold: Tokens with a confidence at or above this value exit.
        rule: Name of the exit rule.
        heads: Fitted heads. With heads, easy tokens exit at `layer` through its ridge head. Without
            heads, they exit after the last layer below the stage, through that model's LM head.

    Example:
        >>> Entry(layer=29, threshold=0.9517).rule
        'cosine'
    """

    layer: int
    threshold: float
    rule: str = "cosine"
    heads: FittedHeads | None = None

    def exit_of(self, stack: DecoderStack) -> Exit:
        """Return the exit that easy tokens take from a model.

        Args:
            stack: Model below the stage.

        Raises:
            UsageError: The layer or rule does not exist, or the threshold is outside the rule's
                range.
            ModelError: The heads belong to another model.
        """
        rule = find_rule(self.rule)
        exit_entries(self.layer, stack.num_layers)
        rule.check(self.threshold)
        threshold = read_threshold(self.threshold)
        if self.heads is not None:
            return Exit(self.layer, rule, threshold, self.heads.head(stack, self.layer))
        last = stack.num_layers
        rule = deciding_at(rule, self.layer, exit_layer=last)
        return Exit(last, rule, threshold, LogitLens(stack))

    def record(self, heads_file: str) -> EntryRecord:
        """Return the entry as it is stored in a record.

        Args:
            heads_file: Name of the file that holds the entry's heads. Ignored without heads.
        """
        return EntryRecord(
            layer=self.layer,
            rule=self.rule,
            threshold=_stored_threshold(self.threshold),
            heads=None if self.heads is None else heads_file,
        )


def _stored_threshold(threshold: float) -> float | Literal["inf", "-inf"]:
    if math.isinf(threshold):
        return "inf" if threshold > 0 else "-inf"
    return threshold
