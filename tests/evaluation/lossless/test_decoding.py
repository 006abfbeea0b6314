"""Prompts continued without loss and with exits: texts, passes, costs and seconds."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from support import tiny_drafters
from support.tiny_drafters import a_drafted_stack
from support.tiny_models import random_ids

from cascade import EarlyExit, TokenBlocks, load_drafter
from cascade.core.errors import CorpusError, UsageError
from cascade.decoding.drafting.ngrams import NgramLookup
from cascade.decoding.drafting.runner_ups import RunnerUps
from cascade.decoding.growing_text import Generation
from cascade.evaluation.lossless.decoding import LosslessConfig, continue_prompts, prompts_of
from cascade.evaluation.lossless.records import DecodingRow, LosslessFigures

#: Costs at which drafts pay: passes over more tokens take little longer.
COSTS = (1.0, 1.02, 1.04, 1.06, 1.08, 1.1, 1.12, 1.14, 1.16)

CONFIG = LosslessConfig(prompts=3, new_tokens=12, pass_costs=COSTS)


def some_blocks(count: int = 7, length: int = 16) -> TokenBlocks:
    ids = random_ids(count, length).numpy().astype(np.int32)
    return TokenBlocks(ids, "random", "random", records=count)


def continued(
    family: str = "llama", config: LosslessConfig = CONFIG, **settings: Any
) -> LosslessFigures:
    stack = a_drafted_stack(family)
    prompts = prompts_of(some_blocks(), config, stack.max_positions)
    return continue_prompts(stack, prompts, config, **settings)


@functools.cache
def usual(family: str = "llama") -> LosslessFigures:
    exits = EarlyExit(a_drafted_stack(family), layer=3, rule="cosine", threshold=-1.0)
    return continued(family, exits=exits)


def row_of(figures: LosslessFigures, method: Any) -> DecodingRow:
    row = figures.row(method)
    assert row is not None
    return row


# --- Prompts ---------------------------------------------------------------------------------


def test_prompts_are_the_beginnings_of_evenly_spaced_sequences() -> None:
    blocks = some_blocks(7, 16)
    prompts = prompts_of(blocks, LosslessConfig(prompts=3, prompt_tokens=5), None)
    expected = torch.from_numpy(blocks.ids[[0, 3, 6], :5]).long()
    assert torch.cat(list(prompts.ids)).equal(expected)


def test_a_prompt_is_at_most_half_of_a_sequence() -> None:
    prompts = prompts_of(some_blocks(7, 16), LosslessConfig(), None)
    assert [tuple(ids.shape) for ids in prompts.ids] == [(1, 8)] * 4


def test_new_tokens_end_at_the_last_position() -> None:
    assert prompts_of(some_blocks(), LosslessConfig(), 20).new_tokens == 12
    with pytest.raises(CorpusError, match="expected room for 2 new tokens behind 8 of a model"):
        prompts_of(some_blocks(), LosslessConfig(), 9)


def test_other_prompts_have_another_fingerprint() -> None:
    blocks = some_blocks()
    found = {
        prompts_of(blocks, LosslessConfig(prompts=count, prompt_tokens=length), None).fingerprint
        for count, length in ((2, 4), (3, 4), (2, 5), (2, 4))
    }
    assert len(found) == 3


def test_one_sequence_is_refused() -> None:
    with pytest.raises(CorpusError, match="expected at least 2 sequences"):
        prompts_of(some_blocks(1), LosslessConfig(), None)


@pytest.mark.parametrize("name", ["prompts", "prompt_tokens", "new_tokens"])
def test_too_small_numbers_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"expected {name} of at least"):
        prompts_of(some_blocks(), LosslessConfig(**{name: 0}), None)


# --- Texts and passes ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lossless_texts_equal_the_full_models_and_take_fewer_passes(family: str) -> None:
    figures = usual(family)
    assert row_of(figures, "drafts").equal == figures.prompts == 3
    assert row_of(figures, "drafts").tokens_per_pass > 1.1
    assert row_of(figures, "modules").tokens_per_pass == 1
    assert row_of(figures, "drafts").tokens == row_of(figures, "modules").tokens


def test_with_an_engine_full_depth_is_measured_without_drafts() -> None:
    figures = usual("llama")
    engine = row_of(figures, "engine")
    assert (engine.equal, engine.tokens_per_pass) == (3, 1)
    assert engine.engine == row_of(figures, "drafts").engine == row_of(figures, "exits").engine
    assert row_of(figures, "modules").engine is None
    assert figures.trees


def test_without_an_engine_rows_name_the_models_own_modules() -> None:
    figures = usual("gemma2")
    assert figures.row("engine") is None
    assert (row_of(figures, "drafts").engine or "").startswith("model (")
    assert row_of(figures, "exits").engine is None
    assert not figures.trees


def test_nothing_is_drafted_in_half_precision_without_an_engine() -> None:
    from support.tiny_models import tiny_model

    from cascade import DecoderStack

    stack = DecoderStack(tiny_model("gemma2").to(torch.bfloat16))
    config = LosslessConfig(prompts=2, new_tokens=4)
    figures = continue_prompts(stack, prompts_of(some_blocks(), config, None), config)
    assert figures.pass_costs == []
    assert (row_of(figures, "drafts").engine, row_of(figures, "drafts").tokens_per_pass) == (
        None,
        1,
    )


def test_exits_give_another_text_with_one_token_per_pass() -> None:
    exits = row_of(usual(), "exits")
    assert exits.equal < 3  # all tokens exit at layer 3
    assert exits.tokens_per_pass == 1


def test_without_an_operating_point_there_is_no_row_of_exits() -> None:
    assert continued(methods=["drafts", "exits"]).row("exits") is None


def test_the_same_costs_give_the_same_tokens_per_pass() -> None:
    figures = continued(config=LosslessConfig(prompts=3, new_tokens=12))
    assert len(figures.pass_costs) == len(COSTS)
    again = continued(
        config=LosslessConfig(prompts=3, new_tokens=12, pass_costs=tuple(figures.pass_costs)),
        methods=["drafts"],
    )
    assert again.pass_costs == figures.pass_costs
    assert row_of(again, "drafts").tokens_per_pass == row_of(figures, "drafts").tokens_per_pass


def test_costs_that_forbid_drafts_give_one_token_per_pass() -> None:
    steep = LosslessConfig(prompts=3, new_tokens=12, pass_costs=tuple(10.0**n for n in range(9)))
    assert row_of(continued(config=steep, methods=["drafts"]), "drafts").tokens_per_pass == 1


def test_proposers_that_propose_nothing_give_one_token_per_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for proposer in (NgramLookup, RunnerUps):
        monkeypatch.setattr(proposer, "propose", lambda *_: [])
    row = row_of(continued(methods=["drafts"]), "drafts")
    assert (row.tokens_per_pass, row.equal) == (1, 3)


def test_a_text_that_differs_is_not_counted_as_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    original = EarlyExit.generate

    def generate(self: EarlyExit, *args: Any, **kwargs: Any) -> Any:
        made = original(self, *args, **kwargs)
        if kwargs.get("verify") and int(args[0][0, 0]) == int(some_blocks().ids[3, 0]):
            assert isinstance(made, Generation)
            made.sequences[0, -1] += 1
        return made

    monkeypatch.setattr(EarlyExit, "generate", generate)
    figures = continued()
    assert (row_of(figures, "drafts").equal, row_of(figures, "engine").equal) == (2, 3)


def test_a_trained_drafter_has_its_own_row(tmp_path: Path) -> None:
    stack = a_drafted_stack()
    drafter = load_drafter(tiny_drafters.stored(tmp_path / "drafter"), stack)
    figures = continued(config=LosslessConfig(prompts=2, new_tokens=8, drafter=drafter))
    assert row_of(figures, "drafter").equal == 2
    assert figures.drafter == drafter.record.sha256
    assert usual().drafter is None


# --- Seconds ---------------------------------------------------------------------------------


def test_seconds_are_those_of_the_clock_per_new_token() -> None:
    ticks = itertools.count()
    figures = continued(clock=lambda: float(next(ticks)))
    for row in figures.rows:
        assert row.seconds == [1.0] * 3
        assert row.seconds_ratio == pytest.approx(1)
        assert row.seconds_ratio_interval == pytest.approx([1, 1])
        assert row.per_token == [1 / count for count in row.tokens]


def test_ratios_compare_with_the_models_own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    original = EarlyExit.generate

    def generate(self: EarlyExit, *args: Any, **kwargs: Any) -> Any:
        nonlocal now
        now += 1.0 if kwargs.get("verify") else 4.0
        return original(self, *args, **kwargs)

    monkeypatch.setattr(EarlyExit, "generate", generate)
    figures = continued(clock=lambda: now)
    assert row_of(figures, "drafts").seconds_ratio == pytest.approx(0.25)
    assert row_of(figures, "drafts").seconds_ratio_interval == pytest.approx([0.25, 0.25])


def test_a_disturbed_run_is_timed_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slow, runs = 0.0, {6}, 0
    original = EarlyExit.generate

    def generate(self: EarlyExit, *args: Any, **kwargs: Any) -> Any:
        nonlocal now, runs
        runs += 1
        now += 50.0 if runs in slow else 1.0
        return original(self, *args, **kwargs)

    monkeypatch.setattr(EarlyExit, "generate", generate)
    figures = continued(methods=["drafts"], clock=lambda: now)
    assert [row.seconds for row in figures.rows] == [[1.0] * 3, [1.0] * 3]
    assert runs == 2 + 6 + 1
    # A run that is slow again keeps the faster time.
    now, runs = 0.0, 0
    slow = {6, 9}
    figures = continued(methods=["drafts"], clock=lambda: now)
    assert sorted(spent for row in figures.rows for spent in row.seconds) == [1.0] * 5 + [50.0]


def test_no_way_is_always_timed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    original = EarlyExit.generate

    def generate(self: EarlyExit, *args: Any, **kwargs: Any) -> Any:
        calls.append(bool(kwargs.get("verify")))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(EarlyExit, "generate", generate)
    continued(methods=["drafts"])
    timed = calls[2:]  # behind the untimed runs
    assert timed == [False, True, True, False, False, True]


# --- Records ---------------------------------------------------------------------------------


def test_rows_that_contradict_the_number_of_prompts_are_found() -> None:
    figures = usual()
    assert figures.wrong_row() is None
    own, *others = figures.rows
    for rows, words in (
        (others, "modules first"),
        ([replace(own, seconds=[1.0])], "tokens and seconds of 3 prompts"),
        ([replace(own, equal=4)], "at most 3 equal texts"),
    ):
        assert words in (replace(figures, rows=rows).wrong_row() or "")
