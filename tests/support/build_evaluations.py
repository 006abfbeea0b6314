"""Evaluations made by hand."""

from __future__ import annotations

from typing import Any

from cascade.core.schema import from_plain
from cascade.gate.records import BudgetSource

Record = dict[str, Any]


def a_row(**changes: Any) -> Record:
    """Return an operating point as JSON has it."""
    row = {
        "exit_layer": 3,
        "rule": "cosine",
        "head": "logit_lens",
        "threshold": 0.95,
        "threshold_from": "given",
        "exit_share": 0.7,
        "agreement": 0.9,
        "agreement_interval": [0.88, 0.92],
        "exit_agreement": 0.85,
        "perplexity": 12.0,
        "perplexity_ratio": 1.2,
        "perplexity_ratio_interval": [1.1, 1.3],
        "hard_perplexity_ratio": 1.0,
        "kl": 0.1,
        "layers_per_token": 3.3,
        "flops_ratio": 0.8,
        "seconds_ratio": 0.9,
        "seconds_ratio_interval": [0.8, 1.0],
    }
    return row | changes


def a_plain_evaluation(
    *rows: Record, propagation: str = "frozen", heads: str | None = None
) -> Record:
    """Return an evaluation as JSON has it, as far as budgets read it."""
    return {
        "schema": 1,
        "kind": "evaluation",
        "provenance": {
            "model": {"name": "tiny", "weights_hash": "w", "revision": None, "dtype": "float32"},
            "tokenizer_hash": "t",
            "corpus": {
                "source": "words.jsonl",
                "name": "words",
                "fingerprint": "c",
                "records": 8,
                "tokens": 128,
                "sequences": 8,
                "seq_len": 16,
            },
            "heads_fingerprint": heads,
            "command": "cascade evaluate --point 3:cosine:0.95",
        },
        "settings": {
            "propagation": propagation,
            "layers": [3],
            "rules": ["cosine"],
            "hard_ratios": [0.3, 0.5, 0.7],
            "agreement": 0.95,
            "perplexity_ratio": 1.05,
            "batch_size": 8,
            "seed": 0,
            "computes_every_token_because": None,
            "interval": "95 %",
            "seconds": "one process",
        },
        "points": list(rows),
    }


def an_evaluation(
    *rows: Record, propagation: str = "frozen", heads: str | None = None
) -> BudgetSource:
    return from_plain(a_plain_evaluation(*rows, propagation=propagation, heads=heads), BudgetSource)
