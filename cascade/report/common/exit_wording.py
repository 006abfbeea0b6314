"""Texts for records of early exit: heads, propagation, thresholds and intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from cascade.core.formatting import perplexity_words
from cascade.core.schema import UNSET, UnsetType, known
from cascade.evaluation.records import ExitProvenance, FullModelFigures
from cascade.report.common.records import bos_words, percent
from cascade.report.common.words import counted

_HEADS = {
    "logit_lens": "logit lens: the model's own final norm and LM head",
    "ridge": "ridge: an affine map of the exit state, fitted in advance, before the LM head",
}
_PROPAGATIONS = {
    "frozen": "frozen: upper layers compute keys and values from the exit state",
    "ridge": "ridge: upper layers compute keys and values from a fitted prediction of their inputs",
    "exact": "exact: upper layers process exited tokens later, once a later token continues",
}

#: Measured with the heads of SmolLM2-135M's layers 24 and 28: of the exited tokens, 0.971 and 1.000
#: agreed with the full model on the text that the heads were fitted on, 0.936 and 0.980 on other
#: text.
_SEEN = (
    "the heads were fitted on this text and are more accurate on it than on other text; use "
    "another corpus or another --split"
)

#: Percentile bootstrap intervals over fewer sequences than this are far too narrow.
_FEW = 8


class SizedCorpus(Protocol):
    """A corpus with a known name and size."""

    @property
    def name(self) -> str:
        """The name."""

    @property
    def tokens(self) -> int:
        """The number of tokens."""

    @property
    def sequences(self) -> int:
        """The number of sequences."""

    @property
    def bos(self) -> Literal["yes", "no"] | UnsetType:
        """As in `CorpusProvenance`."""

    @property
    def seq_len(self) -> int:
        """The number of tokens per sequence."""


def head_words(name: str) -> str:
    """Return the description of an exit head."""
    return _HEADS.get(name, name)


def propagation_words(name: str) -> str:
    """Return how upper layers get keys and values of exited tokens."""
    return _PROPAGATIONS.get(name, name)


def heads_pairs(provenance: ExitProvenance) -> list[tuple[str, str]]:
    """Return the corpus of fitted heads and a warning, as (label, text); [] for the logit lens."""
    corpus = None if provenance.heads is None else known(provenance.heads.corpus)
    pairs = [("Head corpus", corpus_words(corpus))] if corpus else []
    if known(provenance.heads_saw_corpus):
        pairs.append(("Warning", _SEEN))
    return pairs


def few_pairs(corpus: SizedCorpus) -> list[tuple[str, str]]:
    """Return a warning as (label, text) if a corpus has few sequences, else []."""
    if corpus.sequences >= _FEW:
        return []
    return [("Warning", f"{corpus.sequences} sequences are too few for reliable intervals")]


def corpus_words(corpus: SizedCorpus) -> str:
    """Return the name and size of a corpus."""
    return (
        f"{corpus.name}, {corpus.tokens:,} tokens: "
        f"{counted(corpus.sequences, 'sequence')} x {corpus.seq_len:,}{bos_words(corpus.bos)}"
    )


def show_threshold(value: float, digits: int = 6) -> str:
    """Format a threshold with enough digits that only 0 and 1 are shown as 0 and 1."""
    if math.isinf(value) or (value.is_integer() and abs(value) > 1):
        return f"{value:g}"
    for more in range(digits, 18, 2):
        shown = f"{value:z.{more}f}"
        if float(shown) == value or abs(float(shown)) not in (0.0, 1.0):
            return shown
    return f"{value:g}"


def between(interval: Sequence[float] | None, show: Callable[[float], str], to: str) -> str:
    """Format an interval; a dash for None."""
    return "-" if interval is None else f"{show(interval[0])}{to}{show(interval[1])}"


def share(value: float | None, digits: int = 1) -> str:
    """Format a share with a number of decimals; a dash for None."""
    return "-" if value is None else percent(value, digits)


def full_model_words(full: FullModelFigures) -> str:
    """Return the full model's perplexity; its nats per token if it is huge."""
    words = perplexity_words(full.perplexity, known(full.nats_per_token))
    return words if full.perplexity is None else f"perplexity {words}"


def ratio_cell(value: float | None, nats: float | UnsetType | None) -> str:
    """Format a perplexity ratio, or its difference in nats per token where no number holds it."""
    difference = known(nats)
    if value is None and difference is not None:
        return f"{difference:+,.0f} nats"
    return f"{value:.0e}" if value is not None and value < 5e-4 else ratio(value)


def interval_cell(
    interval: Sequence[float] | None, nats: Sequence[float] | UnsetType | None
) -> str:
    """Format the interval of a perplexity ratio, or that of its difference in nats per token."""
    ends = known(nats)
    if interval is None and ends is not None:
        return f"{ends[0]:+,.0f} to {ends[1]:+,.0f} nats"
    return between(interval, lambda end: ratio_cell(end, UNSET), "-")


def ratio(value: float | None, digits: int = 3) -> str:
    """Format a ratio; thousands and more as a power of ten, a dash for None."""
    if value is None:
        return "-"
    if value >= 10_000:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    # As many digits after the point as fit five characters, including the point.
    whole = len(f"{value:.0f}")
    return f"{value:.{max(0, min(digits, digits + 1 - whole))}f}"
