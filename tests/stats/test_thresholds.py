"""Properties of fitted thresholds, and the guarantee of certificates."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cascade.stats.certificates import (
    Certificate,
    certify,
    hoeffding_p_value,
    sequences_needed,
    too_few,
)
from cascade.stats.thresholds import fit_threshold, quantile_threshold, transfer

Values = npt.NDArray[Any]

GOOD = np.zeros((2, 3))
GRID = np.array([0.9, 0.8])

#: The minimum is enough for properties that hold for any resamples.
FEW = 39

shapes = st.tuples(st.integers(2, 6), st.integers(1, 7))
ratios = st.floats(0, 1)
#: Distinct fp32 numbers, including adjacent and denormal ones.
distinct = arrays(np.float32, shapes, elements=st.floats(-1, 1, width=32), unique=True)
#: Distinct numbers whose quantiles never round to one of them.
spread = st.one_of(
    arrays(dtype, shapes, elements=st.integers(-5000, 5000), unique=True)
    for dtype in (np.float32, np.float64)
)
tied = arrays(np.float64, shapes, elements=st.sampled_from([-0.5, 0.0, 0.25, 0.75]))
levels = st.floats(0.05, 0.95)


@st.composite
def experiments(draw: st.DrawFn) -> tuple[Values, Values]:
    """Return strictly decreasing thresholds `[J]` and losses `[J, S]` of 0, 0.5 and 1."""
    rates = np.array(draw(st.lists(st.floats(0, 1), min_size=1, max_size=8)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    losses = rng.binomial(2, rates[:, None], (len(rates), draw(st.integers(1, 80)))) / 2
    return np.linspace(0.99, 0.8, len(rates)), losses


def attainable_ratios(values: Values) -> Values:
    """Return the hard ratios that some threshold gives."""
    return np.array([(values < value).mean() for value in np.unique(values)] + [1.0])


def correlated(sequences: int, tokens: int, rng: np.random.Generator) -> Values:
    """Return standard normal confidences, half of whose variance is between sequences."""
    own = rng.normal(size=(sequences, 1)) + rng.normal(size=(sequences, tokens))
    return own / math.sqrt(2)


@given(spread, ratios)
def test_threshold_without_ties_is_the_numpy_quantile(values: Values, hard_ratio: float) -> None:
    fitted = fit_threshold(values, hard_ratio, resamples=FEW)
    if hard_ratio < 1:
        assert fitted.threshold == np.quantile(values, hard_ratio)


@given(distinct, ratios)
@settings(max_examples=300)
def test_reached_ratio_without_ties_is_within_one_token_of_the_target(
    values: Values, hard_ratio: float
) -> None:
    fitted = fit_threshold(values, hard_ratio, resamples=FEW)
    # 1e-12 allows for rounding of the two ratios.
    assert abs(fitted.reached - hard_ratio) <= 1 / values.size + 1e-12
    assert fitted.reached == (values < fitted.threshold).sum() / values.size
    assert fitted.ties == (values == fitted.threshold).sum()


@given(tied, ratios)
@settings(max_examples=300)
def test_reached_ratio_is_the_closest_attainable_if_every_value_is_tied(
    values: Values, hard_ratio: float
) -> None:
    values = np.concatenate([values, values])
    fitted = fit_threshold(values, hard_ratio, resamples=FEW)
    distance = np.abs(attainable_ratios(values) - hard_ratio)
    assert abs(fitted.reached - hard_ratio) <= distance.min() + 1e-12
    assert fitted.reached == (values < fitted.threshold).mean()
    assert fitted.ties == (values == fitted.threshold).sum()


@given(tied, ratios)
def test_no_threshold_is_closer_by_more_than_a_token_with_ties(
    values: Values, hard_ratio: float
) -> None:
    fitted = fit_threshold(values, hard_ratio, resamples=FEW)
    distance = np.abs(attainable_ratios(values) - hard_ratio)
    assert abs(fitted.reached - hard_ratio) <= distance.min() + 1 / values.size + 1e-12


def test_tied_tokens_go_to_the_side_closer_to_the_target() -> None:
    # With 2 tokens below 0.5, 6 at 0.5 and 2 above, the possible shares of hard tokens are 0, 0.1,
    # 0.2, 0.8, 0.9 and 1.
    values = np.array([[0.1, 0.2, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.8, 0.9]])
    lower, upper = (fit_threshold(values, ratio, resamples=FEW) for ratio in (0.45, 0.55))
    assert (lower.threshold, lower.reached, lower.ties) == (0.5, 0.2, 6)
    assert (upper.threshold, upper.reached, upper.ties) == (0.8, 0.8, 1)


@given(st.one_of(distinct, spread, tied), ratios, ratios)
@settings(max_examples=300)
def test_thresholds_grow_with_the_hard_ratio(values: Values, one: float, two: float) -> None:
    low, high = (fit_threshold(values, q, resamples=FEW) for q in sorted([one, two]))
    assert low.threshold <= high.threshold
    assert low.reached <= high.reached
    for end in (0, 1):
        assert low.threshold_interval[end] <= high.threshold_interval[end]


@given(st.one_of(distinct, tied))
def test_all_tokens_exit_at_ratio_0_and_none_at_ratio_1(values: Values) -> None:
    everything, nothing = (fit_threshold(values, ratio, resamples=FEW) for ratio in (0, 1))
    assert everything.threshold == values.min()
    assert everything.reached == 0
    assert nothing.threshold == np.nextafter(values.max(), np.inf, dtype=values.dtype)
    assert nothing.reached == 1
    # The model compares in the precision of the confidences.
    assert (values < values.dtype.type(nothing.threshold)).all()


@given(st.one_of(distinct, tied), ratios, st.data())
def test_thresholds_do_not_depend_on_the_order_of_sequences_and_tokens(
    values: Values, hard_ratio: float, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(values))))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    losses = rng.uniform(size=len(values))
    shuffled = np.asfortranarray(rng.permuted(values[order], axis=1))
    fitted = fit_threshold(values, hard_ratio, resamples=FEW)
    assert fit_threshold(shuffled, hard_ratio, resamples=FEW) == fitted
    moved = transfer(0.1, values, losses, resamples=FEW)
    assert transfer(0.1, shuffled, losses[order], resamples=FEW) == moved


@given(st.one_of(distinct, tied), ratios)
def test_transfer_to_the_fitted_corpus_gives_the_reached_ratio(
    values: Values, hard_ratio: float
) -> None:
    fitted = fit_threshold(values, hard_ratio, resamples=FEW)
    assert transfer(fitted.threshold, values, resamples=FEW).hard_ratio == fitted.reached


@given(st.one_of(distinct, tied), ratios, st.integers(0, 5))
@settings(max_examples=50)
def test_intervals_equal_those_of_refitted_resamples(
    values: Values, hard_ratio: float, seed: int
) -> None:
    rows = np.array(sorted(np.sort(values, axis=1).tolist()), dtype=values.dtype)
    fitted = fit_threshold(values, hard_ratio, resamples=FEW, seed=seed)
    drawn = np.random.default_rng(seed).integers(len(rows), size=(FEW, len(rows)))
    refitted = [fit_threshold(rows[d], hard_ratio, resamples=FEW).threshold for d in drawn]
    realized = [(rows[d] < fitted.threshold).mean() for d in drawn]
    # The interval of 39 resamples ends at their smallest and largest value.
    assert fitted.threshold_interval == (min(refitted), max(refitted))
    assert fitted.reached_interval == (min(realized), max(realized))


def covers(interval: tuple[float, float] | None, truth: float) -> bool:
    assert interval is not None
    return interval[0] <= truth <= interval[1]


def test_intervals_cover_the_truth_for_correlated_tokens() -> None:
    """Resampling tokens, as if each were its own sequence, covers the truth far too rarely."""
    rng = np.random.default_rng(10)
    hard_ratio, truth = 0.3, -0.5244005127080409  # the 0.3 quantile of the standard normal
    by_sequence, by_token = np.zeros(4), 0
    runs = 600
    for run in range(runs):
        values = correlated(60, 12, rng)
        fitted = fit_threshold(values, hard_ratio, resamples=99, seed=run)
        moved = transfer(truth, values, values.mean(axis=1), resamples=99, seed=run)
        by_sequence += [
            covers(fitted.threshold_interval, truth),
            covers(fitted.reached_interval, (1 + math.erf(fitted.threshold / math.sqrt(2))) / 2),
            covers(moved.hard_ratio_interval, hard_ratio),
            covers(moved.loss_interval, 0),
        ]
        if run % 4 == 0:
            alone = fit_threshold(values.reshape(-1, 1), hard_ratio, resamples=99, seed=run)
            by_token += covers(alone.threshold_interval, truth)
    # With other seeds, resampled sequences covered 0.94 to 0.955 in 4 x 1,500 runs, and resampled
    # tokens 0.6 in 300 runs. Three standard deviations are 0.03 for 600 runs and 0.12 for 150.
    assert by_sequence.min() / runs >= 0.91
    assert by_sequence.max() / runs <= 0.985
    assert by_token / (runs / 4) <= 0.72


def test_transfer_reports_hard_ratio_and_loss_of_the_other_corpus() -> None:
    values = np.array([[0.1, 0.9], [0.2, 0.3], [0.8, 0.9], [0.5, 0.4]])
    moved = transfer(0.5, values, np.array([0.0, 0.125, 0.375, 0.5]), resamples=999)
    assert (moved.threshold, moved.hard_ratio, moved.loss, moved.sequences) == (0.5, 0.5, 0.25, 4)
    assert moved.hard_ratio_interval[0] < 0.5 < moved.hard_ratio_interval[1]
    assert moved.loss_interval is not None
    assert 0 <= moved.loss_interval[0] < 0.25 < moved.loss_interval[1] <= 0.5
    without = transfer(0.5, values, resamples=999)
    assert (without.loss, without.loss_interval) == (None, None)
    assert without.hard_ratio == moved.hard_ratio


@pytest.mark.parametrize(("threshold", "expected"), [(-math.inf, 0.0), (math.inf, 1.0)])
def test_transfer_of_an_infinite_threshold(threshold: float, expected: float) -> None:
    moved = transfer(threshold, np.zeros((3, 2)), resamples=FEW)
    assert moved.hard_ratio == expected
    assert moved.hard_ratio_interval == (expected, expected)


def test_threshold_is_not_rounded_down_to_fp32() -> None:
    # The fp32 number nearest to 0.7 is below 0.7, so the token continues, as in the model.
    values = np.full((2, 3), 0.7, np.float32)
    assert float(values[0, 0]) < 0.7
    assert transfer(0.7, values, resamples=FEW).hard_ratio == 1


def test_seed_affects_only_the_intervals() -> None:
    values = correlated(20, 5, np.random.default_rng(3))
    one, again, other = (fit_threshold(values, 0.4, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one.threshold == other.threshold
    assert one.threshold_interval != other.threshold_interval


def test_fit_on_511_sequences_takes_less_than_three_seconds() -> None:
    values = correlated(511, 128, np.random.default_rng(0)).astype(np.float32)
    start = time.perf_counter()
    fit_threshold(values, 0.7, resamples=999)
    # It took 0.3 s on one core; ten times as long is a defect.
    assert time.perf_counter() - start < 3


def test_p_value_is_hoeffdings() -> None:
    p_values = hoeffding_p_value(np.array([0, 0.04, 0.1, 0.5]), sequences=200, risk=0.1)
    expected = [math.exp(-4), math.exp(-400 * 0.06**2), 1, 1]
    np.testing.assert_allclose(p_values, expected, rtol=1e-12)
    assert hoeffding_p_value(0.0, sequences=1, risk=0.5).shape == ()


@pytest.mark.parametrize(
    ("risk", "confidence", "expected"), [(0.05, 0.95, 600), (0.1, 0.9, 116), (0.5, 0.5, 2)]
)
def test_sequences_needed_without_any_loss(risk: float, confidence: float, expected: int) -> None:
    assert sequences_needed(risk, confidence) == expected


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.999))
def test_sequences_needed_is_exactly_enough(risk: float, confidence: float) -> None:
    needed = sequences_needed(risk, confidence)
    thresholds = np.array([0.9, 0.8, 0.7])
    enough = certify(thresholds, np.zeros((3, needed)), risk=risk, confidence=confidence)
    assert (enough.certified, enough.threshold, enough.empirical_risk) == (3, 0.7, 0)
    if needed > 1:
        short = certify(thresholds, np.zeros((3, needed - 1)), risk=risk, confidence=confidence)
        assert (short.certified, short.threshold, short.empirical_risk) == (0, None, None)
        assert f"{needed} are needed; use the full model" in short.reason


@given(experiments(), levels, levels)
@settings(max_examples=300)
def test_certified_thresholds_are_the_longest_prefix_of_small_p_values(
    experiment: tuple[Values, Values], risk: float, confidence: float
) -> None:
    thresholds, losses = experiment
    certificate = certify(thresholds, losses, risk=risk, confidence=confidence)
    small = [p <= 1 - confidence for p in certificate.p_values]
    assert all(small[: certificate.certified])
    assert certificate.certified == len(thresholds) or not small[certificate.certified]
    means = losses.mean(axis=1)
    np.testing.assert_allclose(
        certificate.p_values,
        np.exp(-2 * losses.shape[1] * np.maximum(0, risk - means) ** 2),
        rtol=1e-9,  # `certify` sums exactly
    )
    if certificate.certified:
        assert certificate.threshold == thresholds[certificate.certified - 1]
        assert certificate.empirical_risk == pytest.approx(means[certificate.certified - 1])
        assert certificate.empirical_risk < risk
        assert certificate.sequences >= certificate.sequences_needed
    else:
        assert certificate.threshold is None
        assert certificate.empirical_risk is None
        assert certificate.reason.endswith("use the full model")


@given(experiments(), levels, levels, levels)
def test_more_risk_or_less_confidence_never_certifies_fewer_thresholds(
    experiment: tuple[Values, Values], one: float, two: float, fixed: float
) -> None:
    low, high = sorted([one, two])
    strict, lax = (certify(*experiment, risk=risk, confidence=fixed) for risk in (low, high))
    assert strict.certified <= lax.certified
    lax, strict = (certify(*experiment, risk=fixed, confidence=level) for level in (low, high))
    assert strict.certified <= lax.certified


@given(experiments(), levels, levels, st.integers(0, 2**32))
def test_certificate_does_not_depend_on_the_order_of_sequences(
    experiment: tuple[Values, Values], risk: float, confidence: float, seed: int
) -> None:
    thresholds, losses = experiment
    losses = losses * 0.1  # not a binary fraction, so sums depend on the order
    shuffled = np.random.default_rng(seed).permutation(losses, axis=1)
    certificate = certify(thresholds, losses, risk=risk, confidence=confidence)
    assert certify(thresholds, shuffled, risk=risk, confidence=confidence) == certificate


@pytest.fixture(scope="module")
def rejected() -> Callable[[list[float], float], list[int]]:
    """Return MAPIE's fixed-sequence testing, which also starts with the first p-value.

    MAPIE is imported here because it imports all of scikit-learn, which takes two seconds.
    """
    from mapie.risk_control import control_fwer

    def run(p_values: list[float], delta: float) -> list[int]:
        indices: list[int] = control_fwer(np.array(p_values), delta, "fixed_sequence").tolist()
        return indices

    return run


@given(experiment=experiments(), risk=levels, confidence=levels)
@settings(max_examples=300)
def test_certify_agrees_with_mapie(
    rejected: Callable[[list[float], float], list[int]],
    experiment: tuple[Values, Values],
    risk: float,
    confidence: float,
) -> None:
    certificate = certify(*experiment, risk=risk, confidence=confidence)
    assert rejected(certificate.p_values, 1 - confidence) == list(range(certificate.certified))


def test_mapie_also_stops_at_the_first_failure(
    rejected: Callable[[list[float], float], list[int]],
) -> None:
    losses = np.zeros((5, 100))
    losses[2, :30] = 1
    certificate = certify(np.linspace(0.9, 0.5, 5), losses, risk=0.25, confidence=0.9)
    assert [p <= 0.1 for p in certificate.p_values] == [True, True, False, True, True]
    assert certificate.certified == 2
    assert rejected(certificate.p_values, 0.1) == [0, 1]


def test_guarantee_holds_if_every_threshold_is_slightly_too_risky() -> None:
    """With 20 independent chances to err, fixed-sequence testing errs only on the first."""
    rng = np.random.default_rng(11)
    risk, confidence, runs = 0.5, 0.9, 2000
    thresholds = np.linspace(0.99, 0.8, 20)
    wrong = 0
    for _ in range(runs):
        losses = (rng.random((20, 100)) < risk + 0.001).astype(np.float64)
        wrong += certify(thresholds, losses, risk=risk, confidence=confidence).certified > 0
    # Three standard deviations of a binomial share at the nominal level. If testing continued after
    # a failure, some 30 % of the runs would be wrong.
    level = 1 - confidence
    assert wrong / runs <= level + 3 * math.sqrt(level * confidence / runs)
    assert wrong > 0  # the risk is at the bound, so some errors are expected


def test_guarantee_holds_for_growing_risk_and_correlated_losses() -> None:
    rng = np.random.default_rng(12)
    risk, confidence, runs = 0.4, 0.8, 2000
    thresholds, true_risk = np.linspace(0.99, 0.8, 30), np.linspace(0.25, 0.55, 30)
    wrong = useful = 0
    for _ in range(runs):
        losses = (rng.random(150) < true_risk[:, None]).astype(np.float64)
        certified = certify(thresholds, losses, risk=risk, confidence=confidence).certified
        wrong += certified > 0 and true_risk[certified - 1] > risk
        useful += certified > 0
    level = 1 - confidence
    assert wrong / runs <= level + 3 * math.sqrt(level * confidence / runs)
    assert wrong > 0
    assert useful / runs > 0.9


def certificate_of(means: list[float], sequences: int) -> Certificate:
    losses = np.repeat(np.array(means)[:, None], sequences, axis=1)
    thresholds = np.linspace(0.95, 0.96 - len(means) / 100, len(means))
    return certify(thresholds, losses, risk=0.05, confidence=0.95)


def test_reason_says_why_testing_stopped() -> None:
    assert certificate_of([0.0] * 3, 100).reason == (
        "100 sequences cannot certify a risk of 0.05 at confidence 0.95 even without any loss:"
        " 600 are needed; use the full model"
    )
    assert certificate_of([0.0, 0.0, 0.0], 600).reason == (
        "3 of 3 thresholds certified, down to 0.93; bolder ones were not tested"
    )
    assert certificate_of([0.0, 0.001, 0.08, 0.0], 700).reason == (
        "2 of 4 thresholds certified, down to 0.94; the next, 0.93, loses 0.08, which is not below"
        " the risk of 0.05"
    )
    assert certificate_of([0.0, 0.04], 700).reason == (
        "1 of 2 thresholds certified, down to 0.95; the next, 0.94, loses 0.04: 700 sequences"
        " cannot tell that from the risk of 0.05 at confidence 0.95, 14979 could"
    )
    assert certificate_of([0.08, 0.0], 700).reason == (
        "the safest threshold already loses 0.08, which is not below the risk of 0.05; use the"
        " full model"
    )
    assert certificate_of([0.04], 14978).certified == 0
    assert certificate_of([0.04], 14979).certified == 1


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.999), st.integers(1, 2000))
def test_too_few_agrees_with_certify(risk: float, confidence: float, sequences: int) -> None:
    before = too_few(sequences, risk=risk, confidence=confidence)
    tested = certify(np.array([0.9]), np.zeros((1, sequences)), risk=risk, confidence=confidence)
    assert (before is None) == (tested.certified == 1)
    if before is not None:
        assert before == dataclasses.replace(tested, p_values=[])


def test_results_are_frozen_and_hold_plain_types() -> None:
    values = correlated(4, 3, np.random.default_rng(0)).astype(np.float32)
    fitted = fit_threshold(values, np.float32(0.7), resamples=FEW)
    moved = transfer(np.float32(0.5), values, np.zeros(4, np.float32), resamples=FEW)
    losses = np.zeros((2, 600), np.float32)
    certificate = certify(GRID, losses, risk=np.float32(0.25), confidence=np.float32(0.75))
    for result in (fitted, moved, certificate):
        for value in asdict(result).values():
            parts = value if isinstance(value, tuple | list) else [value]
            assert {type(part) for part in parts} <= {float, int, str}
        with pytest.raises(FrozenInstanceError):
            result.threshold = 0
    # Ranks are computed in double precision for any type of the ratio.
    assert fitted == fit_threshold(values, float(np.float32(0.7)), resamples=FEW)


def test_inputs_are_not_modified() -> None:
    values = correlated(4, 3, np.random.default_rng(0))
    losses = np.random.default_rng(1).uniform(size=(2, 9))
    before = values.copy(), losses.copy()
    fit_threshold(values, 0.5, resamples=FEW)
    transfer(0.5, values, losses[0, :4], resamples=FEW)
    certify(np.array([0.9, 0.8]), losses, risk=0.5, confidence=0.5)
    assert np.array_equal(values, before[0])
    assert np.array_equal(losses, before[1])


def with_value(value: float, *, shape: tuple[int, ...] = (2, 3)) -> Values:
    values = np.zeros(shape)
    values.flat[-1] = value
    return values


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_threshold(np.zeros(3), 0.5), r"confidence of shape \[S, T\], got \(3,\)"),
        (lambda: fit_threshold(np.zeros((0, 3)), 0.5), r"\[S, T\], got \(0, 3\)"),
        (lambda: fit_threshold(np.zeros((2, 0)), 0.5), r"\[S, T\], got \(2, 0\)"),
        (lambda: fit_threshold(np.zeros((1, 9)), 0.5), "at least 2 sequences, got 1"),
        (lambda: fit_threshold(with_value(math.nan), 0.5), "got nan in sequence 1, token 2"),
        (lambda: fit_threshold(with_value(math.inf), 0.5), "got inf in sequence 1, token 2"),
        (lambda: fit_threshold(GOOD, 1.1), r"hard ratio in \[0, 1\], got 1.1"),
        (lambda: fit_threshold(GOOD, -0.1), r"hard ratio in \[0, 1\], got -0.1"),
        (lambda: fit_threshold(GOOD, math.nan), r"hard ratio in \[0, 1\], got nan"),
        (lambda: fit_threshold(GOOD, 0.5, resamples=38), "at least 39 resamples, got 38"),
        (lambda: fit_threshold(GOOD, 0.5, seed=-1), "seed of 0 or more, got -1"),
        (lambda: transfer(0.5, np.zeros(3)), r"confidence of shape \[S, T\], got \(3,\)"),
        (lambda: transfer(0.5, with_value(math.nan)), "got nan in sequence 1, token 2"),
        (lambda: transfer(math.nan, GOOD), "expected a threshold, got nan"),
        (lambda: transfer(0.5, GOOD, np.zeros(3)), r"losses of shape \[2\], got \(3,\)"),
        (lambda: transfer(0.5, GOOD, with_value(math.nan, shape=(2,))), "got nan for sequence 1"),
        (lambda: transfer(0.5, GOOD, resamples=0), "at least 39 resamples, got 0"),
        (lambda: transfer(0.5, GOOD, seed=-1), "seed of 0 or more, got -1"),
        (lambda: hoeffding_p_value(1.5, sequences=9, risk=0.1), r"in \[0, 1\], got 1.5"),
        (lambda: hoeffding_p_value(math.nan, sequences=9, risk=0.1), r"in \[0, 1\], got nan"),
        (lambda: hoeffding_p_value(0.5, sequences=0, risk=0.1), "at least one sequence, got 0"),
        (lambda: hoeffding_p_value(0.5, sequences=9, risk=0), r"risk in \(0, 1\), got 0"),
        (lambda: sequences_needed(1, 0.5), r"risk in \(0, 1\), got 1"),
        (lambda: sequences_needed(math.nan, 0.5), r"risk in \(0, 1\), got nan"),
        (lambda: sequences_needed(1e-155, 0.95), "can certify, got 1e-155"),
        (lambda: sequences_needed(0.5, 1), r"confidence in \(0, 1\), got 1"),
        (lambda: sequences_needed(0.5, 0), r"confidence in \(0, 1\), got 0"),
        (lambda: certify(GRID, GOOD, risk=1.5, confidence=0.5), r"risk in \(0, 1\), got 1.5"),
        (lambda: certify(GRID, GOOD, risk=0.5, confidence=95), r"confidence in \(0, 1\), got 95"),
        (lambda: certify(GRID, GOOD[0], risk=0.5, confidence=0.5), r"shape \[2, S\], got \(3,\)"),
        (lambda: certify(GRID, GOOD.T, risk=0.5, confidence=0.5), r"\[2, S\], got \(3, 2\)"),
        (lambda: certify(GRID, GOOD[:, :0], risk=0.5, confidence=0.5), r"got \(2, 0\)"),
        (
            lambda: certify(GRID, with_value(math.nan), risk=0.5, confidence=0.5),
            r"losses in \[0, 1\], got nan at threshold 0.8, sequence 2",
        ),
        (lambda: certify(GRID, with_value(1.1), risk=0.5, confidence=0.5), "got 1.1 at threshold"),
        (lambda: certify(GRID, with_value(-0.1), risk=0.5, confidence=0.5), "got -0.1 at"),
        (lambda: certify(np.zeros(0), GOOD, risk=0.5, confidence=0.5), r"got shape \(0,\)"),
        (lambda: certify(GOOD, GOOD, risk=0.5, confidence=0.5), r"\[J\], got shape \(2, 3\)"),
        (lambda: certify(GRID * math.nan, GOOD, risk=0.5, confidence=0.5), r"\[J\], got nan"),
        (lambda: certify(GRID[::-1], GOOD, risk=0.5, confidence=0.5), "got 0.8 before 0.9"),
        (lambda: certify(GRID * 0, GOOD, risk=0.5, confidence=0.5), "got 0 before 0"),
        (
            lambda: certify(GRID * math.inf, GOOD, risk=0.5, confidence=0.5),
            "strictly decreasing thresholds, got inf before inf",
        ),
    ],
)
def test_invalid_argument_gives_a_one_line_error(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    text = str(refusal.value)
    assert text.startswith("expected")
    assert "got" in text
    assert ";" in text  # what to do
    assert "\n" not in text


@given(
    values=st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.9]), min_size=4, max_size=40),
    hard_ratio=st.floats(0, 1),
)
def test_quantile_threshold_equals_the_fitted_threshold(
    values: list[float], hard_ratio: float
) -> None:
    rows = np.array(values[: len(values) // 2 * 2], dtype=np.float32).reshape(2, -1)
    fitted = fit_threshold(rows, hard_ratio, resamples=39)
    assert quantile_threshold(rows, hard_ratio) == fitted.threshold
    assert quantile_threshold(rows.ravel()[::-1], hard_ratio) == fitted.threshold


@pytest.mark.parametrize(
    ("values", "hard_ratio", "message"),
    [
        ([], 0.5, "expected finite confidences"),
        ([0.5, np.nan, 0.1], 0.5, "expected finite confidences"),
        ([0.5, -np.inf], 0.5, "expected finite confidences"),
        ([0.5, 0.6], 1.5, r"hard ratio in \[0, 1\], got 1.5"),
    ],
)
def test_quantile_threshold_rejects_invalid_arguments(
    values: list[float], hard_ratio: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantile_threshold(np.array(values), hard_ratio)
