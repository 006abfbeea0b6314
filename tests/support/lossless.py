"""Prompts that were continued without loss and with exits, by hand."""

from __future__ import annotations

from typing import Any

from cascade.core.schema import from_plain
from cascade.evaluation.lossless.records import LosslessFigures

#: Seconds of each prompt by the full model's own modules.
OWN = [1.0, 1.1, 0.9, 1.0]


def a_decoding_row(method: str, ratio: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Return a way to continue four prompts in `ratio` x the time of the model's own modules."""
    row = {
        "method": method,
        "engine": None if method == "modules" else "compiled",
        "tokens_per_pass": 1.0,
        "tokens": [32] * 4,
        "equal": 4,
        "seconds": [ratio * spent for spent in OWN],
        "seconds_ratio": ratio,
        "seconds_ratio_interval": [0.98 * ratio, 1.02 * ratio],
    }
    return row | changes


def plain_figures(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return continued prompts as JSON has them, with the row of the model's own modules."""
    figures = {
        "prompts": 4,
        "prompt_tokens": 64,
        "new_tokens": 32,
        "fingerprint": "sha256:55ee",
        "pass_costs": [20.0, 21.0, 22.0],
        "trees": True,
        "drafter": None,
        "point": None,
        "rows": [a_decoding_row("modules"), *rows],
    }
    return figures | changes


def some_figures(*rows: dict[str, Any], **changes: Any) -> LosslessFigures:
    """Return continued prompts, with the row of the model's own modules."""
    return from_plain(plain_figures(*rows, **changes), LosslessFigures)


def drafts(tokens_per_pass: float = 1.6, ratio: float = 0.4, **changes: Any) -> dict[str, Any]:
    """Return the row of drafts."""
    return a_decoding_row("drafts", ratio, tokens_per_pass=tokens_per_pass, **changes)
