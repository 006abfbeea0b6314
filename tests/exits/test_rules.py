"""Exit rules: their confidences, ranges and declared needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chi2
from support.reference_early_exit import (
    LAYERS,
    a_stack,
    difference,
    one_line,
)
from support.rule_probes import DRAWS, a_point, confidence, drawn
from support.tiny_models import random_ids
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.decoding.early_exit import EarlyExit
from cascade.exits.history import HiddenHistory
from cascade.exits.rules import RULES, ExitPoint, ExitRule, check_layers, exit_rule, find_rule

EVERY_RULE = pytest.mark.parametrize("name", RULES)


# --- Rules ------------------------------------------------------------------------------------


def a_full_point(
    states: Tensor, logits: Tensor, rows: slice = slice(None), *, seed: int = 0
) -> ExitPoint:
    """Return a point at layer 2 that has everything that any rule needs.

    Args:
        states: `[3, n, D]`, entries 0 to 2.
        logits: `[n, V]`.
        rows: The tokens to keep.
        seed: Seed for rules that draw random numbers.
    """
    numbers = torch.arange(logits.shape[0])
    return a_point(
        logits[rows],
        layer=2,
        history=HiddenHistory(2, dict(enumerate(states[:, rows]))),
        token_ids=(7 * numbers)[rows],
        positions=numbers[rows],
        earlier=[(numbers % 3)[rows], (numbers % 2)[rows]],
        full_prediction=(numbers % 2)[rows],
        seed=seed,
    )


LARGE = torch.finfo(torch.float32).max


#: Logits that a head may give: ordinary, tied, huge and -inf.
some_logits = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(2, 9)),
    elements=st.one_of(
        st.floats(-30, 30, width=32),
        st.sampled_from([0.0, -math.inf, 1e30, -1e30, 3e38, -3e38, LARGE]),
    ),
).filter(lambda logits: bool((logits.max(axis=1) > -math.inf).all()))


#: States of any size whose squares are finite in fp32.
some_states = arrays(
    np.float32,
    st.tuples(st.just(3), st.just(4), st.integers(1, 5)),
    elements=st.one_of(
        st.floats(-10, 10, width=32), st.sampled_from([0.0, 1e-30, -1e-15, 1e15, -1e15])
    ),
)


@given(some_states, some_logits, st.integers(-(2**70), 2**70))
@example(np.zeros((3, 4, 2), np.float32), np.zeros((4, 9), np.float32), 0)
@example(np.ones((3, 4, 2), np.float32), np.eye(4, dtype=np.float32) * LARGE, 2**63)
@example(
    np.ones((3, 4, 2), np.float32),
    np.where(np.eye(4, dtype=bool), 0, -math.inf).astype(np.float32),
    -1,
)
def test_confidences_are_within_declared_range(
    states: np.ndarray[Any, Any], logits: np.ndarray[Any, Any], seed: int
) -> None:
    count = len(logits)
    at = a_full_point(torch.from_numpy(states[:, :count]), torch.from_numpy(logits), seed=seed)
    for name, rule in RULES.items():
        values = confidence(name, at)
        assert bool(((values >= rule.low) & (values <= rule.high)).all()), name


def random_point(rows: slice = slice(None)) -> ExitPoint:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn((3, 40, 8), generator=generator)
    return a_full_point(states, 3 * torch.randn((40, 11), generator=generator), rows)


@EVERY_RULE
def test_confidence_does_not_depend_on_other_tokens(name: str) -> None:
    together = confidence(name, random_point())
    alone = torch.cat([confidence(name, random_point(slice(i, i + 1))) for i in range(40)])
    # 1e-6: kernels may sum a single row in a different order.
    assert difference(alone, together) <= 1e-6
    if name != "fixed":
        assert len(together.unique()) > 1


@EVERY_RULE
def test_rule_needs_exactly_what_it_declares(name: str) -> None:
    rule, whole = RULES[name], random_point()
    expected = rule.confidence(whole)
    seen: dict[str, Any] = {
        "history": HiddenHistory(
            2, {k: v for k, v in whole.history.entries.items() if k >= 2 - rule.entries}
        ),
        "earlier": whole.earlier if rule.needs_earlier else (),
        "full_prediction": whole.full_prediction if rule.needs_full else None,
    }
    called: list[int] = []

    def compute() -> Tensor:
        called.append(1)
        return whole.compute_logits()

    at = ExitPoint(2, seen.pop("history"), compute, whole.token_ids, whole.positions, **seen)
    assert torch.equal(rule.confidence(at), expected)
    assert called == [1] * rule.needs_logits
    if rule.entries:
        fewer = HiddenHistory(
            2, {k: v for k, v in at.history.entries.items() if k > 2 - rule.entries}
        )
        with pytest.raises(UsageError, match="are not in this history"):
            rule.confidence(a_point(layer=2, history=fewer, count=40))


def test_only_oracle_needs_full_prediction() -> None:
    assert [name for name, rule in RULES.items() if rule.needs_full] == ["oracle"]
    at = random_point()
    at.full_prediction = None
    with pytest.raises(UsageError) as error:
        confidence("oracle", at)
    assert one_line(error) == (
        "the rule oracle needs the full model's prediction, so it can score but not generate; use "
        "another rule"
    )


def test_logits_are_computed_once() -> None:
    called: list[int] = []
    at = random_point()
    compute = at.compute_logits
    at.compute_logits = lambda: (called.append(1), compute())[1]  # type: ignore[func-returns-value]
    for name in ("top2_gap", "entropy", "max_probability", "patience", "oracle"):
        confidence(name, at)
    assert called == [1]


@pytest.mark.parametrize("name", ["top2_gap", "max_probability", "entropy"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_give_nan_confidence(name: str, bad: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    assert confidence(name, a_point(logits)).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["cosine", "mean_cosine"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_states_give_nan_confidence(name: str, bad: float) -> None:
    states = torch.ones(3, 4, 2)
    states[1, 2, 0] = bad
    at = a_full_point(states, torch.zeros(4, 5))
    assert confidence(name, at).isnan().tolist() == [False, False, True, False]


# Entries 0..3 of two tokens. The cosines of consecutive entries are 0, 0.96, 0.6 and 1, -1, 0.
STATES = {
    0: torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
    1: torch.tensor([[3.0, 4.0], [2.0, 2.0]]),
    2: torch.tensor([[8.0, 6.0], [-1.0, -1.0]]),
    3: torch.tensor([[0.0, 0.5], [-7.0, 7.0]]),
}


def test_cosine_rules_match_values_computed_by_hand() -> None:
    history = HiddenHistory(3, STATES)
    by_layer = {1: [0.0, 1.0], 2: [0.96, -1.0], 3: [0.6, 0.0]}
    for layer, expected in by_layer.items():
        at = a_point(layer=layer, history=history, count=2)
        assert confidence("cosine", at).tolist() == pytest.approx(expected, abs=1e-6)
    for layer, mean in {2: [0.48, 0.0], 3: [0.78, -0.5]}.items():
        at = a_point(layer=layer, history=history, count=2)
        assert confidence("mean_cosine", at).tolist() == pytest.approx(mean, abs=1e-6)


def test_half_precision_states_are_compared_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn((64, 256), generator=generator).half()
    history = HiddenHistory(1, {0: states, 1: states})
    values = confidence("cosine", a_point(layer=1, history=history, count=64))
    assert bool((values <= 1).all())
    assert values.tolist() == pytest.approx([1.0] * 64, abs=1e-6)


def test_distribution_rules_match_values_computed_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log() + 3.0
    at = a_point(logits)
    # 1e-6: fp32 logarithms and exponentials.
    assert confidence("top2_gap", at).item() == pytest.approx(0.25, abs=1e-6)
    assert confidence("max_probability", at).item() == pytest.approx(0.5, abs=1e-6)
    assert confidence("entropy", at).item() == pytest.approx(1 - 1.75 / 2, abs=1e-6)


@pytest.mark.parametrize("size", [2, 97, 49_152])
def test_uniform_and_one_hot_distributions_have_extreme_confidences(size: int) -> None:
    one_hot = torch.full((1, size), -math.inf)
    one_hot[0, 1] = 5.0
    uniform = torch.full((1, size), 5.0)
    # 1e-5: a sum of 49,152 fp32 terms.
    assert confidence("entropy", a_point(uniform)).item() == pytest.approx(0.0, abs=1e-5)
    assert confidence("max_probability", a_point(uniform)).item() == pytest.approx(1 / size)
    assert confidence("top2_gap", a_point(uniform)).item() == 0.0
    for name in ("entropy", "max_probability", "top2_gap"):
        assert confidence(name, a_point(one_hot)).item() == 1.0


def test_two_equal_largest_probabilities_have_no_gap() -> None:
    logits = torch.tensor([[LARGE, LARGE, -LARGE], [0.0, 0.0, -math.inf]])
    assert confidence("top2_gap", a_point(logits)).tolist() == [0.0, 0.0]
    halves = confidence("max_probability", a_point(logits))
    assert halves.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_patience_counts_consecutive_agreeing_layers() -> None:
    logits = torch.zeros(4, 9)
    logits[:, 5] = 1.0
    earlier = [torch.tensor(row) for row in ([5, 5, 1, 5], [5, 1, 5, 5], [5, 5, 5, 1])]
    for known, expected in ((3, [3, 1, 2, 0]), (2, [2, 1, 2, 0]), (1, [1, 1, 1, 0]), (0, [0] * 4)):
        at = a_point(logits, earlier=earlier[3 - known :])
        assert confidence("patience", at).tolist() == expected


def test_fixed_confidence_is_one() -> None:
    assert confidence("fixed", a_point(count=3)).tolist() == [1.0] * 3


def test_oracle_confidence_is_agreement_with_full_prediction() -> None:
    at = a_point(torch.eye(4), full_prediction=torch.tensor([0, 3, 2, 1]))
    assert confidence("oracle", at).tolist() == [1.0, 0.0, 1.0, 0.0]


# --- The random rule --------------------------------------------------------------------------


TOKENS = torch.from_numpy(np.random.default_rng(0).zipf(1.3, DRAWS).clip(max=49_151))


SITUATIONS: dict[str, dict[str, Any]] = {
    "one_token_everywhere": {"token_ids": torch.full((DRAWS,), 198)},
    "every_token_at_one_position": {"positions": torch.full((DRAWS,), 17)},
    "text": {"token_ids": TOKENS, "positions": torch.arange(DRAWS) % 1024 + (TOKENS > 9)},
    "far_away": {"positions": 2**40 + torch.arange(DRAWS), "seed": 2**62 + 1},
}


@pytest.mark.parametrize("situation", ["one_token_everywhere", "every_token_at_one_position"])
def test_random_confidences_are_uniform(situation: str) -> None:
    values = drawn(**SITUATIONS[situation])
    # The values are deterministic. The limits are four standard errors of a uniform sample, and
    # the 0.9999 quantile for the histogram.
    assert abs(values.mean() - 0.5) < 4 * math.sqrt(1 / 12 / DRAWS)
    assert abs(values.var() - 1 / 12) < 4 * math.sqrt((1 / 80 - 1 / 144) / DRAWS)
    counts = np.histogram(values, bins=256, range=(0, 1))[0]
    expected = DRAWS / 256
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, 255)
    assert 0 <= values.min() < values.max() < 1
    neighbours = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(DRAWS)


def test_random_rule_does_not_use_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = a_point(layer=2, count=9)
    monkeypatch.setattr(Tensor, "double", None)
    assert bool((confidence("random", at) < 1).all())


@pytest.mark.parametrize("situation", ["text", "far_away"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_random_rule_exits_share_given_by_threshold(situation: str, rate: float) -> None:
    # Text sometimes repeats a token at the same position. Both then have the same confidence.
    values = drawn(**SITUATIONS[situation])
    share = (values >= 1 - rate).mean()
    assert abs(share - rate) < 6 * math.sqrt(rate * (1 - rate) / len(np.unique(values)))


def test_random_confidences_are_reproducible_and_depend_on_all_inputs() -> None:
    values = drawn()
    assert np.array_equal(values, drawn())
    others = [
        drawn(seed=1),
        drawn(seed=-1),
        drawn(seed=2**31),
        drawn(layer=28),
        drawn(positions=torch.arange(DRAWS) + 1),
        drawn(token_ids=torch.arange(DRAWS) + 1),
    ]
    for other in others:
        assert abs(np.corrcoef(values, other)[0, 1]) < 4 / math.sqrt(DRAWS)
        assert (values == other).mean() < 1e-3


# --- Thresholds -------------------------------------------------------------------------------


@EVERY_RULE
def test_threshold_in_range_or_infinite_is_accepted(name: str) -> None:
    rule = RULES[name]
    for threshold in (rule.low, min(rule.high, 1e9), (rule.low + 1) / 2, math.inf, -math.inf):
        rule.check(threshold)
    # A fitted threshold has this value if even the most confident tokens must not exit.
    rule.check(float(np.nextafter(np.float32(min(rule.high, 1e9)), np.float32(math.inf))))


@EVERY_RULE
def test_threshold_out_of_range_error_names_range(name: str) -> None:
    rule = RULES[name]
    outside = [rule.low - 1e-6, rule.low - 10, math.nan]
    if rule.high < math.inf:
        outside += [rule.high + 1e-6, 95.0]
    for threshold in outside:
        with pytest.raises(UsageError) as error:
            EarlyExit(a_stack("llama"), layer=2, rule=name, threshold=threshold)
        ends = f"from {rule.low:g}" + (f" to {rule.high:g}" if rule.high < math.inf else "")
        assert one_line(error) == (
            f"the rule {name} gives confidences {ends}; expected a threshold in this range (or "
            f"inf, or -inf), got {threshold:g}"
        )


def test_declared_ranges() -> None:
    ranges = {name: (rule.low, rule.high) for name, rule in RULES.items()}
    special = {"cosine": (-1.0, 1.0), "mean_cosine": (-1.0, 1.0), "patience": (0.0, math.inf)}
    assert ranges == dict.fromkeys(RULES, (0.0, 1.0)) | special


@EVERY_RULE
def test_every_rule_has_description_and_source(name: str) -> None:
    rule = find_rule(name)
    assert rule.name == name
    assert rule.what.endswith(".")
    assert rule.source


def test_unknown_rule_error_lists_rules() -> None:
    with pytest.raises(UsageError) as error:
        find_rule("cosin")
    assert one_line(error) == (
        "expected a rule among cosine, mean_cosine, top2_gap, max_probability, entropy, patience, "
        "fixed, random, oracle, got 'cosin'"
    )


def test_rule_that_needs_more_layers_than_available_is_rejected() -> None:
    rule = find_rule("mean_cosine")
    check_layers({2: rule, LAYERS: rule}, LAYERS)
    with pytest.raises(UsageError) as error:
        check_layers({1: rule}, LAYERS)
    assert one_line(error) == (
        "the rule mean_cosine compares 2 layers; expected an exit layer in 2..4, got 1"
    )


# --- Custom rules -----------------------------------------------------------------------------


@pytest.fixture
def custom_rule() -> Iterator[ExitRule]:
    @exit_rule("odd", needs_logits=False)
    def _odd(at: ExitPoint) -> Tensor:
        """Tokens at odd positions exit."""
        return (at.positions % 2).float()

    yield RULES["odd"]
    del RULES["odd"]


def test_custom_rule_scores_and_generates(custom_rule: ExitRule) -> None:
    assert custom_rule.what == "Tokens at odd positions exit."
    early = EarlyExit(a_stack("llama"), layer=2, rule="odd", threshold=1.0)
    score = early.score(random_ids(2, 6))
    assert score.exit_layers.tolist() == [[4, 2, 4, 2, 4, 2]] * 2
    made = early.generate(random_ids(1, 3), max_new_tokens=3, return_dict_in_generate=True)
    assert not isinstance(made, Tensor)
    assert made.sequences.shape[1] > 3
    with pytest.raises(UsageError, match="the rule odd gives confidences from 0 to 1"):
        EarlyExit(a_stack("llama"), layer=2, rule="odd", threshold=2.0)


def test_removed_rule_is_unknown() -> None:
    with pytest.raises(UsageError, match="expected a rule among"):
        EarlyExit(a_stack("llama"), layer=2, rule="odd", threshold=1.0)
