"""Corpora to compare, of random tokens, and their comparison on a tiny model."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cascade.corpora.blocks import TokenBlocks
from cascade.studies.comparisons.corpus_comparison import CorpusComparisonConfig, compare_corpora
from cascade.studies.comparisons.corpus_records import CorpusComparison
from support.reference_early_exit import a_stack
from support.tiny_models import VOCABULARY

LAYERS = ["1", "2", "3", "4", "4+norm"]


def text_of(
    sequences: int, low: int = 2, high: int = VOCABULARY, *, seed: int = 0, length: int = 12
) -> TokenBlocks:
    """Return sequences of random tokens of a part of the vocabulary."""
    ids = np.random.default_rng(seed).integers(low, high, (sequences, length)).astype(np.int32)
    name = f"tokens-{low}-{high}-{seed}"
    return TokenBlocks(ids, f"./{name}.jsonl", name, sequences)


#: Two of one kind, the second smaller, and one of other tokens.
CORPORA = [text_of(60), text_of(40, seed=1), text_of(50, 30, 32, seed=2)]


def compared(*corpora: TokenBlocks, **config: Any) -> CorpusComparison:
    wanted = CorpusComparisonConfig(**{"layer": 3, "hard_ratios": (0.5,)} | config)
    return compare_corpora(a_stack("llama"), corpora or CORPORA, wanted)


@functools.cache
def the_record() -> CorpusComparison:
    return compared()
