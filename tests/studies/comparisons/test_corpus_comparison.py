"""Tests of the comparison of corpora: the record, resampling, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.build_corpora import CORPORA, compared, text_of, the_record
from support.reference_early_exit import a_stack, one_line

from cascade import TokenBlocks, compare_corpora
from cascade.core.errors import CascadeError, CorpusError, ModelError, UsageError
from cascade.core.records import to_json
from cascade.core.schema import from_plain, to_plain
from cascade.studies.comparisons.corpus_comparison import CorpusComparisonConfig
from cascade.studies.comparisons.corpus_differences import LABELS
from cascade.studies.comparisons.corpus_records import CorpusComparison


def test_resampling_is_seeded_and_differs_between_corpora() -> None:
    assert compared(seed=0) == the_record()
    other = compared(seed=1)
    assert other.layers != the_record().layers
    # If both corpora used the same draws, the difference to a copy would hardly vary.
    ids = CORPORA[0].ids.copy()
    ids[0, -1] = ids[0, -1] % 90 + 2
    copy = TokenBlocks(ids, "copy", "copy", 60)
    found = compared(CORPORA[0], copy)
    for row, means in zip(found.differences[0].rows, found.layers, strict=True):
        assert abs(row.difference) < 1e-3
        low, high = means.means[0].interval
        assert row.interval[1] - row.interval[0] > 1.2 * (high - low)


def test_shared_sequences_are_counted() -> None:
    blocks = text_of(40)
    some = TokenBlocks(np.concatenate([blocks.ids[:7], text_of(9, seed=9).ids]), "some", "some", 16)
    record = compared(blocks, text_of(20, seed=8), some)
    assert to_plain(record.shared) == [{"corpora": ["A", "C"], "sequences": 7}]
    assert the_record().shared == []


def test_the_record_is_complete_and_serializable() -> None:
    record = the_record()
    assert (record.schema, record.kind) == (1, "corpus-comparison")
    assert "corpus" not in to_plain(record.provenance)
    assert {label: corpus.source for label, corpus in record.provenance.corpora.items()} == {
        label: blocks.source for label, blocks in zip("ABC", CORPORA, strict=True)
    }
    plain = to_plain(record)
    assert to_json(plain)  # refuses NaN
    assert from_plain(plain, CorpusComparison) == record


def test_the_batch_size_does_not_matter_and_progress_counts_all_tokens() -> None:
    done: list[int] = []
    config = CorpusComparisonConfig(layer=3, hard_ratios=(0.5,))
    record = compare_corpora(a_stack("llama"), CORPORA, config, batch_size=7, progress=done.append)
    assert sum(done) == sum(blocks.tokens for blocks in CORPORA)
    for row, expected in zip(record.layers, the_record().layers, strict=True):
        for mean, other in zip(row.means, expected.means, strict=True):
            assert mean.mean == pytest.approx(other.mean, abs=1e-6)


# --- Refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corpora", "error", "message"),
    [
        ([], UsageError, "expected at least 2 corpora to compare, got 0"),
        ([text_of(4)], UsageError, "expected at least 2 corpora to compare, got 1"),
        ([text_of(4, seed=n) for n in range(9)], UsageError, "at most 8 corpora, got 9"),
        (
            [text_of(4), text_of(1, seed=1)],
            CorpusError,
            "tokens-2-97-1 for an interval, got 1",
        ),
        ([text_of(4), text_of(6, seed=1), text_of(4)], CorpusError, "got the same tokens from"),
        ([text_of(4), text_of(4, length=65, seed=1)], CorpusError, "use --seq-len 64 or less"),
        ([text_of(4), text_of(4, 2, 200, seed=1)], ModelError, "the model embeds 97 tokens"),
    ],
)
def test_invalid_corpora_are_refused_before_any_pass(
    corpora: list[TokenBlocks], error: type[CascadeError], message: str
) -> None:
    done: list[int] = []
    with pytest.raises(error) as caught:
        compare_corpora(a_stack("llama"), corpora, progress=done.append)
    assert message in one_line(caught)
    assert done == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer": 0}, "expected --layer of at least 1, got 0"),
        ({"layer": 5}, "expected --layer in 1..4, got 5"),
        ({"hard_ratios": ()}, "expected at least one hard ratio, got none"),
        ({"hard_ratios": (0.5, 1.0)}, "expected a --hard-ratio between 0 and 1, got 1"),
        ({"hard_ratios": (float("nan"),)}, "expected a --hard-ratio between 0 and 1, got nan"),
        ({"margin": 0.0}, "expected a --margin between 0 and 2, got 0"),
        ({"margin": float("nan")}, "expected a --margin between 0 and 2, got nan"),
        ({"tolerance": 1.0}, "expected a --tolerance between 0 and 1, got 1"),
        ({"seed": -1}, "expected a --seed of 0 or more, got -1"),
    ],
)
def test_options_out_of_range_are_refused(config: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        compared(**config)
    assert message in one_line(caught)


def test_every_allowed_corpus_has_a_label() -> None:
    corpora = [text_of(3, seed=number, length=4) for number in range(len(LABELS))]
    record = compared(*corpora, layer=1)
    assert [corpus.label for corpus in record.corpora] == list(LABELS)
    assert len(record.thresholds.rows) == 8 * 7
