"""The choice of an exit layer from constructed points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.build_points import a_point, no_threshold
from support.build_searches import a_search_origin

from cascade.core.errors import UsageError
from cascade.core.records import to_json
from cascade.core.schema import to_plain
from cascade.evaluation.search.choice import Choice, SearchConfig, choose, search_record
from cascade.evaluation.search.records import NoThreshold, TriedPoint
from cascade.stats.certificates import certify, certify_means, hoeffding_p_value, risk_bound


def chosen(
    *points: TriedPoint, sequences: int = 32, nothing: tuple[NoThreshold, ...] = (), **config: Any
) -> Choice:
    return choose(points, nothing, SearchConfig(**config), sequences=sequences)


def test_best_is_cheapest_point_with_confirmed_agreement() -> None:
    points = (
        a_point(20, 0.90, 0.7),
        a_point(24, 0.955, 0.9),
        a_point(26, 0.97, 0.95),
        a_point(28, 0.99, 0.98),
    )
    found = chosen(*points)
    assert (found.best, found.best_beyond_doubt) == (1, 2)
    assert [row.outcome for row in found.points] == ["lost", "kept", "significant", "significant"]
    assert found.verdict.exit is True
    assert found.verdict.headline == (
        "Exit at layer 24, cosine >= 0.9 with the ridge head. It predicts 95.5 % of all tokens as "
        "the full model does (target: 95.0 %), at 0.900 x the full model's operations and "
        "0.90 x its time (0.89 to 0.91)."
    )
    (also,) = found.verdict.also
    assert "94.5 % to 96.5 %, starts below the target of 95.0 %" in also
    assert "The cheapest one whose whole interval keeps it is layer 26" in also


def test_exact_agreement_is_kept() -> None:
    point = a_point(24, 0.95, 0.9, half=0.0)
    assert chosen(point).best_beyond_doubt == 0


def test_significantly_faster_points_come_before_those_with_fewer_operations() -> None:
    slow = a_point(20, 0.97, 0.8, seconds=(0.98, 0.95, 1.01))
    assert chosen(slow, a_point(24, 0.97, 0.9)).best == 1
    assert chosen(slow).best == 0


@pytest.mark.parametrize(
    ("point", "words"),
    [
        (
            a_point(28, 0.97, 1.08),
            "No early exit that keeps 95.0 % agreement takes fewer operations than the full "
            "model. The cheapest one is layer 28",
        ),
        (
            a_point(28, 0.97, 0.99, seconds=(0.99, 0.97, 1.01)),
            "No early exit that keeps 95.0 % agreement is significantly faster than the full "
            "model. The cheapest one is layer 28",
        ),
        (a_point(28, 0.94, 0.9), "No measured point keeps 95.0 % agreement. The nearest one is "),
    ],
)
def test_headline_without_savings(point: TriedPoint, words: str) -> None:
    verdict = chosen(point).verdict
    assert verdict.exit is False
    assert verdict.headline.startswith(words)
    assert "layer 28, cosine >= 0.9 with the ridge head" in verdict.headline


def test_headline_without_thresholds() -> None:
    found = chosen(nothing=(no_threshold(2),))
    assert found.verdict.headline.startswith("No early exit keeps 95.0 % agreement. No layer")
    assert (found.best, found.nearest) == (None, None)
    assert [row.fitted for row in found.pairs] == [None]


def test_point_that_is_no_candidate_is_neither_chosen_nor_tested() -> None:
    found = chosen(a_point(20, 0.99, 0.5, candidate=False), a_point(24, 0.96, 0.9))
    assert found.best == 1
    assert found.certificate.tested == 1


def test_point_on_table_is_never_best_but_mentioned_if_cheaper() -> None:
    table = a_point(20, 0.99, 0.5, confirmed_by="table")
    found = chosen(table, a_point(24, 0.97, 0.9))
    assert (found.best, found.best_on_table) == (1, 0)
    (also,) = found.verdict.also
    assert also.startswith("By the table, layer 20")
    assert "--measure runs it" in also
    assert (found.points[0].risk_bound, found.points[0].certified) == (None, None)
    alone = chosen(a_point(20, 0.99, 0.5, confirmed_by="table"))
    assert alone.verdict.exit is False
    assert alone.best is None
    exact = chosen(a_point(20, 0.99, 0.5, confirmed_by="exact table"))
    assert exact.best == 0


def test_each_variant_names_lowest_fitted_and_kept_thresholds() -> None:
    found = chosen(
        a_point(24, 0.93, 0.8, threshold=0.5),
        a_point(24, 0.955, 0.9, threshold=0.6),
        a_point(24, 0.99, 0.95, threshold=0.7),
        a_point(24, 0.995, 0.97, threshold=0.8),
        a_point(28, 0.93, 0.95, threshold=0.5),
    )
    first, second = found.pairs
    assert [first.fitted, first.kept, first.beyond_doubt] == [0, 1, 2]
    assert [second.fitted, second.kept, second.beyond_doubt] == [4, None, None]


# --- Certificates ----------------------------------------------------------------------------


def test_risk_bounds_share_error_among_tested_points() -> None:
    points = [a_point(layer, 0.97, 0.9) for layer in (20, 22, 24, 26)]
    found = chosen(*points, sequences=1000)
    for row in found.points:
        assert row.risk_bound is not None
        # At its bound, a hypothesis is just rejected at a quarter of the error.
        p_value = hoeffding_p_value(0.03, sequences=1000, risk=row.risk_bound)
        assert p_value == pytest.approx(0.05 / 4)
    assert found.certificate.confidence_each == pytest.approx(1 - 0.05 / 4)


@pytest.mark.parametrize(("points", "certified"), [(1, True), (40, False)])
def test_certificate_needs_more_sequences_for_more_thresholds(points: int, certified: bool) -> None:
    tried = [a_point(layer, 1.0, 0.9) for layer in range(1, points + 1)]
    found = chosen(*tried, sequences=700)  # 600 suffice for one threshold at risk 0.05
    assert [row.certified for row in found.points] == [certified] * points
    assert (found.certificate.best is not None) is certified
    assert found.certificate.sequences_needed is not None
    assert (found.certificate.sequences_needed <= 700) is certified


def test_certificate_matches_learn_then_test_at_shared_error() -> None:
    losses = np.random.default_rng(0).random((1, 1300)) * 0.02
    mean = float(losses.mean())
    point = a_point(24, 1 - mean, 0.9)
    found = chosen(point, a_point(28, 0.5, 0.95), sequences=1300)
    expected = certify(np.array([0.9]), losses, risk=0.05, confidence=1 - 0.05 / 2)
    assert found.points[0].certified is (expected.certified == 1) is True
    assert found.certificate.certified == [0]


def test_default_risk_is_one_minus_agreement() -> None:
    assert SearchConfig(0.95).bound == 0.05
    assert SearchConfig(0.95, risk=0.2).bound == 0.2
    assert SearchConfig(1.0).bound is None
    assert SearchConfig(0.0).bound is None
    assert chosen(a_point(24, 1.0, 0.9), agreement=1.0).certificate.certified == []


def test_mean_losses_certify_same_thresholds_as_all_losses() -> None:
    losses = np.random.default_rng(1).random((3, 800)) * np.array([[0.01], [0.05], [0.2]])
    grid = np.array([0.9, 0.8, 0.7])
    expected = certify(grid, losses, risk=0.08, confidence=0.95)
    again = certify_means(grid, losses.mean(axis=1), sequences=800, risk=0.08, confidence=0.95)
    assert expected.certified == again.certified == 2
    assert again.p_values == pytest.approx(expected.p_values)
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
def test_risk_bound_rejects_arguments_out_of_range(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        risk_bound(arguments.pop("loss"), **arguments)
    assert risk_bound(0.9, sequences=1, confidence=0.99) == 1.0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SearchConfig(1.5), "expected a share of agreement in 0..1, got 1.5"),
        (SearchConfig(float("nan")), "expected a share of agreement in 0..1, got nan"),
        (SearchConfig(0.9, risk=0.0), "expected a risk between 0 and 1, got 0"),
        (SearchConfig(0.9, risk=1e-9), "expected a risk of at least 1e-06"),
        (SearchConfig(0.9, confidence=1.0), "expected a confidence between 0 and 1, got 1"),
    ],
)
def test_invalid_config_is_rejected(config: SearchConfig, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config.check()


def test_record_survives_round_trip_with_ordered_points() -> None:
    points = [a_point(28, 0.97, 0.9), a_point(24, 0.97, None, confirmed_by="table")]
    record = search_record(a_search_origin(), points, [], SearchConfig())
    assert [row.exit_layer for row in record.points] == [24, 28]
    assert record.best == 1
    assert to_json(to_plain(record))
