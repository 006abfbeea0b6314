"""Lookup copies what followed the longest suffix of a text before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.decoding.drafting.ngrams import NgramLookup


def lookup_in(text: Sequence[int], **settings: int) -> NgramLookup:
    lookup = NgramLookup(**settings)
    lookup.begin(0, text[0])
    lookup.observe(0, text[1:], None)
    return lookup


def tokens_of(lookup: NgramLookup, row: int = 0, limit: int = 12) -> list[int]:
    return [candidate.token for candidate in lookup.propose(row, limit)]


def reference(text: list[int], limit: int, longest: int, shortest: int, most: int) -> list[int]:
    """Return the draft by a search through the whole text."""
    for length in range(min(longest, len(text)), shortest - 1, -1):
        suffix = text[len(text) - length :]
        for begin in range(len(text) - length - 1, -1, -1):  # the last place before the end
            if text[begin : begin + length] == suffix:
                grown = list(text)
                while len(grown) < len(text) + min(limit, most):
                    # What follows is copied, including what has just been copied.
                    grown.append(grown[begin + length + len(grown) - len(text)])
                return grown[len(text) :]
    return []


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    limit=st.integers(1, 15),
    longest=st.integers(2, 10),
    shortest=st.integers(1, 2),
    most=st.integers(1, 12),
)
def test_draft_is_that_of_a_search_through_the_text(
    text: list[int], limit: int, longest: int, shortest: int, most: int
) -> None:
    lookup = lookup_in(text, longest=longest, shortest=shortest, most=most)
    assert tokens_of(lookup, limit=limit) == reference(text, limit, longest, shortest, most)


@given(
    text=st.lists(st.integers(0, 3), min_size=2, max_size=30),
    cuts=st.lists(st.integers(1, 29), max_size=4),
)
def test_pieces_are_observed_like_a_whole(text: list[int], cuts: list[int]) -> None:
    pieces = NgramLookup()
    pieces.begin(0, text[0])
    places = [1, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for begin, end in itertools.pairwise(places):
        pieces.observe(0, text[begin:end], None)
    assert pieces.propose(0, 8) == lookup_in(text).propose(0, 8)


def test_longest_suffix_counts() -> None:
    # 3 4 was last followed by 9, but 2 3 4 by 5.
    assert tokens_of(lookup_in([1, 2, 3, 4, 5, 3, 4, 9, 2, 3, 4]), limit=1) == [5]


def test_last_occurrence_counts() -> None:
    assert tokens_of(lookup_in([1, 2, 5, 1, 2, 6, 1, 2]), limit=1) == [6]


def test_repeated_text_is_continued_beyond_its_end() -> None:
    assert tokens_of(lookup_in([1, 2, 3, 1, 2, 3, 1, 2]), limit=8) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert tokens_of(lookup_in([7, 7, 7]), limit=5) == [7] * 5


def test_nothing_is_drafted_behind_a_new_suffix() -> None:
    assert tokens_of(lookup_in([1, 2, 3, 1])) == []  # one token is too short
    assert tokens_of(lookup_in([1])) == []


def test_draft_is_a_chain() -> None:
    candidates = lookup_in([1, 2, 3, 4, 1, 2]).propose(0, 4)
    assert [candidate.parent for candidate in candidates] == [-1, 0, 1, 2]
    assert all(0 < candidate.prior < 1 for candidate in candidates)


@pytest.mark.parametrize(("limit", "most", "length"), [(3, 12, 3), (20, 5, 5), (20, 12, 12)])
def test_draft_is_not_longer_than_allowed(limit: int, most: int, length: int) -> None:
    lookup = lookup_in([*range(30), 0, 1], most=most)
    assert tokens_of(lookup, limit=limit) == list(range(2, 2 + length))


def test_longer_suffixes_count_as_guesses_of_their_own() -> None:
    text = [*range(20), *range(11)]
    keys = [lookup_in(text, longest=n).propose(0, 1)[0].key for n in (2, 8, 11)]
    assert len({*keys}) == 3
    priors = [lookup_in(text, longest=n).propose(0, 1)[0].prior for n in (2, 8, 11)]
    assert priors == sorted(priors)


def test_rows_have_texts_of_their_own() -> None:
    lookup = lookup_in([1, 2, 3, 1, 2])
    lookup.begin(1, 1)
    lookup.observe(1, [2, 9, 1, 2], None)
    assert tokens_of(lookup, 0, 1) == [3]
    assert tokens_of(lookup, 1, 1) == [9]


def test_new_text_forgets_the_one_before() -> None:
    lookup = lookup_in([1, 2, 3, 1, 2])
    lookup.begin(0, 1)
    lookup.observe(0, [2], None)
    assert tokens_of(lookup) == []
