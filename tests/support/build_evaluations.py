"""Evaluation records made by hand."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]


def a_row(**changes: Any) -> Record:
    row = {
        "exit_layer": 3,
        "rule": "cosine",
        "head": "logit_lens",
        "threshold": 0.95,
        "threshold_from": "given",
        "exit_share": 0.7,
        "agreement": 0.9,
        "perplexity_ratio": 1.2,
        "layers_per_token": 3.3,
        "seconds_ratio": 0.9,
        "seconds_ratio_interval": [0.8, 1.0],
    }
    return row | changes


def an_evaluation(*rows: Record, propagation: str = "frozen", heads: str | None = None) -> Record:
    return {
        "schema": 1,
        "kind": "evaluation",
        "provenance": {
            "model": {"name": "tiny", "weights_hash": "w", "revision": None, "dtype": "float32"},
            "tokenizer_hash": "t",
            "corpus": {"name": "words", "fingerprint": "c"},
            "heads_fingerprint": heads,
            "command": "cascade evaluate --point 3:cosine:0.95",
        },
        "settings": {"propagation": propagation},
        "points": list(rows),
    }
