"""A drafter that decodes proposes what its network computes over the whole text."""

from __future__ import annotations

import copy
import itertools
import operator
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.build_drafters import a_record
from support.tiny_drafters import (
    DRAFTED,
    LAYERS,
    a_drafted_stack,
    a_moved_network,
    drafted_alone,
    generated,
    jobs,
    some_texts,
    states_of,
)
from support.tiny_models import tiny_model

from cascade.drafters.acceptance import CHAIN, LEAST, calibrated
from cascade.drafters.proposer import Proposal, TrainedDrafter
from cascade.drafters.records import BINS
from cascade.drafters.stored import Drafter
from cascade.drafters.texts.batches import GeneratedText
from cascade.models.stack import DecoderStack

TOKENS = torch.arange(1, 97, 2)

#: A calibration that changes probabilities, so that it is seen whether it is applied.
BENT = [[(at / BINS) ** (2 + step) for at in range(BINS)] for step in range(CHAIN)]


def a_drafter(family: str = "llama", **settings: Any) -> TrainedDrafter:
    stack = a_drafted_stack(family)
    record = replace(a_record(), calibration=BENT, ends=[1])
    drafter = Drafter(a_moved_network(stack), TOKENS, record)
    return TrainedDrafter(stack, drafter, **({"least": 0.0} | settings))


def feed(drafter: TrainedDrafter, text: GeneratedText, row: int, start: int, stop: int) -> None:
    """Let a drafter observe the tokens at positions start + 1 to stop."""
    drafter.observe(row, text.ids[start + 1 : stop + 1].tolist(), text.features[start:stop].float())


@pytest.mark.parametrize("family", DRAFTED)
def test_proposals_are_those_of_the_whole_text_computed_again(family: str) -> None:
    stack, drafter = a_drafted_stack(family), a_drafter(family)
    for text in some_texts(family)[:4]:
        ids = text.ids.tolist()
        drafter.begin(0, ids[: text.prompt])
        known = 0
        # Steps of one to three tokens; the columns of drafts are written over each time.
        for place in range(text.prompt - 1, len(ids) - 2, 1 + text.prompt % 3):
            feed(drafter, text, 0, known, place + 1)
            known = place + 1
            tokens, shares = drafted_alone(drafter.network, stack, text, place, TOKENS.tolist())
            drafts = drafter.propose(0, CHAIN)
            end = next((at for at, token in enumerate(tokens) if token == 1), CHAIN - 1) + 1
            assert [draft.token for draft in drafts] == tokens[:end]
            for step, draft in enumerate(drafts):
                wanted = calibrated(BENT[step])(shares[step])
                assert draft.probability == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_tokens_may_be_observed_in_any_portions() -> None:
    for text in some_texts():
        last = len(text.ids) - 1
        drafts = []
        for cuts in ([0, last], [0, text.prompt, last], [0, 2, 3, last - 1, last]):
            drafter = a_drafter()
            drafter.begin(0, text.ids[: text.prompt].tolist())
            for start, stop in itertools.pairwise(cuts):
                feed(drafter, text, 0, start, stop)
                drafts.append(drafter.propose(0, 4))
        wanted = drafts[0]
        for found in (drafts[2], drafts[-1]):
            assert_alike(found, wanted)


def assert_alike(found: list[Proposal], wanted: list[Proposal]) -> None:
    assert [draft.token for draft in found] == [draft.token for draft in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.probability == pytest.approx(other.probability, rel=1e-4, abs=1e-9)


def test_proposing_twice_gives_the_same_chain() -> None:
    drafter, text = a_drafter(), some_texts()[0]
    drafter.begin(0, text.ids[: text.prompt].tolist())
    feed(drafter, text, 0, 0, text.prompt)
    first = drafter.propose(0, 4)
    assert drafter.propose(0, 4) == first
    assert drafter.propose(0, 2) == first[:2]


def test_rows_do_not_depend_on_each_other() -> None:
    one, other = some_texts()[:2]
    alone = []
    for text in (one, other):
        drafter = a_drafter()
        drafter.begin(0, text.ids[: text.prompt].tolist())
        feed(drafter, text, 0, 0, text.prompt)
        alone.append(drafter.propose(0, 3))
    together = a_drafter()
    for row, text in ((5, one), (2, other)):
        together.begin(row, text.ids[: text.prompt].tolist())
        feed(together, text, row, 0, text.prompt)
    assert [together.propose(5, 3), together.propose(2, 3)] == alone


def test_a_row_that_begins_again_forgets_its_text() -> None:
    one, other = some_texts()[:2]
    drafter = a_drafter()
    for text in (one, other):
        drafter.begin(0, text.ids[: text.prompt].tolist())
        feed(drafter, text, 0, 0, text.prompt)
        found = drafter.propose(0, 3)
    fresh = a_drafter()
    fresh.begin(0, other.ids[: other.prompt].tolist())
    feed(fresh, other, 0, 0, other.prompt)
    assert fresh.propose(0, 3) == found


def test_runner_ups_are_the_next_likely_tokens() -> None:
    drafter, text = a_drafter(runner_ups=3), some_texts()[0]
    drafter.begin(0, text.ids[: text.prompt].tolist())
    feed(drafter, text, 0, 0, text.prompt)
    for draft in drafter.propose(0, 3):
        assert len({draft.token, *draft.runner_ups}) == 4
    (first,) = a_drafter_proposing(text, runner_ups=0)
    assert first.runner_ups == ()


def a_drafter_proposing(text: GeneratedText, **settings: Any) -> list[Proposal]:
    drafter = a_drafter(**settings)
    drafter.begin(0, text.ids[: text.prompt].tolist())
    feed(drafter, text, 0, 0, text.prompt)
    return drafter.propose(0, 1)


def test_a_chain_ends_where_its_probability_is_too_low() -> None:
    for text in some_texts():
        drafter = a_drafter()
        drafter.begin(0, text.ids[: text.prompt].tolist())
        feed(drafter, text, 0, 0, text.prompt)
        drafts = drafter.propose(0, 4)
        paths = list(itertools.accumulate((draft.probability for draft in drafts), operator.mul))
        for length, (above, below) in enumerate(itertools.pairwise([1.0, *paths])):
            drafter.least = (above + below) / 2
            assert drafter.propose(0, 4) == drafts[:length]
    assert TrainedDrafter.__init__.__kwdefaults__["least"] == LEAST


def test_a_chain_ends_behind_a_token_that_ends_the_text() -> None:
    drafter, text = a_drafter(), some_texts()[0]
    drafter.begin(0, text.ids[: text.prompt].tolist())
    feed(drafter, text, 0, 0, text.prompt)
    drafts = drafter.propose(0, 4)
    drafter._ends = frozenset({drafts[1].token})
    assert drafter.propose(0, 4) == drafts[:2]


def test_only_its_tokens_and_those_of_the_prompt_are_proposed() -> None:
    for text in some_texts():
        drafter = a_drafter()
        prompt = text.ids[: text.prompt].tolist()
        drafter.begin(0, prompt)
        feed(drafter, text, 0, 0, text.prompt)
        for draft in drafter.propose(0, 4):
            assert {draft.token, *draft.runner_ups} <= {*TOKENS.tolist(), *prompt}


def test_nothing_is_proposed_before_a_token_or_within_no_limit() -> None:
    drafter, text = a_drafter(), some_texts()[0]
    drafter.begin(0, text.ids[: text.prompt].tolist())
    assert drafter.propose(0, 4) == []
    feed(drafter, text, 0, 0, text.prompt)
    assert drafter.propose(0, 0) == []


def test_a_text_longer_than_the_first_buffers_is_continued() -> None:
    stack = DecoderStack(tiny_model("llama", max_position_embeddings=2048))
    (job,) = jobs(1)
    (text,) = generated(stack, [job])
    ids = torch.cat([text.ids] * 40)
    states = states_of(stack, ids)
    record = replace(a_record(), calibration=BENT)
    drafter = TrainedDrafter(stack, Drafter(a_moved_network(stack), TOKENS, record), least=0.0)
    fresh = copy.copy(drafter)
    fresh._texts = {}
    for each, step in ((drafter, 7), (fresh, 10_000)):
        each.begin(0, ids[:4].tolist())
        for start in range(0, len(ids) - 1, step):
            stop = min(len(ids) - 1, start + step)
            each.observe(0, ids[start + 1 : stop + 1].tolist(), states[start:stop])
            if step == 7:
                each.propose(0, 3)
    assert_alike(drafter.propose(0, 4), fresh.propose(0, 4))


def test_a_model_in_bfloat16_gets_drafts_in_bfloat16() -> None:
    stack = DecoderStack(tiny_model("llama").bfloat16())
    record = replace(a_record(), calibration=BENT)
    network = a_moved_network(a_drafted_stack())
    drafter = TrainedDrafter(stack, Drafter(network, TOKENS, record), least=0.0)
    text = some_texts()[0]
    drafter.begin(0, text.ids[: text.prompt].tolist())
    drafter.observe(0, text.ids[1 : text.prompt + 1].tolist(), text.features[: text.prompt])
    assert len(drafter.propose(0, 3)) == 3
    assert next(drafter.network.parameters()).dtype == torch.bfloat16
    assert drafter.feature_layers == LAYERS


def test_states_and_tokens_must_be_as_many() -> None:
    drafter, text = a_drafter(), some_texts()[0]
    drafter.begin(0, [5])
    with pytest.raises(ValueError, match="expected as many states as tokens, got 2 and 1"):
        drafter.observe(0, [5], text.features[:2])
