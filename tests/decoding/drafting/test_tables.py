"""A table of n-grams proposes what followed the last tokens in a corpus."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.drafting import FREE
from support.tiny_models import tiny_model

from cascade import EarlyExit
from cascade.decoding.drafting.proposers import Candidate
from cascade.decoding.drafting.tables import NgramTable
from cascade.models.stack import DecoderStack

TEXTS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30), max_size=5)


def proposed(table: NgramTable, text: list[int], limit: int = 9) -> list[Candidate]:
    table.begin(3, text[0])
    table.observe(3, text[1:], None)
    return table.propose(3, limit)


def naive(texts: list[list[int]], context: list[int]) -> list[float]:
    """Return the shares of what followed the longest suffix that came twice, descending."""
    for length in range(min(3, len(context)), 0, -1):
        suffix = context[-length:]
        found = Counter(
            text[place]
            for text in texts
            for place in range(length, len(text))
            if text[place - length : place] == suffix
        )
        if found.total() >= 2:
            return [n / (found.total() + 2) for _, n in found.most_common(4)]
    return []


@given(TEXTS, st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_next_tokens_are_those_that_followed_the_longest_known_suffix(
    texts: list[list[int]], context: list[int]
) -> None:
    found = proposed(NgramTable.of(texts), context)
    first = [each.prior for each in found if each.parent == -1]
    assert first == pytest.approx(naive(texts, context))
    assert len({each.token for each in found if each.parent == -1}) == len(first)


@given(TEXTS, st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(0, 4))
def test_what_follows_a_candidate_is_what_follows_the_text_with_it(
    texts: list[list[int]], context: list[int], limit: int
) -> None:
    candidates = proposed(NgramTable.of(texts), context, limit)
    ways: list[list[int]] = []
    for candidate in candidates:
        before = ways[candidate.parent] if candidate.parent >= 0 else []
        ways.append([*before, candidate.token])
        assert len(ways[-1]) <= limit
    for number, way in enumerate(ways):
        behind = [each.prior for each in candidates if each.parent == number]
        if behind:
            assert behind == pytest.approx(naive(texts, [*context, *way]))


def test_likely_ways_are_followed_first_and_there_are_few_candidates() -> None:
    table = NgramTable.of([[1, 2, 3, 4, 5, 6, 7, 8, 9] * 20])
    tokens = [candidate.token for candidate in proposed(table, [1, 2, 3], 30)]
    assert tokens == [4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6]


@given(TEXTS)
def test_a_stored_table_is_the_same(texts: list[list[int]]) -> None:
    table = NgramTable.of(texts)
    again = NgramTable.from_tensors(table.tensors())
    assert len(again) == len(table)
    for context in itertools.product(range(5), repeat=2):
        assert proposed(again, list(context)) == proposed(table, list(context))
    assert again.tokens() == table.tokens()


@pytest.mark.parametrize("name", ["contexts", "following", "counts", "totals"])
def test_torn_tensors_are_refused(name: str) -> None:
    tensors = NgramTable.of([[1, 2, 3] * 4]).tensors()
    for broken in (tensors[name][:-1], tensors[name][None], torch.zeros_like(tensors[name]) - 1):
        with pytest.raises(ValueError, match="expected"):
            NgramTable.from_tensors(tensors | {name: broken})
    del tensors[name]
    with pytest.raises(KeyError, match=name):
        NgramTable.from_tensors(tensors)


def test_contexts_that_came_once_are_left_out() -> None:
    table = NgramTable.of([[1, 2], [1, 3], [4, 5]])
    assert len(table) == 1
    assert [candidate.token for candidate in proposed(table, [1])] == [2, 3]
    assert proposed(table, [4]) == []


def test_an_empty_table_proposes_nothing() -> None:
    table = NgramTable.of([])
    assert proposed(table, [1, 2]) == []
    assert len(NgramTable.from_tensors(table.tensors())) == 0


def test_drafts_from_a_table_do_not_change_the_text() -> None:
    early = EarlyExit(DecoderStack(tiny_model("llama")))
    prompt = torch.tensor([[5, 6, 7, 8]])
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True}
    plain: Any = early.generate(prompt, **settings)
    # A table of the text itself: most drafts are right.
    table = NgramTable.of([plain.sequences[0].tolist()] * 2)
    made: Any = early.generate(prompt, verify=True, drafter=table, pass_costs=FREE, **settings)
    assert made.sequences.equal(plain.sequences)
    assert made.passes < 12
