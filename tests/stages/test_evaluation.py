"""Test evaluations of cascades against figures computed by hand."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from support.reference_early_exit import one_line
from support.tiny_models import random_ids
from support.tiny_stages import a_moved_stage, a_reader, share_of
from torch import Tensor

from cascade.core.errors import CorpusError, UsageError
from cascade.core.records import to_json
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import Score
from cascade.models.stack import DecoderStack
from cascade.stages.cascades import Cascade
from cascade.stages.entries import Entry
from cascade.stages.evaluation import (
    SCOPES,
    SequenceSums,
    evaluate_cascade,
    perplexity_ratio,
    verdict_of,
)
from cascade.stages.records import CascadeEvaluationRecord, ScopeFigures, VariantFigures
from cascade.stages.stage import new_stage

SEQUENCES, LENGTH = 12, 16


@functools.cache
def some_blocks() -> TokenBlocks:
    """Return random tokens. The first six of each sequence are template text."""
    ids = random_ids(SEQUENCES, LENGTH, seed=11).numpy().astype(np.int32)
    place = np.broadcast_to(np.arange(LENGTH), ids.shape)
    records = np.ones_like(ids)
    return TokenBlocks(
        ids, "random", "random", 9, record_of=records, response=place > 5, record_split="held-out"
    )


def ids() -> Tensor:
    return torch.from_numpy(some_blocks().ids).long()


@functools.cache
def a_cascade(seed: int = 0, stages: int = 2) -> Cascade:
    stack = a_reader()
    cascade = Cascade(stack)
    for number in range(stages):
        top = cascade.stack
        layer = top.num_layers - (number == 0)
        entry = Entry(layer, share_of(top, ids(), layer, (0.6, 0.3)[number]))
        cascade.add_stage(a_moved_stage(top, 2 - number, seed=seed + number), entry)
    return cascade


@functools.cache
def controls() -> dict[str, Cascade]:
    found = {}
    for number, (routing, entry) in enumerate(
        {"all": Entry(4, math.inf, "fixed"), "random": Entry(4, 0.6, "random")}.items()
    ):
        cascade = Cascade(a_reader())
        cascade.add_stage(a_moved_stage(a_reader(), 2, seed=5 + number), entry)
        found[routing] = cascade
    return found


@functools.cache
def a_record(stages: int = 2) -> CascadeEvaluationRecord:
    """Return an evaluation record. It is computed once."""
    own = {} if stages > 1 else controls()
    return evaluate_cascade(a_cascade(stages=stages), some_blocks(), controls=own, batch_size=5)


def rows(record: CascadeEvaluationRecord) -> dict[str, VariantFigures]:
    return {row.name: row for row in record.rows}


def masks() -> dict[str, Tensor]:
    """Return the mask of predictions in each scope, `[S, T-1]`."""
    hard = (a_cascade().score(ids(), stages=1).exit_layers > 4)[:, :-1]
    response = torch.from_numpy(some_blocks().response)[:, 1:]  # type: ignore[arg-type]
    return {
        "all": torch.ones_like(hard),
        "easy": ~hard,
        "hard": hard,
        "response": response,
        "easy_response": response & ~hard,
        "hard_response": response & hard,
    }


def perplexity(score: Score, mask: Tensor) -> float:
    return math.exp(-float(score.log_probabilities[mask].double().mean()))


# --- The figures ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stages"), [("base", 0), ("stage 1", 1), ("cascade", 2)])
def test_figures_match_those_computed_from_scores(name: str, stages: int) -> None:
    row, base = rows(a_record())[name], a_cascade().score(ids(), stages=0)
    score = a_cascade().score(ids(), stages=stages)
    hits = score.predictions[:, :-1] == ids()[:, 1:]
    assert row.stages == stages
    assert tuple(row.scopes) == SCOPES
    for scope, mask in masks().items():
        got = row.scopes[scope]
        assert got.tokens == int(mask.sum()) > 0
        assert got.perplexity == pytest.approx(perplexity(score, mask), rel=1e-6)
        assert got.accuracy == pytest.approx(float(hits[mask].double().mean()))
        expected = perplexity(score, mask) / perplexity(base, mask)
        assert got.ratio == pytest.approx(expected, rel=1e-6)
        low, high = got.ratio_interval
        assert low <= got.ratio <= high


def test_the_base_has_ratios_of_exactly_one() -> None:
    for scope in rows(a_record())["base"].scopes.values():
        assert (scope.ratio, scope.ratio_interval) == (1.0, [1.0, 1.0])
    assert rows(a_record())["base"].operations_ratio == 1.0
    assert rows(a_record())["base"].layers_per_token == 4.0


def test_easy_tokens_are_the_same_in_every_row_and_keep_their_perplexity() -> None:
    found = rows(a_record())
    for scope in ("easy", "easy_response"):
        counts = {row.scopes[scope].tokens for row in found.values()}
        assert len(counts) == 1
        for row in found.values():
            assert row.scopes[scope].ratio == pytest.approx(1.0, abs=1e-6)
    for name in ("stage 1", "cascade"):
        assert abs(found[name].scopes["hard"].ratio - 1) > 1e-3


def test_exit_shares_sum_to_one_and_match_the_cascade() -> None:
    for name, row in rows(a_record()).items():
        shares = {at.layer: at.share for at in row.exits}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert sorted(shares) == {"base": [4], "stage 1": [4, 6], "cascade": [4, 6, 7]}[name]
        assert all(share > 0 for share in shares.values())
    exits = [at.share for at in rows(a_record())["cascade"].exits]
    assert exits == pytest.approx(a_cascade().exit_shares(a_cascade().score(ids())))


def test_layers_and_operations_match_the_computed_rows() -> None:
    row = rows(a_record())["cascade"]
    share = {at.layer: at.share for at in row.exits}
    expected = 4 + 2 * (share[6] + share[7]) + share[7]
    assert row.layers_per_token == pytest.approx(expected)
    tokens = SEQUENCES * LENGTH
    computed = [stage.layer_rows for stage in row.stage_rows]
    assert computed == pytest.approx([2 * (share[6] + share[7]) * tokens, share[7] * tokens])
    assert 1 < rows(a_record())["stage 1"].operations_ratio < row.operations_ratio < 2


def test_the_batch_size_changes_only_the_last_digits() -> None:
    other = evaluate_cascade(a_cascade(), some_blocks(), batch_size=SEQUENCES)
    for one, two in zip(a_record().rows, other.rows, strict=True):
        for scope in SCOPES:
            a, b = one.scopes[scope], two.scopes[scope]
            assert a.perplexity == pytest.approx(b.perplexity, rel=1e-6)
            assert a.accuracy == b.accuracy


def test_the_record_is_serializable_and_names_its_cascade() -> None:
    record = a_record(1)
    to_json(to_plain(record))
    assert record.kind == "cascade-evaluation"
    assert record.cascade == a_cascade(stages=1).record()
    done: list[int] = []
    evaluate_cascade(a_cascade(), some_blocks(), batch_size=5, progress=done.append)
    assert done == [5 * LENGTH, 5 * LENGTH, 2 * LENGTH]


def test_text_without_response_tokens_has_no_response_figures() -> None:
    blocks = dataclasses.replace(some_blocks(), response=np.zeros((SEQUENCES, LENGTH), bool))
    record = evaluate_cascade(a_cascade(stages=1), blocks, controls=controls())
    assert set(rows(record)["cascade"].scopes) == {"all", "easy", "hard"}
    assert "perplexity of all text" in record.verdict.stage
    assert record.verdict.routing is not None


# --- Controls ---------------------------------------------------------------------------------


def test_each_control_is_measured_with_both_entries() -> None:
    found = rows(a_record(1))
    assert list(found) == [
        "base",
        "cascade",
        "trained on all",
        "all tokens",
        "trained on random",
        "random tokens",
    ]
    for scope, mask in masks().items():  # hard by the cascade's entry, not by a control's
        assert {row.scopes[scope].tokens for row in found.values()} == {int(mask.sum())}
    hard = found["cascade"].exits
    for routing in ("all", "random"):
        assert found[f"trained on {routing}"].exits == hard
    assert to_plain(found["all tokens"].exits) == [
        {"layer": 4, "share": 0.0},
        {"layer": 6, "share": 1.0},
    ]
    for routing, own in controls().items():
        score = own.score(ids())
        got = found[f"{routing} tokens"].scopes["response"].perplexity
        assert got == pytest.approx(perplexity(score, masks()["response"]), rel=1e-6)


def test_comparisons_are_paired_ratios_of_the_rows() -> None:
    record = a_record(1)
    found = rows(record)
    assert [one.control for one in record.comparisons] == list(found)[2:]
    for one in record.comparisons:
        for scope in ("all", "response"):
            own, other = (found[name].scopes[scope].perplexity for name in ("cascade", one.control))
            assert getattr(one, scope).ratio == pytest.approx(own / other, rel=1e-9)
            low, high = getattr(one, scope).interval
            expected = "cascade" if high < 1 else "control" if low > 1 else "neither"
            assert getattr(one, scope).wins == expected


def test_a_cascade_does_not_win_against_itself() -> None:
    same = a_cascade(stages=1)
    record = evaluate_cascade(same, some_blocks(), controls={"random": same})
    for one in record.comparisons:
        assert (one.response.ratio, one.response.wins) == (1.0, "neither")
    assert record.verdict.earns_its_keep is False
    assert "does not differ significantly from random routing" in record.verdict.routing


# --- The verdict ------------------------------------------------------------------------------


def a_trained_cascade(stack: DecoderStack, sign: float, only: Tensor | None = None) -> Cascade:
    """Return a cascade whose stage was trained on the text (sign 1) or against it (sign -1)."""
    from cascade.stages.stage import run_stage

    stage = new_stage(stack, 1)
    kept: dict[int, Tensor] = {}
    stack.visit(ids(), kept.__setitem__)
    entering = torch.ones_like(ids()).bool() if only is None else only
    optimizer = torch.optim.Adam(stage.parameters(), lr=0.01)
    for _ in range(25):
        states = run_stage(stack, stage, ids(), kept[4], entering)
        logits = stack.decode(states)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids()[:, 1:].flatten())
        optimizer.zero_grad()
        (sign * loss).backward()
        optimizer.step()
    cascade = Cascade(stack)
    cascade.add_stage(stage, Entry(4, math.inf, "cosine"))
    return cascade


def entered_by_half(cascade: Cascade) -> Cascade:
    half = Cascade(cascade.base)
    half.add_stage(cascade.stages[0], Entry(3, share_of(cascade.base, ids(), 3)))
    return half


def test_the_verdict_names_a_helpful_and_a_harmful_stage() -> None:
    good, bad = (entered_by_half(a_trained_cascade(a_reader(), sign)) for sign in (1.0, -1.0))
    helps = evaluate_cascade(good, some_blocks(), controls={"random": bad})
    assert helps.verdict.helps is True
    assert "the stage helps: perplexity of response text 0." in helps.verdict.stage
    assert helps.verdict.earns_its_keep is True
    assert "routing by hardness is better than random routing: 0." in helps.verdict.routing
    harms = evaluate_cascade(bad, some_blocks(), controls={"random": good, "all": good})
    assert harms.verdict.helps is False
    assert "the stage harms: perplexity of response text" in harms.verdict.stage
    assert harms.verdict.earns_its_keep is False
    assert "routing by hardness is worse than random routing" in harms.verdict.routing
    assert "training on all tokens is better" in harms.verdict.training


def test_an_untrained_stage_has_no_significant_effect() -> None:
    cascade = Cascade(a_reader())
    cascade.add_stage(new_stage(a_reader(), 1), Entry(3, share_of(a_reader(), ids(), 3)))
    verdict = evaluate_cascade(cascade, some_blocks()).verdict
    assert verdict.helps is False
    assert "the stage has no significant effect" in verdict.stage
    assert (verdict.routing, verdict.training, verdict.earns_its_keep) == (None,) * 3


@pytest.mark.parametrize(
    ("interval", "words"),
    [((0.9, 0.99), "helps"), ((1.01, 1.1), "harms"), ((0.9, 1.0), "no significant effect")],
)
def test_the_verdict_follows_the_interval(interval: tuple[float, float], words: str) -> None:
    figures = ScopeFigures(
        tokens=9, perplexity=8.0, accuracy=0.5, ratio=0.95, ratio_interval=list(interval)
    )
    assert words in verdict_of({"response": figures}, []).stage


def test_intervals_resample_sequences() -> None:
    """If a single sequence differs, some resamples do not contain it."""
    difference = np.zeros(20)
    difference[0] = -4.0
    own, other = (
        SequenceSums({"all": losses}, {"all": np.zeros(20)}, {"all": np.full(20, 10)})
        for losses in (difference, np.zeros(20))
    )
    found = perplexity_ratio(own, other, "all", 0)
    assert found.ratio == pytest.approx(math.exp(-4 / 200))
    assert found.nats == pytest.approx(-4 / 200)
    low, high = found.interval or (math.nan, math.nan)
    assert high == 1.0
    assert low < math.exp(-8 / 200)


@pytest.mark.parametrize(
    ("nats", "words", "helps"),
    [(1234.0, "the stage harms", False), (-1234.0, "the stage helps", True)],
)
def test_a_ratio_beyond_numbers_is_judged_and_named_in_nats(
    nats: float, words: str, helps: bool
) -> None:
    own, other = (
        SequenceSums({"all": losses}, {"all": np.zeros(8)}, {"all": np.full(8, 10)})
        for losses in (np.full(8, 10 * nats), np.zeros(8))
    )
    found = perplexity_ratio(own, other, "all", 0)
    assert found.ratio is found.interval is None
    figures = ScopeFigures(
        tokens=80,
        perplexity=None,
        accuracy=0.5,
        ratio=None,
        ratio_interval=None,
        nats_per_token=abs(nats),
        nats_difference=found.nats,
        nats_interval=found.nats_interval,
    )
    verdict = verdict_of({"all": figures}, [])
    assert verdict.stage.startswith(words)
    assert f"{nats:+,.0f} nats per token ({nats:+,.0f} to {nats:+,.0f} nats" in verdict.stage
    assert verdict.helps is helps


# --- Invalid arguments ------------------------------------------------------------------------


def test_a_cascade_without_stages_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one stage, got the base alone") as caught:
        evaluate_cascade(Cascade(a_reader()), some_blocks())
    one_line(caught)


def test_text_without_marks_is_refused() -> None:
    with pytest.raises(CorpusError, match="read it with marks=True") as caught:
        evaluate_cascade(a_cascade(), dataclasses.replace(some_blocks(), response=None))
    one_line(caught)


def test_a_control_with_another_number_of_stages_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a cascade with 1 stages, got 2") as caught:
        evaluate_cascade(a_cascade(), some_blocks(), controls=controls())
    one_line(caught)
