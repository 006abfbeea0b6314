"""Runner-ups are the model's most likely tokens after the same token before."""

from __future__ import annotations

import pytest

from cascade.decoding.drafting.proposers import Candidate
from cascade.decoding.drafting.runner_ups import RunnerUps


def paths_of(candidates: list[Candidate]) -> list[list[int]]:
    """Return the tokens from the end of the text to each candidate."""
    found: list[list[int]] = []
    for candidate in candidates:
        before = [] if candidate.parent < 0 else found[candidate.parent]
        found.append([*before, candidate.token])
    return found


@pytest.fixture
def recycled() -> RunnerUps:
    made = RunnerUps()
    made.begin(0, 5)
    made.learn([5, 6, 7], [[6, 7, 8, 9], [7, 1, 2, 3], [5, 4, 3, 2]])
    return made


def test_tree_has_four_two_and_one_candidates_for_a_place(recycled: RunnerUps) -> None:
    paths = paths_of(recycled.propose(0, 10))
    assert [path for path in paths if len(path) == 1] == [[6], [7], [8], [9]]
    # Nothing is known about 8 and 9.
    assert [path for path in paths if len(path) == 2] == [[6, 7], [6, 1], [7, 5], [7, 4]]
    assert [path for path in paths if len(path) == 3] == [[6, 7, 5], [7, 5, 6]]
    assert len(paths) == 10


@pytest.mark.parametrize(("limit", "count"), [(0, 0), (1, 4), (2, 8), (3, 10)])
def test_tree_is_not_deeper_than_allowed(recycled: RunnerUps, limit: int, count: int) -> None:
    assert len(recycled.propose(0, limit)) == count


def test_candidates_come_behind_their_parents(recycled: RunnerUps) -> None:
    candidates = recycled.propose(0, 3)
    assert all(candidate.parent < place for place, candidate in enumerate(candidates))


def test_likelier_tokens_are_likelier_guesses(recycled: RunnerUps) -> None:
    priors = [candidate.prior for candidate in recycled.propose(0, 1)]
    assert priors == sorted(priors, reverse=True)
    assert sum(priors) < 1


def test_last_token_of_each_row_counts(recycled: RunnerUps) -> None:
    recycled.begin(1, 5)
    recycled.observe(1, [2, 6], None)
    assert paths_of(recycled.propose(1, 1)) == [[7], [1], [2], [3]]
    assert paths_of(recycled.propose(0, 1)) == [[6], [7], [8], [9]]
    recycled.observe(0, [], None)
    assert paths_of(recycled.propose(0, 1)) == [[6], [7], [8], [9]]


def test_latest_prediction_counts(recycled: RunnerUps) -> None:
    recycled.learn([5], [[1, 2]])
    assert paths_of(recycled.propose(0, 1)) == [[1], [2]]


def test_nothing_is_drafted_behind_a_new_token(recycled: RunnerUps) -> None:
    recycled.observe(0, [50], None)
    assert recycled.propose(0, 3) == []
