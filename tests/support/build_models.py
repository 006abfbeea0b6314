"""Models to compare, with drawn similarities and given sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from cascade.core.arrays import Array
from cascade.core.provenance import Provenance
from cascade.core.schema import from_plain
from cascade.saturation.profile import SaturationProfile
from cascade.stats.similarity_statistics import SimilarityStatistics, quantile_edges
from cascade.studies.comparisons.compared_models import MeasuredModel
from cascade.studies.comparisons.configurations import Sizes

TOKENS = 8


def sizes(num_layers: int, **changes: Any) -> Sizes:
    """Return sizes in which every layer costs the same, and the LM head as much as two."""
    share = 1 / (num_layers + 2)
    made: dict[str, Any] = {
        "family": "llama",
        "num_layers": num_layers,
        "hidden_size": 32,
        "vocab_size": 97,
        "parameters": 1000 * num_layers + 500,
        "layer_parameters": 1000 * num_layers,
        "seq_len": TOKENS,
        "operations": 2000.0 * (num_layers + 2),
        "layer_shares": (share,) * num_layers,
        "lm_head_share": 2 * share,
    }
    return Sizes(**made | changes)


def levels(num_layers: int, *dips: int) -> list[float]:
    """Return mean similarities: saturated but for the first layer, the last, and dips."""
    found = [0.95] * num_layers
    found[0], found[-1] = 0.1, 0.6
    for dip in dips:
        found[dip - 1] = 0.8
    return found


def measured(
    means: list[float],
    *,
    sequences: int = 6,
    moved: Array | float = 0.0,
    name: str = "tiny",
    tokenizer: str | None = "t",
    fingerprints: Array | None = None,
    norm: bool = True,
    altered: str | None = None,
) -> MeasuredModel:
    """Return a model of these mean similarities, the same draw whatever they are.

    Args:
        means: Of each decoder layer.
        sequences: How many.
        moved: Added to every similarity: a number, or `[L, S]`.
        name: The model's.
        tokenizer: The hash of its tokenizer.
        fingerprints: Of its sequences.
        norm: Whether it has a row behind a final norm.
        altered: What was done to its weights.
    """
    num_layers = len(means)
    labels = [str(layer) for layer in range(1, num_layers + 1)]
    rows = list(means)
    if norm:
        labels.append(f"{num_layers}+norm")
        rows.append(0.2)
    draw = 0.01 * np.random.default_rng(0).normal(size=(64, sequences, TOKENS))
    values = np.array(rows)[:, None, None] + draw[: len(rows)]
    values += np.broadcast_to(np.asarray(moved, dtype=float).T, values.T.shape[1:]).T[..., None]
    values = np.clip(values, -1, 1)
    statistics = SimilarityStatistics(labels, quantile_edges(values.reshape(len(rows), -1)))
    statistics.update(values, np.arange(sequences))
    prints = np.arange(sequences) if fingerprints is None else fingerprints
    provenance = {
        "tokenizer_hash": tokenizer,
        "model": {
            "name": name,
            "family": "llama",
            "num_layers": num_layers,
            "dtype": "float32",
            "device": "cpu",
            **({} if altered is None else {"altered": altered}),
        },
        "corpus": {
            "source": "words",
            "name": "words",
            "fingerprint": f"c{sequences}",
            "records": sequences,
            "tokens": sequences * TOKENS,
            "sequences": sequences,
            "seq_len": TOKENS,
        },
        "machine": {"processor": "P", "threads": 1, "capability": "AVX2", "blas": None},
        "versions": {"python": "3"},
        "command": None,
    }
    profile = SaturationProfile(
        statistics, prints.astype(np.uint64), from_plain(provenance, Provenance)
    )
    return MeasuredModel(profile, sizes(num_layers))
