"""Every figure of an operating point matches plain scoring and the model's logits."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp
from support.reference_early_exit import (
    LAYERS,
    a_settled_stack,
    a_stack,
    one_line,
    own_logits,
    positions_of,
    some_heads,
    state_of,
    visited,
)
from support.reference_points import (
    FAMILIES,
    blocks_of,
    losses_by_hand,
    row_by_hand,
    score_by_hand,
    settled_heads,
)
from support.tiny_models import tiny_model

from cascade.core.errors import CascadeError, CorpusError, ModelError, UsageError
from cascade.core.records import to_json
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import EarlyExit, Propagation, make_exit
from cascade.decoding.engine.engine import DecodingEngine
from cascade.evaluation import exit_table, operating_points
from cascade.evaluation.exit_table import ExitTable
from cascade.evaluation.operating_points import Evaluator, OperatingPoint
from cascade.evaluation.records import OperatingPointRow
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.heads import RidgeHead
from cascade.exits.history import HiddenHistory
from cascade.exits.rules import RULES, ExitPoint
from cascade.models.flops import full_flops
from cascade.models.stack import DecoderStack

#: Figures that depend on a clock or on resampling.
NOISY = {"seconds_ratio", "seconds_ratio_interval"}
DRAWN = {"agreement_interval", "perplexity_ratio_interval"}

#: Tolerance for fp32 sums in a different order: 30 units in the last place of a perplexity of 100.
CLOSE = 1e-5

WITH_LOGITS = ("top2_gap", "max_probability", "entropy", "patience", "oracle")
WITHOUT_LOGITS = ("cosine", "mean_cosine", "random", "fixed")
ALL_RULES = WITH_LOGITS + WITHOUT_LOGITS
AT = {1: ("cosine", "patience", "oracle"), 2: ALL_RULES, 3: ALL_RULES}

#: Heads and propagation; the maps of ridge propagation belong to the ridge heads.
VARIANTS: tuple[tuple[bool, Propagation], ...] = (
    (True, "frozen"),
    (True, "ridge"),
    (True, "exact"),
    (False, "frozen"),
    (False, "exact"),
)


def close(got: Any, expected: Any) -> bool:
    """Return whether two figures, intervals or names are equal up to fp32 rounding."""
    if expected is None or isinstance(expected, str):
        return bool(got == expected)
    return bool(got == pytest.approx(expected, rel=CLOSE, abs=CLOSE))


def heads_of(family: str, *, fitted: bool) -> FittedHeads | None:
    return settled_heads(family) if fitted else None


def mixed_points(table: ExitTable, layers: Sequence[int] = (2, 3)) -> list[OperatingPoint]:
    """Return a point for each rule and layer at which about half of the tokens exit."""
    points = []
    for layer in layers:
        for rule in AT[layer]:
            threshold = float(np.quantile(table.confidence[layer, rule], 0.5))
            if rule in ("oracle", "fixed"):
                threshold = 0.5
            if rule == "patience":
                threshold = 1.0
            points.append(OperatingPoint(layer, rule, threshold, "test"))
    return points


@functools.cache
def measured(
    family: str, fitted: bool, propagation: Propagation, batch_size: int = 3
) -> tuple[list[OperatingPoint], list[OperatingPointRow], ExitTable]:
    """Return points with their rows, and the table, of seven sequences."""
    stack, blocks = a_settled_stack(family), blocks_of(7)
    evaluator = Evaluator(
        stack, AT, heads=heads_of(family, fitted=fitted), propagation=propagation, seed=5
    )
    points = mixed_points(evaluator.table(blocks))
    rows, table = evaluator.run(blocks, points, batch_size=batch_size)
    return points, rows, table


# --- Rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("fitted", "propagation"), VARIANTS)
def test_row_matches_scoring_and_model_logits(
    family: str, fitted: bool, propagation: Propagation
) -> None:
    stack, blocks, heads = a_settled_stack(family), blocks_of(7), heads_of(family, fitted=fitted)
    points, rows, _ = measured(family, fitted, propagation)
    mixed = 0
    for point, row in zip(points, rows, strict=True):
        earlier = [layer for layer in AT if layer < point.layer] if point.rule == "patience" else []
        scored = score_by_hand(
            stack,
            blocks,
            point,
            heads=heads,
            propagation=propagation,
            batch_size=3,
            earlier=earlier,
            seed=5,
        )
        expected = row_by_hand(stack, blocks, scored, heads)
        for name, value in expected.items():
            got = getattr(row, name)
            assert close(got, value), f"{point}: {name} {got}, expected {value}"
        assert (row.exit_layer, row.rule, row.threshold, row.threshold_from) == (
            point.layer,
            point.rule,
            point.threshold,
            "test",
        )
        assert row.head == ("ridge" if fitted else "logit_lens")
        mixed += 0 < row.exit_share < 1
    assert mixed >= 12  # points at which no or all tokens exit would prove little


def test_measured_points_differ_from_full_model() -> None:
    for family in FAMILIES:
        rows = [row for variant in VARIANTS for row in measured(family, *variant)[1]]
        assert min(row.agreement for row in rows) < 0.9
        assert max(abs(row.perplexity_ratio - 1) for row in rows) > 1e-3
        assert len({round(row.flops_ratio, 6) for row in rows}) > 20


def test_full_flops_match_scoring_without_exits() -> None:
    for family in FAMILIES:
        stack, blocks = a_stack(family), blocks_of(3)
        counts = EarlyExit(stack).score(torch.from_numpy(blocks.ids).long()).counts
        assert operating_points.flops(stack, counts) == full_flops(stack, 3, 12)


@pytest.mark.parametrize("propagation", ["frozen", "ridge", "exact"])
def test_point_without_exits_matches_full_model(propagation: Propagation) -> None:
    evaluator = Evaluator(
        a_settled_stack("llama"),
        {2: ["cosine"]},
        heads=settled_heads("llama"),
        propagation=propagation,
    )
    row = evaluator.run(blocks_of(4), [OperatingPoint(2, "cosine", math.inf, "")])[0][0]
    assert row.exit_share == 0
    assert row.agreement == 1
    assert row.exit_agreement is None
    assert row.agreement_interval == [1, 1]
    # Not bit for bit, because the upper layers run a second time.
    assert row.perplexity_ratio == pytest.approx(1, abs=1e-6)
    assert row.hard_perplexity_ratio == pytest.approx(1, abs=1e-6)
    assert row.kl == pytest.approx(0, abs=1e-6)
    assert row.layers_per_token == LAYERS
    assert row.flops_ratio == 1


def test_point_at_which_all_tokens_exit_matches_exit_head() -> None:
    evaluator = Evaluator(
        a_settled_stack("llama"), {2: ["cosine", "fixed"]}, heads=settled_heads("llama")
    )
    points = [OperatingPoint(2, "cosine", -math.inf, ""), OperatingPoint(2, "fixed", 0.5, "")]
    rows, table = evaluator.run(blocks_of(4), points)
    assert rows[0].exit_share == rows[1].exit_share == 1
    assert rows[0].agreement == rows[0].exit_agreement == table.agrees[2].mean()
    assert rows[0].hard_perplexity_ratio is None
    assert rows[0].kl == pytest.approx(table.divergence[2].mean(), rel=1e-6)
    for name in to_plain(rows[0]).keys() - NOISY - {"rule", "threshold"}:
        assert getattr(rows[0], name) == getattr(rows[1], name), name


@pytest.mark.parametrize("fitted", [True, False])
def test_exit_at_last_layer_costs_every_layer(fitted: bool) -> None:
    stack, blocks = a_settled_stack("llama"), blocks_of(4)
    heads = heads_of("llama", fitted=fitted)
    evaluator = Evaluator(stack, {LAYERS: ["fixed"]}, heads=heads)
    row = evaluator.run(blocks, [OperatingPoint(LAYERS, "fixed", 0.5, "")])[0][0]
    ids = torch.from_numpy(blocks.ids).long()
    logits = own_logits(stack, ids)
    if heads is not None:
        state = visited(stack, ids)[LAYERS].flatten(0, 1)
        logits = heads.head(stack, LAYERS).logits(state).unflatten(0, ids.shape)
    same = logits.argmax(dim=-1) == own_logits(stack, ids).argmax(dim=-1)
    assert row.agreement == pytest.approx(same.double().mean().item(), abs=1e-12)
    assert row.layers_per_token == LAYERS
    width = stack.hidden_size
    extra = 2 * ids.numel() * width * width if fitted else 0
    full = full_flops(stack, *ids.shape)
    assert row.flops_ratio == pytest.approx((full + extra) / full, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_with_exact_propagation_always_agrees(family: str) -> None:
    points, rows, table = measured(family, True, "exact")
    found = [
        (point, row)
        for point, row in zip(points, rows, strict=True)
        if point.rule == "oracle" and 0 < row.exit_share < 1
    ]
    assert found
    for point, row in found:
        assert row.agreement == row.exit_agreement == 1
        assert row.exit_share == pytest.approx(table.agrees[point.layer].mean(), abs=1e-12)


def test_threshold_between_two_float32_numbers_is_not_rounded() -> None:
    stack, blocks = a_settled_stack("llama"), blocks_of(4)
    evaluator = Evaluator(stack, {2: ["cosine"]})
    lower = float(np.sort(evaluator.table(blocks, batch_size=4).confidence[2, "cosine"], None)[20])
    assert np.float32(lower + 1e-12) == np.float32(lower)  # the token would exit after rounding
    for threshold, exits in ((lower, 28), (lower + 1e-12, 27)):
        point = OperatingPoint(2, "cosine", threshold, "")
        row = evaluator.run(blocks, [point], batch_size=4)[0][0]
        scored = score_by_hand(stack, blocks, point, heads=None, propagation="frozen", batch_size=4)
        assert row.exit_share * 48 == pytest.approx(int(scored.leaves.sum()))
        assert row.exit_share * 48 == pytest.approx(exits)


def test_batch_size_changes_only_seconds_and_padding_of_packed_queries() -> None:
    for family in FAMILIES:
        stack = a_settled_stack(family)
        _, one, _ = measured(family, True, "frozen", batch_size=1)
        for batch_size in (3, 7):
            _, rows, _ = measured(family, True, "frozen", batch_size=batch_size)
            for row, other in zip(rows, one, strict=True):
                for name in to_plain(row).keys() - NOISY - {"flops_ratio"}:
                    assert close(getattr(row, name), getattr(other, name)), (
                        family,
                        batch_size,
                        row.rule,
                        name,
                    )
                # The queries of a batch are padded to the longest, and the padding is computed.
                if family == "gpt2":  # no packing
                    assert row.flops_ratio == pytest.approx(other.flops_ratio, rel=1e-12)
                attention = 4.0 * LAYERS * 7 * 12 * 12 * stack.hidden_size
                more = (row.flops_ratio - other.flops_ratio) * full_flops(stack, 7, 12)
                assert -1 < more < attention


def test_intervals_contain_figure_and_shrink_with_more_sequences() -> None:
    evaluator = Evaluator(a_settled_stack("gemma2"), {2: ["fixed"]})
    width = {}
    for sequences in (8, 72):
        blocks = blocks_of(sequences)
        row = evaluator.run(blocks, [OperatingPoint(2, "fixed", 0.5, "")])[0][0]
        for name in ("agreement", "perplexity_ratio"):
            low, high = getattr(row, f"{name}_interval")
            assert low < getattr(row, name) < high
            width[name, sequences] = high - low
        again = evaluator.run(blocks, [OperatingPoint(2, "fixed", 0.5, "")])[0][0]
        for name in DRAWN:
            assert getattr(again, name) == getattr(row, name)
    for name in ("agreement", "perplexity_ratio"):
        # One third, by the square root of nine, with a tolerance since sequences differ.
        assert 0.15 < width[name, 72] / width[name, 8] < 0.6


# --- Patience --------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [1.0, 2.0])
def test_patience_uses_predictions_of_layers_below(threshold: float) -> None:
    stack, blocks, heads = a_settled_stack("gemma2"), blocks_of(5), settled_heads("gemma2")
    evaluator = Evaluator(stack, AT, heads=heads)
    point = OperatingPoint(3, "patience", threshold, "")
    (row,), table = evaluator.run(blocks, [point], batch_size=5)
    scored = score_by_hand(
        stack,
        blocks,
        point,
        heads=heads,
        propagation="frozen",
        batch_size=5,
        earlier=[1, 2],
    )
    exits = table.confidence[3, "patience"] >= threshold
    assert np.array_equal(exits, scored.leaves.numpy())
    assert 0 < exits.mean() < 1
    # Its own head and the heads of both layers below ran over every token.
    assert scored.counts.head_rows == {1: 60, 2: 60, 3: 60}
    expected = row_by_hand(stack, blocks, scored, heads)["flops_ratio"]
    assert row.flops_ratio == pytest.approx(expected, rel=1e-12)


def test_patience_without_layer_below_is_zero() -> None:
    evaluator = Evaluator(a_settled_stack("llama"), {3: ["patience"]})
    (row,), table = evaluator.run(blocks_of(3), [OperatingPoint(3, "patience", 1.0, "")])
    assert not table.confidence[3, "patience"].any()
    assert row.exit_share == 0


# --- The table -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fitted", [True, False])
def test_table_matches_states_and_heads(family: str, fitted: bool) -> None:
    stack, blocks, heads = a_settled_stack(family), blocks_of(7), heads_of(family, fitted=fitted)
    table = Evaluator(stack, AT, heads=heads, seed=5).table(blocks, batch_size=3)
    ids = torch.from_numpy(blocks.ids).long()
    history, full = visited(stack, ids), own_logits(stack, ids)
    full_logs = full.double().log_softmax(dim=-1)
    following = ids[:, 1:, None]

    def of_next(logs: torch.Tensor) -> Any:
        return logs[:, :-1].gather(-1, following)[..., 0].numpy()

    np.testing.assert_allclose(
        table.full_log_probability[:, :-1], of_next(full_logs), atol=CLOSE, rtol=0
    )
    assert np.isnan(table.full_log_probability[:, -1]).all()
    earlier: list[torch.Tensor] = []
    for layer, rules in AT.items():
        at = make_exit(stack, layer, "fixed", 0.0, heads=heads)
        # Sequence by sequence, since a head accepts at most as many rows as the model's positions.
        logits = torch.cat([at.head.logits(states) for states in history[layer]]).float()
        logs = logits.double().log_softmax(dim=-1).unflatten(0, ids.shape)
        prediction = logits.argmax(dim=-1)
        agrees = prediction.view(ids.shape) == full.argmax(dim=-1)
        assert np.array_equal(table.agrees[layer], agrees.numpy())
        head = table.head_log_probability[layer]
        np.testing.assert_allclose(head[:, :-1], of_next(logs), atol=CLOSE, rtol=0)
        assert np.isnan(head[:, -1]).all()
        kl = (full_logs.exp() * (full_logs - logs)).sum(dim=-1)
        np.testing.assert_allclose(table.divergence[layer], kl.numpy(), atol=CLOSE, rtol=0)
        entries = {number: states.flatten(0, 1) for number, states in enumerate(history)}
        point = ExitPoint(
            layer,
            HiddenHistory(LAYERS, entries),
            lambda made=logits: made,
            ids.flatten(),
            positions_of(ids, None).flatten(),
            list(earlier),
            full.argmax(dim=-1).flatten(),
            5,
        )
        for rule in rules:
            expected = RULES[rule].confidence(point).view(ids.shape).numpy()
            got = table.confidence[layer, rule]
            np.testing.assert_allclose(got, expected, atol=CLOSE, rtol=0, err_msg=rule)
        earlier.append(prediction)


def test_run_returns_same_table() -> None:
    stack, blocks = a_settled_stack("llama"), blocks_of(5)
    evaluator = Evaluator(stack, {2: ["cosine", "random"]}, seed=3)
    alone = evaluator.table(blocks, batch_size=2)
    _, of_run = evaluator.run(blocks, [OperatingPoint(2, "cosine", 0.5, "")], batch_size=2)
    assert alone.confidence.keys() == of_run.confidence.keys() == {(2, "cosine"), (2, "random")}
    for key in alone.confidence:
        assert np.array_equal(alone.confidence[key], of_run.confidence[key])
    assert np.array_equal(alone.agrees[2], of_run.agrees[2])


# --- Losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("propagation", ["frozen", "ridge", "exact"])
def test_loss_is_share_of_differing_predictions(
    propagation: Propagation,
) -> None:
    stack, blocks, heads = a_settled_stack("gemma2"), blocks_of(7), settled_heads("gemma2")
    evaluator = Evaluator(stack, {2: ["top2_gap"]}, heads=heads, propagation=propagation)
    sure = np.quantile(evaluator.table(blocks).confidence[2, "top2_gap"], [0.6, 0.3])
    points = [OperatingPoint(2, "top2_gap", float(t), "") for t in (math.inf, *sure, 0.0)]
    losses = evaluator.losses(blocks, points, batch_size=3)
    assert losses.shape == (4, 7)
    for point, row in zip(points, losses, strict=True):
        scored = score_by_hand(
            stack, blocks, point, heads=heads, propagation=propagation, batch_size=3
        )
        np.testing.assert_allclose(row, losses_by_hand(scored), atol=1e-12)
    assert not losses[0].any()
    assert losses[3].mean() > losses[2].mean() > 0
    assert len(np.unique(losses[3])) > 2  # losses differ between sequences


# --- Seconds ---------------------------------------------------------------------------------

#: Seconds of the fake clock for each kind of work. The time of metrics must not be counted.
PLAN, LAYER, FULL_HEAD, HEAD, RULE, METRIC = 0.25, 1.0, 10.0, 100.0, 0.5, 1e6


class FakeClock:
    """A clock that advances only during the work to be timed."""

    def __init__(self) -> None:
        self.now = 0.0
        #: A factor that slows down all work, to simulate slow batches.
        self.pace = 1.0

    def perf_counter(self) -> float:
        return self.now

    def ticking(self, work: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds * self.pace
            return work(*args, **kwargs)

        return run


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeClock, DecoderStack]:
    """Return a clock and a model whose modules advance it."""
    clock, stack = FakeClock(), DecoderStack(tiny_model("llama"))
    monkeypatch.setattr(DecodingEngine, "is_ready", lambda self: False)
    monkeypatch.setattr(exit_table, "time", types.SimpleNamespace(perf_counter=clock.perf_counter))
    layers_run = operating_points.SkippingLayers.run
    monkeypatch.setattr(operating_points.SkippingLayers, "run", clock.ticking(layers_run, LAYER))
    monkeypatch.setattr(stack, "plan", clock.ticking(stack.plan, PLAN))
    monkeypatch.setattr(stack, "decode", clock.ticking(stack.decode, FULL_HEAD))
    monkeypatch.setattr(RidgeHead, "logits", clock.ticking(RidgeHead.logits, HEAD))
    for name in ALL_RULES:
        slow = clock.ticking(RULES[name].confidence, RULE)
        monkeypatch.setitem(RULES, name, dataclasses.replace(RULES[name], confidence=slow))
    ticking = clock.ticking(exit_table.kl_divergence, METRIC)
    monkeypatch.setattr(exit_table, "kl_divergence", ticking)
    softmax = clock.ticking(torch.Tensor.log_softmax, METRIC)
    monkeypatch.setattr(torch.Tensor, "log_softmax", softmax)
    return clock, stack


@pytest.mark.parametrize("propagation", ["frozen", "ridge", "exact"])
def test_seconds_are_layers_below_exit_decision_and_layers_above(
    timed: tuple[FakeClock, DecoderStack], propagation: Propagation
) -> None:
    _, stack = timed
    heads, blocks = some_heads("llama"), blocks_of(4)
    at = {2: ["cosine", "patience"], 3: ["cosine", "max_probability", "patience", "fixed"]}
    evaluator = Evaluator(stack, at, heads=heads, propagation=propagation)
    table = evaluator.table(blocks, batch_size=2)
    threshold = float(np.quantile(table.confidence[3, "cosine"], 0.4))
    sure = float(np.quantile(table.confidence[3, "max_probability"], 0.4))
    points = [
        OperatingPoint(3, "cosine", threshold, ""),
        OperatingPoint(3, "max_probability", sure, ""),
        OperatingPoint(3, "patience", 1.0, ""),
        OperatingPoint(3, "fixed", 0.5, ""),
    ]
    rows, table = evaluator.run(blocks, points, batch_size=2)
    full = PLAN + LAYERS * LAYER + FULL_HEAD
    below = PLAN + 3 * LAYER
    for point, row in zip(points, rows, strict=True):
        shares = (table.confidence[3, point.rule] >= point.threshold).reshape(2, -1).mean(axis=1)
        expected = 0.0
        for share in shares:  # one share per batch
            # A softmax computed by the rule counts; the softmax of the metrics does not.
            softmax = METRIC if point.rule == "max_probability" else 0
            heads = {"patience": 2.0, "max_probability": 1.0}.get(point.rule, share)
            above = LAYER + (FULL_HEAD if share < 1 else 0)
            if propagation == "exact":
                above = LAYER + FULL_HEAD * (1 - share)
            expected += below + heads * HEAD + RULE + softmax + above
        assert row.seconds_ratio == pytest.approx(expected / (2 * full)), point.rule
        if point.rule != "fixed":
            assert 0 < shares.min() < 1


def test_interval_of_seconds_is_ratio_interval_over_batches(
    timed: tuple[FakeClock, DecoderStack],
) -> None:
    clock, stack = timed
    paces = iter([1.0, 1.5, 1.0, 2.0, 1.0])
    evaluator = Evaluator(stack, {2: ["cosine"]}, heads=some_heads("llama"))
    blocks = blocks_of(10)
    threshold = float(np.quantile(evaluator.table(blocks).confidence[2, "cosine"], 0.5))

    def next_batch(_: int) -> None:
        clock.pace = next(paces, 1.0)

    next_batch(0)
    (row,), table = evaluator.run(
        blocks, [OperatingPoint(2, "cosine", threshold, "")], batch_size=2, progress=next_batch
    )
    shares = (table.confidence[2, "cosine"] >= threshold).reshape(5, -1).mean(axis=1)
    pace = np.array([1.0, 1.5, 1.0, 2.0, 1.0])
    full = pace * (PLAN + LAYERS * LAYER + FULL_HEAD)
    point = pace * (PLAN + LAYERS * LAYER + FULL_HEAD + RULE + shares * HEAD)
    ratio = point.sum() / full.sum()
    assert row.seconds_ratio == pytest.approx(ratio)
    # Cochran 1977, section 6.3: the t interval of the residuals, relative to the full model's mean.
    around = ttest_1samp(point - ratio * full, 0).confidence_interval()
    assert row.seconds_ratio_interval == pytest.approx(
        [ratio + end / full.mean() for end in around]
    )
    assert row.seconds_ratio_interval[0] < ratio < row.seconds_ratio_interval[1]


def test_one_batch_has_no_interval_of_seconds() -> None:
    evaluator = Evaluator(a_settled_stack("llama"), {2: ["cosine"]})
    row = evaluator.run(blocks_of(4), [OperatingPoint(2, "cosine", 0.5, "")], batch_size=4)[0][0]
    assert row.seconds_ratio_interval is None
    assert row.seconds_ratio > 0


# --- Side effects ----------------------------------------------------------------------------


def test_evaluating_does_not_change_model_heads_and_corpus() -> None:
    stack, blocks, heads = DecoderStack(tiny_model("llama")), blocks_of(4), some_heads("llama")
    weights = {name: value.clone() for name, value in stack.model.state_dict().items()}
    before, ids, fingerprint = state_of(stack), blocks.ids.copy(), heads.fingerprint()
    evaluator = Evaluator(stack, AT, heads=heads, propagation="ridge")
    evaluator.run(blocks, mixed_points(evaluator.table(blocks)))
    assert state_of(stack) == before
    assert np.array_equal(blocks.ids, ids)
    assert heads.fingerprint() == fingerprint
    assert all(torch.equal(value, weights[n]) for n, value in stack.model.state_dict().items())


def test_progress_counts_every_token_once() -> None:
    done: list[int] = []
    evaluator = Evaluator(a_settled_stack("llama"), {2: ["cosine"]})
    points = [OperatingPoint(2, "cosine", 0.5, ""), OperatingPoint(2, "cosine", 0.6, "")]
    evaluator.run(blocks_of(7), points, batch_size=3, progress=done.append)
    assert done == [36, 36, 12]
    evaluator.losses(blocks_of(7), points, batch_size=4, progress=done.append)
    assert done[3:] == [48, 36]


# --- Invalid input ---------------------------------------------------------------------------


def refusal(kind: type[CascadeError], work: Callable[[], Any]) -> str:
    with pytest.raises(kind) as error:
        work()
    return one_line(error)


@pytest.mark.parametrize(
    ("rules", "options", "words"),
    [
        ({2: ["cosin"]}, {}, "expected a rule among cosine"),
        ({0: ["cosine"]}, {}, "expected an exit layer in 1..4, got 0"),
        ({5: ["cosine"]}, {}, "expected an exit layer in 1..4, got 5"),
        ({1: ["mean_cosine"]}, {}, "expected an exit layer in 2..4, got 1"),
        ({}, {}, "expected at least one exit layer"),
        ({2: []}, {}, "expected at least one exit layer with a rule"),
        ({2: ["cosine"]}, {"propagation": "molten"}, "got 'molten'"),
        ({2: ["cosine"]}, {"propagation": "ridge"}, "needs fitted heads"),
    ],
)
def test_invalid_evaluator_is_rejected(
    rules: dict[int, list[str]], options: dict[str, Any], words: str
) -> None:
    assert words in refusal(UsageError, lambda: Evaluator(a_stack("llama"), rules, **options))


def test_heads_without_layer_or_of_another_model_are_rejected() -> None:
    heads = some_heads("llama")
    some = dataclasses.replace(heads, weights={3: heads.weights[3]})
    words = refusal(UsageError, lambda: Evaluator(a_stack("llama"), {2: ["cosine"]}, heads=some))
    assert "these heads were fitted for (3), got 2" in words
    words = refusal(
        ModelError, lambda: Evaluator(a_stack("qwen2"), {2: ["cosine"]}, heads=some_heads("llama"))
    )
    assert "family llama" in words
    assert "family qwen2" in words


@pytest.mark.parametrize(
    ("point", "words"),
    [
        (OperatingPoint(2, "cosine", math.nan, ""), "got nan"),
        (OperatingPoint(2, "cosine", 1.5, ""), "from -1 to 1"),
        (OperatingPoint(2, "top2_gap", 0.5, ""), "got layer 2 with the rule top2_gap"),
        (OperatingPoint(3, "cosine", 0.5, ""), "got layer 3 with the rule cosine"),
        (OperatingPoint(9, "cosine", 0.5, ""), "1..4, got 9"),
        (OperatingPoint(2, "cosin", 0.5, ""), "got 'cosin'"),
    ],
)
def test_invalid_point_is_rejected_before_any_pass(
    point: OperatingPoint, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = a_stack("llama")
    evaluator = Evaluator(stack, {2: ["cosine"]})
    monkeypatch.setattr(stack, "plan", lambda *_, **__: pytest.fail("a forward pass was started"))
    blocks = blocks_of(4)
    assert words in refusal(UsageError, lambda: evaluator.run(blocks, [point]))
    assert words in refusal(UsageError, lambda: evaluator.losses(blocks, [point]))


def test_invalid_corpus_is_rejected() -> None:
    evaluator = Evaluator(a_stack("llama"), {2: ["cosine"]})
    words = refusal(CorpusError, lambda: evaluator.table(blocks_of(2, 65)))
    assert "65 tokens exceed the model's 64 positions" in words
    words = refusal(CorpusError, lambda: evaluator.table(blocks_of(2, 1)))
    assert "at least 2 tokens, got 1" in words
    words = refusal(CorpusError, lambda: evaluator.table(blocks_of(2), batch_size=0))
    assert "at least 1, got 0" in words
    empty = TokenBlocks(np.zeros((0, 12), dtype=np.int32), "none", "none", 0)
    assert "got none" in refusal(CorpusError, lambda: evaluator.table(empty))
    assert "got none" in refusal(CorpusError, lambda: evaluator.losses(empty, []))


def test_non_finite_logits_and_states_are_rejected() -> None:
    heads = some_heads("llama")
    weight, bias = heads.weights[2]
    broken = dataclasses.replace(heads, weights={2: (weight * math.nan, bias)})
    # The cosine needs no logits, so only the check of logits detects them.
    evaluator = Evaluator(a_stack("llama"), {2: ["cosine"]}, heads=broken)
    words = refusal(ModelError, lambda: evaluator.table(blocks_of(2)))
    assert "logits of exit layer 2 are not finite" in words
    stack = DecoderStack(tiny_model("llama"))
    stack.layers[1].mlp.down_proj.weight.data.fill_(math.inf)
    evaluator = Evaluator(stack, {2: ["cosine"]})
    assert "not finite" in refusal(ModelError, lambda: evaluator.table(blocks_of(2)))


def test_head_that_excludes_next_token_has_finite_perplexity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def certain(self: RidgeHead, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(hidden), 97), -math.inf)
        logits[:, 5] = 0.0
        return logits

    monkeypatch.setattr(RidgeHead, "logits", certain)
    evaluator = Evaluator(a_stack("llama"), {2: ["fixed"]}, heads=some_heads("llama"))
    rows, _ = evaluator.run(blocks_of(4), [OperatingPoint(2, "fixed", 0.5, "")])
    (row,) = rows
    assert row.perplexity is row.perplexity_ratio is row.perplexity_ratio_interval is None
    assert row.nats_per_token is row.nats_difference is None  # the loss itself is infinite
    assert row.compared_ratio == math.inf
    assert 100 < rows[0].kl <= 700
    to_json(to_plain(rows))


def test_full_model_with_infinite_perplexity_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = DecoderStack(tiny_model("llama"))
    decode = stack.decode

    def banning(hidden: torch.Tensor) -> torch.Tensor:
        logits = decode(hidden)
        logits[..., 50:] = -math.inf
        return logits

    monkeypatch.setattr(stack, "decode", banning)
    evaluator = Evaluator(stack, {2: ["fixed"]})
    words = refusal(
        ModelError, lambda: evaluator.run(blocks_of(4), [OperatingPoint(2, "fixed", 0.5, "")])
    )
    assert "assigns zero probability to a token" in words
