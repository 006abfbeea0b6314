"""The names of causes, ablations and verdicts in the report of an explained layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cascade.core.schema import UNSET
from cascade.report.common.words import listed
from cascade.studies.explanations.records import (
    AblationRow,
    CauseEffect,
    CauseRow,
    LayerExplanation,
)

_CAUSES = {
    "attention": "its attention output",
    "mlp": "its MLP output",
    "first_token": "attention to the first token",
    "delimiters": "attention to delimiters",
    "common": "the common part of its update",
    "update_size": "the size of its update",
    "update_direction": "the direction of its update",
    "stream_size": "the norm of its input",
}

_ABLATIONS = {
    "layer_skipped": "layer skipped",
    "attention_skipped": "attention skipped",
    "mlp_skipped": "MLP skipped",
    "update_halved": "update halved",
    "common_left_out": "common part removed",
    "first_token_hidden": "first token hidden",
    "delimiters_hidden": "delimiters hidden",
}

_CLASSES = {
    "start": "first tokens",
    "digits": "digit tokens",
    "word start": "tokens that start a word",
    "continuation": "tokens that continue a word",
}

_VERDICTS = {"supported": "yes", "not supported": "no", "undecided": "undecided"}


@dataclass(frozen=True)
class TestedCause:
    """A tested cause with its numbers."""

    row: CauseRow
    effect: CauseEffect


@dataclass(frozen=True)
class ClosingCause:
    """A tested cause with a known closed share of the gap."""

    row: CauseRow
    closed: float
    interval: list[float]


def tested_causes(record: LayerExplanation) -> list[TestedCause]:
    """Return the tested causes, in order."""
    return [TestedCause(row, effect) for row in record.causes if (effect := row.effect) is not None]


def closing_causes(record: LayerExplanation) -> list[ClosingCause]:
    """Return the tested causes with a known closed share of the gap, in order."""
    return [
        ClosingCause(tested.row, tested.effect.closed, tested.effect.interval)
        for tested in tested_causes(record)
        if tested.effect.closed is not None and tested.effect.interval is not None
    ]


def cause_words(record: LayerExplanation, row: CauseRow) -> str:
    """Return the name of a cause."""
    target = record.sides[0]
    if row.cause == "dimensions":
        found = [dim.dimension for dim in target.dimensions]
        return f"{_numbers('dimension', found)} of the stream" if found else "few dimensions"
    if row.cause == "massive":
        dims = target.massive
        return f"the massive {_numbers('dimension', dims)}" if dims else "massive activations"
    if row.cause == "one_class":
        if row.token_class is UNSET:
            return "one class of tokens"
        return _CLASSES.get(row.token_class, f"{row.token_class} tokens")
    if row.cause == "first_positions":
        return f"the first {row.positions} positions"
    return _CAUSES[row.cause]


def _numbers(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'s' if len(numbers) != 1 else ''} {listed([str(n) for n in numbers])}"


def ablation_words(row: AblationRow) -> str:
    """Return the name of an ablation."""
    return _ABLATIONS[row.ablation]


def verdict_words(record: LayerExplanation, row: CauseRow) -> str:
    """Return "yes", "no" or "undecided": whether a cause is supported."""
    return _VERDICTS[row.verdict] if record.gap.asks_for_a_cause else "no gap"
