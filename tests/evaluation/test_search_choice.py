"""The choice of an exit layer, from points made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.build_points import a_point

from cascade.core.errors import UsageError
from cascade.core.records import to_json
from cascade.evaluation.search_choice import Wish, choose, search_record
from cascade.stats.certificates import certify, certify_means, hoeffding_p_value, risk_bound

Row = dict[str, Any]


def chosen(*points: Row, sequences: int = 32, nothing: tuple[Row, ...] = (), **wish: Any) -> Row:
    return choose(points, nothing, Wish(**wish), sequences=sequences)


def test_the_best_is_the_cheapest_whose_agreement_is_confirmed() -> None:
    points = (
        a_point(20, 0.90, 0.7),
        a_point(24, 0.955, 0.9),
        a_point(26, 0.97, 0.95),
        a_point(28, 0.99, 0.98),
    )
    found = chosen(*points)
    assert (found["best"], found["best_beyond_doubt"]) == (1, 2)
    assert [row["outcome"] for row in points] == ["lost", "kept", "beyond doubt", "beyond doubt"]
    assert found["verdict"]["exit"] is True
    assert found["verdict"]["headline"] == (
        "Exit at layer 24, cosine >= 0.9 with the ridge head: 95.5 % of all tokens are predicted "
        "as by the full model (wanted: 95.0 %), at 0.900 x the full model's operations and "
        "0.90 x its time (0.89 to 0.91)."
    )
    (also,) = found["verdict"]["also"]
    assert "94.5 % to 96.5 %, reaches below the wanted 95.0 %" in also
    assert "Beyond doubt is layer 26" in also


def test_the_wanted_agreement_itself_is_kept() -> None:
    point = a_point(24, 0.95, 0.9, half=0.0)
    assert chosen(point)["best_beyond_doubt"] == 0


def test_what_is_faster_beyond_doubt_comes_before_what_counts_fewer_operations() -> None:
    slow = a_point(20, 0.97, 0.8, seconds=(0.98, 0.95, 1.01))
    assert chosen(slow, a_point(24, 0.97, 0.9))["best"] == 1
    assert chosen(slow)["best"] == 0


@pytest.mark.parametrize(
    ("point", "words"),
    [
        (a_point(28, 0.97, 1.08), "No early exit saves anything at 95.0 % agreement: the cheapest"),
        (
            a_point(28, 0.97, 0.99, seconds=(0.99, 0.97, 1.01)),
            "No early exit saves time beyond doubt at 95.0 % agreement: the cheapest",
        ),
        (a_point(28, 0.94, 0.9), "Nothing is confirmed to keep 95.0 % agreement by running"),
    ],
)
def test_it_says_honestly_that_nothing_is_saved(point: Row, words: str) -> None:
    verdict = chosen(point)["verdict"]
    assert verdict["exit"] is False
    assert verdict["headline"].startswith(words)
    assert "layer 28, cosine >= 0.9 with the ridge head" in verdict["headline"]


def test_where_nothing_may_leave_it_says_so() -> None:
    why = {"exit_layer": 2, "rule": "cosine", "head": "ridge", "propagation": "ridge"}
    found = chosen(nothing=({**why, "source": 0, "why": "none"},))
    assert found["verdict"]["headline"].startswith("No early exit keeps 95.0 % agreement: no layer")
    assert (found["best"], found["nearest"]) == (None, None)
    assert [row["fitted"] for row in found["pairs"]] == [None]


def test_what_the_fit_does_not_promise_is_no_candidate() -> None:
    found = chosen(a_point(20, 0.99, 0.5, candidate=False), a_point(24, 0.96, 0.9))
    assert found["best"] == 1
    assert found["certificate"]["tested"] == 1


def test_a_point_on_the_table_is_never_the_best_and_is_named_where_it_would_be_cheaper() -> None:
    table = a_point(20, 0.99, 0.5, confirmed_by="table")
    found = chosen(table, a_point(24, 0.97, 0.9))
    assert (found["best"], found["best_on_table"]) == (1, 0)
    (also,) = found["verdict"]["also"]
    assert also.startswith("On the table alone, layer 20")
    assert "--measure runs it" in also
    assert (table["risk_bound"], table["certified"]) == (None, None)
    alone = chosen(a_point(20, 0.99, 0.5, confirmed_by="table"))
    assert alone["verdict"]["exit"] is False
    assert alone["best"] is None
    exact = chosen(a_point(20, 0.99, 0.5, confirmed_by="exact table"))
    assert exact["best"] == 0


def test_each_pair_names_its_boldest_point_and_the_boldest_that_kept_it() -> None:
    found = chosen(
        a_point(24, 0.93, 0.8, threshold=0.5),
        a_point(24, 0.955, 0.9, threshold=0.6),
        a_point(24, 0.99, 0.95, threshold=0.7),
        a_point(24, 0.995, 0.97, threshold=0.8),
        a_point(28, 0.93, 0.95, threshold=0.5),
    )
    first, second = found["pairs"]
    assert [first[name] for name in ("fitted", "kept", "beyond_doubt")] == [0, 1, 2]
    assert [second[name] for name in ("fitted", "kept", "beyond_doubt")] == [4, None, None]


# --- Certificates ----------------------------------------------------------------------------


def test_all_bounds_hold_together() -> None:
    points = [a_point(layer, 0.97, 0.9) for layer in (20, 22, 24, 26)]
    found = chosen(*points, sequences=1000)
    for row in points:
        # At its own bound a hypothesis is just rejected, at a quarter of the error.
        p_value = hoeffding_p_value(0.03, sequences=1000, risk=row["risk_bound"])
        assert p_value == pytest.approx(0.05 / 4)
    assert found["certificate"]["confidence_each"] == pytest.approx(1 - 0.05 / 4)


@pytest.mark.parametrize(("points", "certified"), [(1, True), (40, False)])
def test_the_more_thresholds_are_tried_the_more_sequences_a_certificate_takes(
    points: int, certified: bool
) -> None:
    tried = [a_point(layer, 1.0, 0.9) for layer in range(1, points + 1)]
    found = chosen(*tried, sequences=700)  # 600 are enough for one at risk 0.05
    assert [row["certified"] for row in tried] == [certified] * points
    assert (found["certificate"]["best"] is not None) is certified
    assert (found["certificate"]["sequences_needed"] <= 700) is certified


def test_a_certificate_is_what_learn_then_test_gives_at_its_share_of_the_error() -> None:
    losses = np.random.default_rng(0).random((1, 1300)) * 0.02
    mean = float(losses.mean())
    point = a_point(24, 1 - mean, 0.9)
    found = chosen(point, a_point(28, 0.5, 0.95), sequences=1300)
    expected = certify(np.array([0.9]), losses, risk=0.05, confidence=1 - 0.05 / 2)
    assert point["certified"] is (expected.certified == 1) is True
    assert found["certificate"]["certified"] == [0]


def test_the_risk_is_what_the_agreement_leaves() -> None:
    assert Wish(0.95).bound == 0.05
    assert Wish(0.95, risk=0.2).bound == 0.2
    assert Wish(1.0).bound is None
    assert Wish(0.0).bound is None
    assert chosen(a_point(24, 1.0, 0.9), agreement=1.0)["certificate"]["certified"] == []


def test_means_are_all_that_a_certificate_takes() -> None:
    losses = np.random.default_rng(1).random((3, 800)) * np.array([[0.01], [0.05], [0.2]])
    grid = np.array([0.9, 0.8, 0.7])
    whole = certify(grid, losses, risk=0.08, confidence=0.95)
    again = certify_means(grid, losses.mean(axis=1), sequences=800, risk=0.08, confidence=0.95)
    assert whole.certified == again.certified == 2
    assert again.p_values == pytest.approx(whole.p_values)
    with pytest.raises(ValueError, match="expected 3 mean losses, got shape"):
        certify_means(grid, np.zeros(2), sequences=8, risk=0.1, confidence=0.9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"loss": 1.5, "sequences": 3, "confidence": 0.9}, "mean loss in"),
        ({"loss": 0.5, "sequences": 0, "confidence": 0.9}, "at least one sequence"),
        ({"loss": 0.5, "sequences": 3, "confidence": 1.0}, "expected a confidence"),
    ],
)
def test_a_bound_refuses_what_cannot_be(arguments: Row, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        risk_bound(arguments.pop("loss"), **arguments)
    assert risk_bound(0.9, sequences=1, confidence=0.99) == 1.0


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Wish(1.5), "expected a share of agreement in 0..1, got 1.5"),
        (Wish(float("nan")), "expected a share of agreement in 0..1, got nan"),
        (Wish(0.9, risk=0.0), "expected a risk between 0 and 1, got 0"),
        (Wish(0.9, risk=1e-9), "expected a risk of at least 1e-06"),
        (Wish(0.9, confidence=1.0), "expected a confidence between 0 and 1, got 1"),
    ],
)
def test_a_wish_that_cannot_be_meant_is_refused(wish: Wish, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        wish.check()


def test_a_record_holds_no_nan_and_numbers_its_points_in_order() -> None:
    parts = {"provenance": {}, "settings": {"seed": 0}, "sources": [], "full": {"sequences": 32}}
    points = [a_point(28, 0.97, 0.9), a_point(24, 0.97, None, confirmed_by="table")]
    record = search_record(parts, points, [], Wish())
    assert [row["exit_layer"] for row in record["points"]] == [24, 28]
    assert record["best"] == 1
    assert record["settings"] == {"agreement": 0.95, "risk": 0.05, "confidence": 0.95, "seed": 0}
    assert to_json(record)
