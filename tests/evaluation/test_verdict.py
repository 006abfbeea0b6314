"""The verdict on early exit for constructed rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.reference_early_exit import one_line

from cascade.core.errors import RecordError
from cascade.core.records import to_json
from cascade.core.schema import UNSET, SchemaError, from_plain, to_plain
from cascade.evaluation.records import ControlPoints, OperatingPointRow, Verdict, WantedQuality
from cascade.evaluation.verdict import CONTROLS, judge, of_quality

WANTED = WantedQuality(agreement=0.95, perplexity_ratio=1.05)

Row = OperatingPointRow


def row(rule: str = "cosine", layer: int = 24, **figures: Any) -> Row:
    """Return a point that is good enough and faster, with changed figures and their intervals."""
    found = {
        "exit_layer": layer,
        "rule": rule,
        "head": "ridge",
        "threshold": 0.95,
        "threshold_from": "hard ratio 0.7",
        "exit_share": 0.3,
        "agreement": 0.97,
        "exit_agreement": 0.9,
        "perplexity": 40.0,
        "perplexity_ratio": 1.02,
        "hard_perplexity_ratio": 1.01,
        "kl": 0.1,
        "layers_per_token": 28.0,
        "flops_ratio": 0.9,
        "seconds_ratio": 0.9,
    } | figures
    for name, around in (("agreement", 0.01), ("perplexity_ratio", 0.01), ("seconds_ratio", 0.02)):
        value = found[name]
        found.setdefault(f"{name}_interval", [value - around, value + around])
    return OperatingPointRow(**found)


GOOD = row()
RANDOM = row("random", agreement=0.9, perplexity_ratio=1.1)
STATIC = row("fixed", exit_share=1.0, agreement=0.7, perplexity_ratio=1.5, seconds_ratio=0.8)
ORACLE = row("oracle", exit_share=0.8, agreement=1.0, seconds_ratio=1.1)
CONTROL_ROWS = [RANDOM, STATIC, ORACLE]


def verdict(*rows: Row) -> Verdict:
    found = judge(rows, WANTED)
    assert found.wanted == WANTED
    to_json(to_plain(found))
    assert "\n" not in found.headline
    assert found.headline.endswith(".")
    assert found.use == found.headline.startswith("Use early exit here: ")
    assert found.use != found.headline.startswith("Do not use early exit here: ")
    return found


def test_points_of_quality_are_those_of_the_verdict_the_fastest_first() -> None:
    rows = [
        row(seconds_ratio=0.95),
        row(layer=20, seconds_ratio=0.7),
        row(seconds_ratio=0.5, agreement=0.6),
        row(seconds_ratio=0.5, perplexity_ratio=1.5),
        row(seconds_ratio=0.5, exit_share=0.0),
        *CONTROL_ROWS,
    ]
    assert of_quality(rows, WANTED) == [1, 0]
    assert verdict(*rows).good_enough == 1
    assert of_quality(CONTROL_ROWS, WANTED) == []


# --- Points worth using ----------------------------------------------------------------------


def test_point_that_passes_all_checks_is_used() -> None:
    found = verdict(GOOD, *CONTROL_ROWS)
    assert found.use
    assert found.point == found.good_enough == found.faster == 0
    assert found.failed == []
    assert found.against == ControlPoints(random=1, static=2, oracle=3)
    assert found.headline == (
        "Use early exit here: layer 24, cosine >= 0.95 with the ridge head, 30.0 % of the tokens "
        "exit."
    )
    assert found.reasons == [
        "97.0 % of all tokens have the full model's prediction (96.0 % to 98.0 %; target: 95.0 %)",
        "perplexity is 1.020 x the full model's (1.010 to 1.030; target: at most 1.050)",
        "scoring takes 0.90 x the full model's time (0.88 to 0.92), 0.90 x its operations",
        "random exit of 30.0 % at the same layer: perplexity 1.100 x, agreement 90.0 % (the "
        "point is better in agreement and perplexity)",
        "static exit at layer 24, 0.80 x the time: perplexity 1.500 x, agreement 70.0 %",
    ]


def test_fastest_of_several_good_points_is_used() -> None:
    slower, faster = row(seconds_ratio=0.95), row(layer=20, seconds_ratio=0.7)
    assert verdict(GOOD, slower, faster, *CONTROL_ROWS).point == 2


def test_faster_failing_point_does_not_prevent_use() -> None:
    found = verdict(row(seconds_ratio=0.5, agreement=0.6), GOOD, *CONTROL_ROWS)
    assert (found.use, found.point, found.faster) == (True, 1, 1)


# --- Single failed checks --------------------------------------------------------------------

EDGES = {
    "agreement at the wanted one": ({"agreement": 0.95}, []),
    "agreement just below it": ({"agreement": 0.9499}, ["agreement"]),
    "perplexity at the wanted one": ({"perplexity_ratio": 1.05}, []),
    "perplexity just above it": ({"perplexity_ratio": 1.0501}, ["perplexity"]),
    "slower": ({"seconds_ratio": 1.2}, ["speed"]),
    "an interval that straddles 1": ({"seconds_ratio_interval": [0.8, 1.001]}, ["speed"]),
    "an interval that ends at 1": ({"seconds_ratio_interval": [0.8, 1.0]}, ["speed"]),
    "no interval": ({"seconds_ratio_interval": None}, ["speed"]),
    "faster by the clock, but with more operations": ({"flops_ratio": 1.01}, ["speed"]),
    "everything": (
        {"agreement": 0.2, "perplexity_ratio": 9.0, "seconds_ratio": 2.0},
        ["agreement", "perplexity", "speed", "random", "static"],
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_failed_names_single_failed_check(name: str) -> None:
    changes, failed = EDGES[name]
    found = verdict(row(**changes), *CONTROL_ROWS)
    assert found.failed == failed
    assert found.use == (not failed)
    assert found.point == 0
    assert len(found.reasons) == 5


def test_reason_says_that_one_batch_gives_no_interval() -> None:
    found = verdict(row(seconds_ratio_interval=None), *CONTROL_ROWS)
    assert found.reasons[2] == (
        "scoring takes 0.90 x the full model's time (no interval: one batch), 0.90 x its "
        "operations; one batch gives no interval, use a smaller --batch-size or more text"
    )
    assert "none is significantly faster" in found.headline


@pytest.mark.parametrize(
    ("control", "beaten"),
    [
        ({"agreement": 0.9, "perplexity_ratio": 1.1}, "agreement and perplexity"),
        # Significantly better in one measure is enough; a separate check limits the other.
        ({"agreement": 0.9, "perplexity_ratio": 1.0}, "agreement only"),
        ({"agreement": 0.99, "perplexity_ratio": 1.1}, "perplexity only"),
        # Differences within the interval: the rule carries no information.
        ({"agreement": 0.97, "perplexity_ratio": 1.02}, "neither measure"),
        ({"agreement": 0.965, "perplexity_ratio": 1.025}, "neither measure"),
        ({"agreement": 0.99, "perplexity_ratio": 1.0}, "neither measure"),
    ],
)
def test_rule_must_beat_random_exit_significantly(control: dict[str, float], beaten: str) -> None:
    found = verdict(GOOD, row("random", **control))
    assert found.reasons[3].endswith(f"(the point is better in {beaten})")
    assert found.use == (beaten != "neither measure")
    if beaten == "neither measure":
        assert found.failed == ["random"]
        assert found.headline == (
            "Do not use early exit here: layer 24, cosine >= 0.95 is good enough and faster, but "
            "no better than exiting at random."
        )


@pytest.mark.parametrize(
    ("control", "passes"),
    [
        ({"agreement": 0.96, "perplexity_ratio": 1.01, "seconds_ratio": 0.8}, True),
        ({"agreement": 0.98, "perplexity_ratio": 1.03, "seconds_ratio": 0.8}, True),
        ({"agreement": 0.97, "perplexity_ratio": 1.02, "seconds_ratio": 0.9}, False),
        ({"agreement": 0.98, "perplexity_ratio": 1.01, "seconds_ratio": 0.9}, False),
        # Better, but slower, so it does not count.
        ({"agreement": 0.98, "perplexity_ratio": 1.01, "seconds_ratio": 0.91}, True),
    ],
)
def test_static_layer_must_not_perform_as_well_in_same_time(
    control: dict[str, float], passes: bool
) -> None:
    found = verdict(GOOD, row("fixed", layer=28, **control))
    assert found.use == passes
    if not passes:
        assert found.failed == ["static"]
        assert "no better than one static layer for all tokens." in found.headline


def test_headline_names_both_controls() -> None:
    found = verdict(GOOD, row("random"), row("fixed"))
    assert found.failed == ["random", "static"]
    assert "than exiting at random or one static layer for all tokens." in found.headline


# --- Controls --------------------------------------------------------------------------------


def test_random_control_has_same_layer_and_nearest_exit_share() -> None:
    rows = [
        GOOD,
        row("random", layer=28, exit_share=0.3),
        row("random", exit_share=0.7),
        row("random", exit_share=0.35),
        row("random", exit_share=0.1),
    ]
    assert judge(rows, WANTED).against.random == 3


def test_dominating_static_layer_is_preferred_to_higher_agreement() -> None:
    rows = [
        GOOD,
        # Deeper and with higher agreement, but it does not dominate because of its perplexity.
        row("fixed", layer=29, agreement=0.99, perplexity_ratio=1.04, seconds_ratio=0.85),
        row("fixed", layer=28, agreement=0.975, perplexity_ratio=1.01, seconds_ratio=0.85),
    ]
    found = judge(rows, WANTED)
    assert found.against.static == 2
    assert found.failed == ["static"]


def test_missing_controls_do_not_fail_checks() -> None:
    found = verdict(GOOD)
    assert found.use
    assert found.against == ControlPoints(random=None, static=None, oracle=None)
    assert len(found.reasons) == 3


# --- Nearest points --------------------------------------------------------------------------


def test_headline_names_best_slow_and_best_fast_point() -> None:
    rows = [
        row(layer=24, agreement=0.82, seconds_ratio=0.8),
        row(layer=26, agreement=0.89, seconds_ratio=0.9),
        row(layer=28, agreement=0.96, seconds_ratio=1.01),
        row(layer=29, agreement=0.99, seconds_ratio=1.2),
        *CONTROL_ROWS,
    ]
    found = verdict(*rows)
    assert (found.point, found.good_enough, found.faster) == (2, 2, 1)
    assert found.failed == ["speed"]
    assert found.headline == (
        "Do not use early exit here: operating points that are good enough are not significantly "
        "faster (best: layer 28, cosine >= 0.95, 1.01 x the full model's time (0.99 to 1.03)), and "
        "faster ones are not good enough (best: layer 26, cosine >= 0.95, perplexity 1.020 x, "
        "agreement 89.0 %)."
    )


def test_nearest_point_does_not_depend_on_number_of_passed_checks() -> None:
    # One point fails only agreement, by far. The other barely fails speed and both controls.
    far = row(agreement=0.5, seconds_ratio=0.8)
    near = row(agreement=0.951, perplexity_ratio=1.05, seconds_ratio=1.001)
    controls = [row("random", agreement=0.96), row("fixed", agreement=0.96)]
    found = verdict(far, near, *controls)
    assert (found.point, found.good_enough, found.faster) == (1, 1, 0)


def test_headline_without_faster_points() -> None:
    found = verdict(row(seconds_ratio=1.3), row(layer=28, seconds_ratio=1.1), *CONTROL_ROWS)
    assert (found.point, found.good_enough, found.faster) == (1, 1, None)
    assert (
        "some operating points are good enough, but none is significantly faster" in found.headline
    )
    assert "layer 28" in found.headline


def test_nearest_point_has_smallest_shortfall() -> None:
    rows = [
        row(layer=20, agreement=0.94, perplexity_ratio=3.0, seconds_ratio=0.7),
        row(layer=24, agreement=0.90, perplexity_ratio=1.06, seconds_ratio=1.5),
        row(layer=28, agreement=0.60, perplexity_ratio=1.01, seconds_ratio=0.9),
    ]
    found = verdict(*rows, *CONTROL_ROWS)
    assert (found.point, found.good_enough, found.faster) == (1, None, 2)
    assert found.headline == (
        "Do not use early exit here: no operating point is good enough (nearest: layer 24, "
        "cosine >= 0.95, perplexity 1.060 x, agreement 90.0 %)."
    )


def test_huge_perplexity_is_shown_in_scientific_notation() -> None:
    found = verdict(row(perplexity_ratio=1e300, perplexity_ratio_interval=[1e299, 1e300]))
    assert "perplexity 1.0e+300 x (+690.8 nats per token)" in found.headline


@pytest.mark.parametrize(
    "rows", [[], CONTROL_ROWS, [row(exit_share=0.0, agreement=1.0, seconds_ratio=0.99)]]
)
def test_verdict_without_exited_tokens_has_no_point(rows: list[Row]) -> None:
    found = verdict(*rows)
    assert not found.use
    assert found.point is None
    assert found.reasons == found.failed == []
    assert "no token exited" in found.headline


def test_point_without_exits_is_not_nearest() -> None:
    disguised = row(exit_share=0.0, agreement=1.0, perplexity_ratio=1.0, seconds_ratio=1.0)
    assert verdict(disguised, row(seconds_ratio=1.1)).point == 1


# --- Rows that cannot be judged --------------------------------------------------------------


FIGURES = ["agreement", "perplexity_ratio", "exit_share", "flops_ratio", "seconds_ratio"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("rule", ["cosine", "random"])
def test_non_finite_figure_error_names_point(rule: str, name: str, value: Any) -> None:
    with pytest.raises(RecordError, match="evaluate again") as error:
        judge([GOOD, replace(row(rule), **{name: value})], WANTED)
    assert f"point 1 ({rule} at layer 24)" in one_line(error)


#: Null stands for a perplexity ratio that no number holds.
BROKEN = [
    (name, value)
    for name in FIGURES
    for value in (math.nan, math.inf, None, "0.9", "absent")
    if (name, value) != ("perplexity_ratio", None)
]


@pytest.mark.parametrize(("name", "value"), BROKEN)
def test_non_finite_figure_in_file_is_rejected(name: str, value: Any) -> None:
    broken = to_plain(GOOD) | {name: value}
    if value == "absent":
        del broken[name]
    with pytest.raises(SchemaError, match=name):
        from_plain(broken, OperatingPointRow)


@pytest.mark.parametrize("name", ["agreement", "perplexity_ratio", "seconds_ratio"])
def test_interval_with_nan_is_rejected(name: str) -> None:
    with pytest.raises(RecordError, match="got NaN or infinity"):
        judge([replace(GOOD, **{f"{name}_interval": [0.9, math.nan]})], WANTED)


def test_the_interval_of_agreement_is_needed_and_others_are_optional() -> None:
    with pytest.raises(SchemaError, match="agreement_interval"):
        from_plain(to_plain(GOOD) | {"agreement_interval": None}, OperatingPointRow)
    for name in ("seconds_ratio", "perplexity_ratio"):
        from_plain(to_plain(GOOD) | {f"{name}_interval": None}, OperatingPointRow)


def overflowing(nats: float, **figures: Any) -> OperatingPointRow:
    """Return a row whose perplexity ratio no number holds."""
    nothing = {"perplexity_ratio": None, "perplexity_ratio_interval": None}
    given = nothing | {"nats_difference": nats, "nats_difference_interval": [nats - 9, nats + 9]}
    return replace(row(**figures), **given)


def test_a_ratio_beyond_numbers_is_judged_and_named_in_nats() -> None:
    found = verdict(overflowing(1234.4))
    assert "perplexity +1,234 nats per token, agreement" in found.headline
    assert "perplexity" in found.failed
    (reason,) = [text for text in found.reasons if "nats" in text]
    assert reason.startswith(
        "perplexity is +1,234 nats per token relative to the full model's (+1,2"
    )
    # Of two such points the one with the smaller loss is nearer.
    assert verdict(overflowing(2000.0), overflowing(900.0, layer=20)).point == 1
    assert "perplexity" not in verdict(overflowing(-1234.4)).failed
    with pytest.raises(RecordError, match="evaluate again"):
        judge([replace(overflowing(1234.4), nats_difference=UNSET)], WANTED)


# --- Laws ------------------------------------------------------------------------------------

points = st.builds(
    row,
    st.sampled_from(["cosine", "top2_gap", *CONTROLS]),
    st.sampled_from([20, 24]),
    agreement=st.sampled_from([0.5, 0.94, 0.95, 0.99, 1.0]),
    perplexity_ratio=st.sampled_from([0.9, 1.0, 1.05, 1.2, 8.0]),
    seconds_ratio=st.sampled_from([0.5, 0.97, 0.99, 1.0, 1.3]),
    flops_ratio=st.sampled_from([0.8, 1.0, 1.1]),
    exit_share=st.sampled_from([0.0, 0.3, 1.0]),
)


@given(st.lists(points, max_size=8))
@settings(max_examples=300)
def test_use_if_and_only_if_a_point_passes_all_checks(
    rows: list[Row],
) -> None:
    found = judge(rows, WANTED)

    def keeps(at: Row) -> bool:
        return bool(
            at.rule not in CONTROLS
            and at.exit_share > 0
            and at.agreement >= 0.95
            and at.perplexity_ratio <= 1.05
            and (at.seconds_ratio_interval or [0, 1])[1] < 1
            and at.flops_ratio < 1
        )

    keeping = [number for number, at in enumerate(rows) if keeps(at)]
    if found.use:
        assert found.point in keeping
        assert found.failed == []
    elif keeping:  # then only a control fails
        assert found.point in keeping
        assert set(found.failed) <= {"random", "static"}
    assert found.use == (found.point is not None and not found.failed)
    if found.point is not None:
        assert rows[found.point].rule not in CONTROLS
    for name in ("good_enough", "faster"):
        number = getattr(found, name)
        assert number is None or rows[number].rule not in CONTROLS


@given(st.lists(points, max_size=6), st.integers(0, 5))
def test_order_of_rows_changes_only_indices(rows: list[Row], turn: int) -> None:
    turned = rows[turn:] + rows[:turn]
    assert judge(rows, WANTED).use == judge(turned, WANTED).use
