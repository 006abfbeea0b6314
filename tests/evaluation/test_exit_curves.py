"""Exit curves: thresholds and counts from tables match counts token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.evaluation.exit_curves import (
    curve,
    exits_and_wrong,
    lowest_kept,
    lowest_threshold,
    threshold_of_share,
)
from cascade.evaluation.records import ExitCurve

#: Few distinct values, so that ties are frequent.
TABLES = st.lists(
    st.tuples(st.integers(0, 6).map(lambda value: value / 8), st.booleans()),
    min_size=12,
    max_size=12,
)


def arrays(table: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([value for value, _ in table], dtype=np.float32).reshape(4, 3)
    return values, np.array([agrees for _, agrees in table]).reshape(4, 3)


def kept(confidence: np.ndarray, agrees: np.ndarray, threshold: float) -> float:
    """Return the agreement at a threshold, counted token by token; continuing tokens agree."""
    alike = [
        good or value < threshold
        for value, good in zip(confidence.ravel().tolist(), agrees.ravel().tolist(), strict=True)
    ]
    return sum(alike) / len(alike)


@given(TABLES, st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 1.0]))
def test_lowest_threshold_keeps_agreement(
    table: list[tuple[float, bool]], agreement: float
) -> None:
    confidence, agrees = arrays(table)
    fine = [
        value
        for value in confidence.ravel().tolist()
        if kept(confidence, agrees, value) >= agreement
    ]
    assert lowest_threshold(confidence, agrees, agreement) == min(fine, default=None)


@given(TABLES, st.sampled_from([0.5, 0.75, 0.9, 1.0]))
def test_additional_disagreements_raise_threshold(
    table: list[tuple[float, bool]], agreement: float
) -> None:
    confidence, agrees = arrays(table)
    found = lowest_threshold(confidence, agrees, agreement)
    strict = lowest_threshold(confidence, agrees, agreement, more_wrong=lambda exits: 0.25 * exits)
    if strict is not None:
        assert found is not None
        assert strict >= found
        exits, wrong = exits_and_wrong(confidence, agrees, strict)
        assert (12 - wrong - 0.25 * exits) / 12 >= agreement
    no_more = lowest_threshold(confidence, agrees, agreement, more_wrong=lambda exits: 0 * exits)
    assert no_more == found


@pytest.mark.parametrize(("share", "exits"), [(1 / 12, 1), (0.5, 6), (1.0, 12), (0.001, 1)])
def test_threshold_of_share_exits_that_share(share: float, exits: int) -> None:
    confidence = np.random.default_rng(0).permutation(12).reshape(4, 3).astype(np.float32)
    threshold = threshold_of_share(confidence, share)
    assert exits_and_wrong(confidence, confidence > 5, threshold)[0] == exits


@given(TABLES, TABLES)
def test_curve_counts_on_both_corpora(
    fit: list[tuple[float, bool]], confirm: list[tuple[float, bool]]
) -> None:
    found = curve(2, "cosine", arrays(fit), arrays(confirm), [0.3])
    assert 0.3 in found.thresholds
    assert found.thresholds == sorted(set(found.thresholds), reverse=True)
    for place, threshold in enumerate(found.thresholds):
        for name, table in (("fit_", fit), ("", confirm)):
            confidence, agrees = arrays(table)
            exits = confidence >= threshold
            assert getattr(found, f"{name}exits")[place] == exits.sum()
            assert getattr(found, f"{name}wrong")[place] == (exits & ~agrees).sum()
        agreement = kept(*arrays(confirm), threshold)
        assert found.low[place] <= agreement + 1e-6
        assert found.high[place] >= agreement - 1e-6


def test_curve_has_every_share_and_ends_with_all_tokens() -> None:
    confidence = np.random.default_rng(0).random((40, 100)).astype(np.float32)
    found = curve(2, "cosine", (confidence, confidence > 0.5), (confidence, confidence > 0.5))
    assert len(found.thresholds) == 43
    assert (found.fit_exits[0], found.fit_exits[-1]) == (40, 4000)


@given(TABLES, st.sampled_from([0.0, 0.5, 0.75, 0.9, 1.0]))
def test_lowest_kept_of_full_curve_matches_table(
    table: list[tuple[float, bool]], agreement: float
) -> None:
    confidence, agrees = arrays(table)
    found = curve(
        2, "cosine", (confidence, agrees), (confidence, agrees), confidence.ravel().tolist()
    )
    place = lowest_kept(found, 12, agreement)
    lowest = lowest_threshold(confidence, agrees, agreement)
    assert (None if place is None else found.thresholds[place]) == lowest


def test_threshold_without_exits_is_not_kept() -> None:
    found = ExitCurve(
        exit_layer=2,
        rule="cosine",
        thresholds=[0.9, 0.5],
        fit_exits=[0, 3],
        fit_wrong=[0, 3],
        exits=[0, 0],
        wrong=[0, 0],
        low=[1.0, 1.0],
        high=[1.0, 1.0],
    )
    assert lowest_kept(found, 12, 0.9) is None
    assert lowest_kept(found, 12, 0.75) == 1
