"""Drafting merges what proposers propose and keeps what saves the most time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.decoding.drafting.proposers import Candidate, Draft, Drafting, Estimates, Proposer

FREE = [1.0] * 64


class Fixed(Proposer):
    """Proposes the same candidates in every row."""

    def __init__(self, candidates: Sequence[Candidate], name: str = "fixed") -> None:
        self.candidates, self.name = list(candidates), name

    def propose(self, row: int, limit: int) -> list[Candidate]:
        return self.candidates


def chain(tokens: Sequence[int], prior: float = 0.5, kind: str = "chain") -> list[Candidate]:
    return [Candidate(token, place - 1, (kind, place), prior) for place, token in enumerate(tokens)]


def draft_of(
    *given_: Sequence[Candidate], trees: bool = True, costs: Sequence[float] = FREE, limit: int = 9
) -> Draft:
    proposers = [Fixed(candidates, str(place)) for place, candidates in enumerate(given_)]
    return Drafting(proposers, costs, trees=trees).propose({0: limit})[0]


def paths_of(draft: Draft) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        assert parent < len(found), "parents come before their children"
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


# --- Merging --------------------------------------------------------------------------------


def test_common_beginnings_are_merged() -> None:
    draft = draft_of(chain([1, 2, 3]), chain([1, 2, 4], kind="other"))
    assert sorted(paths_of(draft)) == [(1,), (1, 2), (1, 2, 3), (1, 2, 4)]
    source = dict(zip(paths_of(draft), draft.sources, strict=True))
    assert source == {(1,): "0", (1, 2): "0", (1, 2, 3): "0", (1, 2, 4): "1"}


def test_the_likeliest_guess_of_a_token_counts() -> None:
    draft = draft_of(chain([7], 0.2, "first"), chain([7], 0.9, "second"))
    assert draft.keys == (("second", 0),)
    draft = draft_of(chain([7], 0.9, "first"), chain([7], 0.2, "second"))
    assert draft.keys == (("first", 0),)


def test_what_follows_a_token_is_as_likely_as_the_likeliest_guess_of_it() -> None:
    first = [Candidate(7, -1, ("a",), 0.3), Candidate(8, 0, ("a",), 0.9)]
    merged = Drafting([Fixed(first), Fixed(chain([7], 0.8))], [1.0] * 16, trees=True)
    (nodes,) = merged._nodes({0: 4}).values()
    assert [node.path for node in nodes] == pytest.approx([0.8, 0.72])


class Asked(Proposer):
    """Counts the rows that it is asked for."""

    needed_below = 0.6

    def __init__(self) -> None:
        self.rows: list[set[int]] = []

    def propose_all(self, limits: Mapping[int, int]) -> dict[int, list[Candidate]]:
        self.rows.append(set(limits))
        return {row: [] for row in limits}


def test_a_proposer_that_takes_time_is_asked_only_where_no_other_guess_is_likely() -> None:
    class ByRow(Proposer):
        def propose(self, row: int, limit: int) -> list[Candidate]:
            return [Candidate(5, -1, ("a", row), [0.2, 0.59, 0.6, 0.9][row])]

    asked = Asked()
    drafting = Drafting([ByRow(), asked], [1.0] * 16, trees=True)
    drafting.propose(dict.fromkeys(range(4), 3))
    drafting.propose({2: 3, 3: 3})
    drafting.propose({1: 0})
    assert asked.rows == [{0, 1}]


def test_same_token_behind_other_parents_is_another_guess() -> None:
    draft = draft_of([*chain([1, 5]), Candidate(2, -1, ("b",), 0.4), Candidate(5, 2, ("c",), 0.4)])
    assert sorted(paths_of(draft)) == [(1,), (1, 5), (2,), (2, 5)]


def test_without_trees_the_most_probable_chain_is_drafted() -> None:
    draft = draft_of(chain([1, 2], 0.3), chain([4, 5, 6], 0.6, "other"), trees=False)
    assert paths_of(draft) == [(4,), (4, 5), (4, 5, 6)]
    assert draft.parents == (-1, 0, 1)


def test_nothing_is_drafted_where_no_token_can_follow() -> None:
    assert draft_of(chain([1, 2]), limit=0) == Draft()


@pytest.mark.parametrize("trees", [True, False])
def test_draft_is_not_longer_than_what_can_follow(trees: bool) -> None:
    draft = draft_of(chain([1, 2, 3, 4]), trees=trees, limit=2)
    assert paths_of(draft) == [(1,), (1, 2)]


@pytest.mark.parametrize("prior", [-1.0, 0.0, 2.0, float("nan"), float("inf")])
def test_priors_that_are_no_probabilities_do_not_change_the_order(prior: float) -> None:
    candidates = [*chain([1], 0.5), Candidate(2, 0, ("odd",), prior), Candidate(3, 1, ("c",), 0.9)]
    assert set(paths_of(draft_of(candidates))) <= {(1,), (1, 2), (1, 2, 3)}


def test_row_without_candidates_gets_an_empty_draft() -> None:
    assert Drafting([], FREE, trees=True).propose({0: 3, 4: 3}) == {0: Draft(), 4: Draft()}


# --- Costs ----------------------------------------------------------------------------------


@st.composite
def candidates_of(draw: st.DrawFn, kind: str) -> list[Candidate]:
    """Draw a tree of candidates without equal siblings."""
    found: list[Candidate] = []
    used: set[tuple[int, int]] = set()
    for place in range(draw(st.integers(0, 7))):
        parent = draw(st.integers(-1, place - 1))
        token = draw(st.integers(0, 5))
        while (parent, token) in used:
            token += 1
        used.add((parent, token))
        found.append(Candidate(token, parent, (kind, place), draw(st.floats(0.01, 1.0))))
    return found


def steps(sizes: list[float]) -> list[float]:
    """Return costs that never fall."""
    return list(itertools.accumulate(sizes))


COSTS = st.lists(st.floats(0.0, 2.0), min_size=0, max_size=20).map(lambda more: steps([1.0, *more]))


def path_probabilities(candidates: Sequence[Candidate]) -> list[float]:
    found: list[float] = []
    for candidate in candidates:
        before = found[candidate.parent] if candidate.parent >= 0 else 1.0
        found.append(before * candidate.prior)
    return found


@given(candidates=candidates_of("tree"), costs=COSTS, rows=st.integers(1, 4))
def test_kept_guesses_give_the_most_tokens_per_millisecond(
    candidates: list[Candidate], costs: list[float], rows: int
) -> None:
    drafts = Drafting([Fixed(candidates)], costs, trees=True).propose(dict.fromkeys(range(rows), 9))
    kept = sum(len(draft.tokens) for draft in drafts.values())
    if rows > len(costs):
        assert kept == 0
        return
    probable = sorted(path_probabilities(candidates) * rows, reverse=True)

    def speed(count: int) -> float:
        return (rows + sum(probable[:count])) / costs[rows + count - 1]

    counts = range(min(len(probable), len(costs) - rows) + 1)
    # Sums of the same numbers in another order.
    assert speed(kept) == pytest.approx(max(map(speed, counts)), rel=1e-9)
    made = [path_probabilities_of(draft, candidates) for draft in drafts.values()]
    assert sum(map(sum, made)) == pytest.approx(sum(probable[:kept]), rel=1e-9)


def path_probabilities_of(draft: Draft, candidates: Sequence[Candidate]) -> list[float]:
    known = dict(
        zip(
            [candidate.key for candidate in candidates],
            path_probabilities(candidates),
            strict=True,
        )
    )
    return [known[key] for key in draft.keys]


@given(first=candidates_of("a"), second=candidates_of("b"), costs=COSTS, trees=st.booleans())
def test_parents_of_kept_guesses_are_kept(
    first: list[Candidate], second: list[Candidate], costs: list[float], trees: bool
) -> None:
    draft = draft_of(first, second, costs=costs, trees=trees)
    paths = paths_of(draft)
    assert len({*paths}) == len(paths)
    for path in paths:
        assert len(path) == 1 or path[:-1] in paths
    proposed = {path for given_ in (first, second) for path in tree_paths(given_)}
    assert {*paths} <= proposed
    if not trees:
        assert draft.parents == tuple(range(-1, len(paths) - 1))


def tree_paths(candidates: Sequence[Candidate]) -> list[tuple[int, ...]]:
    draft = Draft(
        tuple(candidate.token for candidate in candidates),
        tuple(candidate.parent for candidate in candidates),
    )
    return paths_of(draft)


@given(candidates=candidates_of("tree"), costs=COSTS, rows=st.integers(1, 20))
def test_pass_has_no_more_rows_than_costs_are_known(
    candidates: list[Candidate], costs: list[float], rows: int
) -> None:
    drafts = Drafting([Fixed(candidates)], costs, trees=True).propose(dict.fromkeys(range(rows), 9))
    kept = sum(len(draft.tokens) for draft in drafts.values())
    assert kept == 0 or rows + kept <= len(costs)


def test_expensive_rows_are_not_drafted() -> None:
    assert draft_of(chain([1, 2], 0.4), costs=[1.0, 1.5, 2.0]) == Draft()
    assert paths_of(draft_of(chain([1, 2], 0.6), costs=[1.0, 1.5, 3.0])) == [(1,)]


def test_likelier_rows_of_a_batch_are_drafted_first() -> None:
    class ByRow(Proposer):
        def propose(self, row: int, limit: int) -> list[Candidate]:
            return chain([row] * 2, 0.3 + 0.2 * row, f"row {row}")

    drafting = Drafting([ByRow()], [1.0] * 5, trees=True)
    drafts = drafting.propose({0: 5, 1: 5, 2: 5})
    assert [len(drafts[row].tokens) for row in range(3)] == [0, 1, 1]


# --- Estimates ------------------------------------------------------------------------------


def test_prior_is_the_first_estimate() -> None:
    candidate = Candidate(1, -1, ("kind",), 0.3)
    assert Estimates().of(candidate) == pytest.approx(0.3)


def test_estimates_approach_what_happens() -> None:
    estimates, candidate = Estimates(), Candidate(1, -1, ("kind",), 0.9)
    for number in range(400):
        estimates.add(("kind",), number % 4 == 0)
    assert estimates.of(candidate) == pytest.approx(0.25, abs=0.06)
    for _ in range(100):  # the latest guesses count most
        estimates.add(("kind",), True)
    assert estimates.of(candidate) > 0.7


def test_kinds_are_estimated_separately() -> None:
    estimates = Estimates()
    estimates.add(("kind", 0), True)
    assert estimates.of(Candidate(1, -1, ("kind", 1), 0.5)) == pytest.approx(0.5)


@given(
    prior=st.floats(0.0, 1.0),
    happened=st.lists(st.booleans(), max_size=300),
    weight=st.floats(0.1, 100),
)
def test_estimates_are_probabilities(prior: float, happened: list[bool], weight: float) -> None:
    estimates = Estimates(weight)
    for right in happened:
        estimates.add(("kind",), right)
    assert 0.0 <= estimates.of(Candidate(1, -1, ("kind",), prior)) <= 1.0 + 1e-12  # rounding


def test_experience_changes_what_is_drafted() -> None:
    drafting = Drafting([Fixed(chain([1], 0.9))], [1.0, 1.5], trees=True)
    assert drafting.propose({0: 3})[0].tokens == (1,)
    for _ in range(20):
        drafting.estimates.add(("chain", 0), False)
    assert drafting.propose({0: 3})[0].tokens == ()
