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
from support.drafting import FREE
from support.engines import needs_compiler
from support.tiny_drafters import (
    DRAFTED,
    LAYERS,
    TABLE,
    a_drafted_stack,
    a_moved_network,
    drafted_alone,
    generated,
    jobs,
    some_texts,
    states_of,
)
from support.tiny_models import tiny_model

from cascade import EarlyExit
from cascade.core.errors import ModelError
from cascade.decoding.drafting.proposers import Candidate
from cascade.decoding.engine.compiler import CompilerError
from cascade.drafters import drafting_layer
from cascade.drafters.acceptance import CHAIN, calibrated
from cascade.drafters.config import ARCHITECTURES, Architecture
from cascade.drafters.proposer import LEAST, TrainedDrafter
from cascade.drafters.records import BINS
from cascade.drafters.stored import Drafter
from cascade.drafters.texts.batches import GeneratedText
from cascade.models.stack import DecoderStack

TOKENS = torch.arange(1, 97, 2)

#: A calibration that changes probabilities, so that it is seen whether it is applied.
BENT = [[(at / BINS) ** (2 + step) for at in range(BINS)] for step in range(CHAIN)]


def a_drafter(
    family: str = "llama", architecture: Architecture = "cascade", **settings: Any
) -> TrainedDrafter:
    stack = a_drafted_stack(family)
    record = replace(a_record(), calibration=BENT, ends=[1])
    network = a_moved_network(stack, architecture=architecture)
    drafter = Drafter(network, TOKENS, TABLE, record)
    return TrainedDrafter(stack, drafter, **({"least": 0.0} | settings))


def architecture_of(kind: str) -> Architecture:
    return "eagle3" if kind == "eagle3" else "cascade"


def feed(drafter: TrainedDrafter, text: GeneratedText, row: int, start: int, stop: int) -> None:
    """Let a drafter observe the tokens at positions start + 1 to stop."""
    drafter.observe(row, text.ids[start + 1 : stop + 1].tolist(), text.features[start:stop].float())


def begin(drafter: TrainedDrafter, text: GeneratedText, row: int = 0) -> None:
    """Let a drafter observe a prompt and the token behind it."""
    drafter.begin(row, int(text.ids[0]))
    feed(drafter, text, row, 0, text.prompt)


def likeliest(candidates: list[Candidate]) -> list[Candidate]:
    """Return the chain of the likeliest candidates."""
    chain = [candidate for candidate in candidates if candidate.key[2] == 0]
    before = [-1, *(candidates.index(candidate) for candidate in chain)]
    assert [candidate.parent for candidate in chain] == before[: len(chain)]
    return chain


@pytest.fixture(params=["compiled", "modules", "eagle3"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute the drafter's layer in each way; that of EAGLE-3 is never compiled."""
    if request.param == "modules":

        def refuse(*_: Any) -> None:
            raise CompilerError("there is no C compiler")

        monkeypatch.setattr(drafting_layer, "CompiledLayers", refuse)
    return str(request.param)


@needs_compiler
@pytest.mark.parametrize("family", DRAFTED)
def test_proposals_are_those_of_the_whole_text_computed_again(family: str, kind: str) -> None:
    stack, drafter = a_drafted_stack(family), a_drafter(family, architecture_of(kind))
    assert drafter.layer.is_compiled == (kind == "compiled")
    for text in some_texts(family)[:4]:
        ids = text.ids.tolist()
        drafter.begin(0, ids[0])
        known = 0
        # Steps of one to three tokens; the columns of drafts are written over each time.
        for place in range(text.prompt - 1, len(ids) - 2, 1 + text.prompt % 3):
            feed(drafter, text, 0, known, place + 1)
            known = place + 1
            tokens, shares = drafted_alone(drafter.network, stack, text, place, TOKENS.tolist())
            drafts = likeliest(drafter.propose(0, CHAIN))
            end = next((at for at, token in enumerate(tokens) if token == 1), CHAIN - 1) + 1
            assert [draft.token for draft in drafts] == tokens[:end]
            for step, draft in enumerate(drafts):
                wanted = calibrated(BENT[step])(shares[step])
                assert draft.prior == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_the_prompt_and_what_follows_may_be_observed_in_any_portions() -> None:
    texts = [text for text in some_texts() if len(text.ids) > text.prompt + 3]
    assert texts
    for text in texts:
        last = len(text.ids) - 1
        drafts = []
        for cuts in ([text.prompt, last], [text.prompt, text.prompt + 1, last - 1, last]):
            drafter = a_drafter()
            begin(drafter, text)
            for start, stop in itertools.pairwise(cuts):
                feed(drafter, text, 0, start, stop)
                if stop - start == 1:
                    drafter.propose(0, 4)
            drafts.append(drafter.propose(0, 4))
        assert_alike(*drafts)


def assert_alike(found: list[Candidate], wanted: list[Candidate]) -> None:
    """The priors decide which of two almost equal tokens comes first."""
    assert [draft.token for draft in likeliest(found)] == [
        draft.token for draft in likeliest(wanted)
    ]
    for one, other in zip(found, wanted, strict=True):
        assert one.prior == pytest.approx(other.prior, rel=1e-4, abs=1e-9)


def test_proposing_twice_gives_the_same_candidates() -> None:
    drafter, text = a_drafter(), some_texts()[0]
    begin(drafter, text)
    first = drafter.propose(0, 4)
    assert drafter.propose(0, 4) == first
    assert likeliest(drafter.propose(0, 2)) == likeliest(first)[:2]


def test_rows_are_proposed_together_as_alone(kind: str) -> None:
    one, other = some_texts()[:2]
    alone = []
    for text in (one, other):
        drafter = a_drafter(architecture=architecture_of(kind))
        begin(drafter, text)
        alone.append(drafter.propose(0, 3))
    together = a_drafter(architecture=architecture_of(kind))
    begin(together, one, 5)
    begin(together, other, 2)
    found = together.propose_all({5: 3, 2: 3})
    assert_alike(found[5], alone[0])
    assert_alike(found[2], alone[1])
    assert together.steps == 3  # of both rows at once
    assert_alike(together.propose(2, 3), alone[1])


def test_a_row_that_begins_again_forgets_its_text() -> None:
    one, other = some_texts()[:2]
    drafter = a_drafter()
    for text in (one, other):
        begin(drafter, text)
        found = drafter.propose(0, 3)
    fresh = a_drafter()
    begin(fresh, other)
    assert fresh.propose(0, 3) == found


def test_runner_ups_are_the_next_likely_tokens() -> None:
    drafter, text = a_drafter(runner_ups=3), some_texts()[0]
    begin(drafter, text)
    candidates = drafter.propose(0, 3)
    for parent in {candidate.parent for candidate in candidates}:
        beside = [candidate for candidate in candidates if candidate.parent == parent]
        assert [candidate.key[2] for candidate in beside] == [0, 1, 2, 3]
        assert len({candidate.token for candidate in beside}) == 4
        others = [candidate.prior for candidate in beside[1:]]
        assert others == sorted(others, reverse=True)
        assert 0 < sum(others) < 1
    alone = a_drafter(runner_ups=0)
    begin(alone, text)
    wanted = [draft.token for draft in likeliest(candidates)]
    assert [draft.token for draft in alone.propose(0, 3)] == wanted


def test_a_chain_ends_where_its_probability_is_too_low() -> None:
    for text in some_texts():
        drafter = a_drafter()
        begin(drafter, text)
        drafts = likeliest(drafter.propose(0, 4))
        paths = list(itertools.accumulate((draft.prior for draft in drafts), operator.mul))
        for length, (above, below) in enumerate(itertools.pairwise([1.0, *paths])):
            drafter.least = (above + below) / 2
            # The token that is too improbable is known already, so it is proposed.
            assert likeliest(drafter.propose(0, 4)) == drafts[: length + 1]
    assert TrainedDrafter.__init__.__kwdefaults__["least"] == LEAST


def test_a_chain_ends_behind_a_token_that_ends_the_text() -> None:
    drafter, text = a_drafter(), some_texts()[0]
    begin(drafter, text)
    drafts = likeliest(drafter.propose(0, 4))
    drafter._ends = frozenset({drafts[1].token})
    assert likeliest(drafter.propose(0, 4)) == drafts[:2]


def test_only_its_tokens_and_those_of_the_prompt_are_proposed() -> None:
    others = set()
    for text in some_texts():
        drafter = a_drafter()
        prompt = text.ids[: text.prompt].tolist()
        begin(drafter, text)
        for draft in drafter.propose(0, 4):
            assert draft.token in {*TOKENS.tolist(), *prompt}
            others.add(draft.token in TOKENS)
    assert others == {True, False}


def test_nothing_is_proposed_before_a_token_or_within_no_limit() -> None:
    drafter, text = a_drafter(), some_texts()[0]
    drafter.begin(0, int(text.ids[0]))
    assert drafter.propose(0, 4) == []
    feed(drafter, text, 0, 0, text.prompt)
    assert drafter.propose(0, 0) == []


def test_a_text_longer_than_the_first_buffers_is_continued(kind: str) -> None:
    stack = DecoderStack(tiny_model("llama", max_position_embeddings=2048))
    (job,) = jobs(1)
    (text,) = generated(stack, [job])
    ids = torch.cat([text.ids] * 40)
    states = states_of(stack, ids)
    record = replace(a_record(), calibration=BENT)
    made = []
    for step in (7, 10_000):
        network = a_moved_network(stack, architecture=architecture_of(kind))
        drafter = TrainedDrafter(stack, Drafter(network, TOKENS, TABLE, record), least=0.0)
        drafter.begin(0, int(ids[0]))
        for start in range(0, len(ids) - 1, step):
            stop = min(len(ids) - 1, start + step)
            drafter.observe(0, ids[start + 1 : stop + 1].tolist(), states[start:stop])
            if step == 7:
                drafter.propose(0, 3)
        # Both know the same tokens of the prompt.
        drafter._texts[0].head = drafter._head.of_others(ids.tolist())
        made.append(drafter.propose(0, 4))
    assert_alike(*made)


def test_a_model_in_bfloat16_gets_drafts(kind: str) -> None:
    stack = DecoderStack(tiny_model("llama").bfloat16())
    record = replace(a_record(), calibration=BENT)
    network = a_moved_network(a_drafted_stack(), architecture=architecture_of(kind))
    drafter = TrainedDrafter(stack, Drafter(network, TOKENS, TABLE, record), least=0.0)
    text = some_texts()[0]
    drafter.begin(0, int(text.ids[0]))
    drafter.observe(0, text.ids[1 : text.prompt + 1].tolist(), text.features[: text.prompt])
    assert len(likeliest(drafter.propose(0, 3))) == 3
    wanted = torch.float32 if kind == "compiled" else torch.bfloat16
    assert next(drafter.network.parameters()).dtype == wanted
    assert drafter.feature_layers == LAYERS


def test_a_layer_that_computes_something_else_when_compiled_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drafting_layer, "close", lambda *_: False)
    assert not a_drafter().layer.is_compiled


def test_states_and_tokens_must_be_as_many() -> None:
    drafter, text = a_drafter(), some_texts()[0]
    drafter.begin(0, 5)
    with pytest.raises(ValueError, match="expected as many states as tokens, got 2 and 1"):
        drafter.observe(0, [5], text.features[:2])
    with pytest.raises(ValueError, match="expected as many states as tokens, got 0 and 1"):
        drafter.observe(0, [5], None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("engine", ["auto", "model"])
def test_drafts_do_not_change_the_text(engine: Any, architecture: Architecture) -> None:
    stack, drafter = a_drafted_stack(), a_drafter(architecture=architecture)
    early = EarlyExit(stack, engine=engine)
    drafted = 0
    for text in some_texts():
        prompt = text.ids[None, : text.prompt].long()
        settings = {"max_new_tokens": 24, "return_dict_in_generate": True}
        made: Any = early.generate(
            prompt, verify=True, drafter=drafter, pass_costs=FREE, **settings
        )
        own: Any = early.generate(prompt, **settings)
        assert made.sequences.equal(own.sequences)
        drafted += dict(zip(made.proposers, made.proposed, strict=True))["drafter"]
    assert drafted > 0


def test_a_batch_is_drafted_and_keeps_its_texts() -> None:
    stack, drafter = a_drafted_stack(), a_drafter()
    early = EarlyExit(stack)
    texts = some_texts()[:3]
    longest = max(text.prompt for text in texts)
    ids = torch.zeros((3, longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, longest - text.prompt :] = text.ids[: text.prompt]
        mask[row, longest - text.prompt :] = 1
    settings = {"max_new_tokens": 16}
    made = early.generate(ids, mask, verify=True, drafter=drafter, pass_costs=FREE, **settings)
    assert made.equal(early.generate(ids, mask, **settings))


def test_without_its_network_only_the_table_proposes() -> None:
    stack, drafter = a_drafted_stack(), a_drafter(network=False)
    assert (drafter.feature_layers, drafter.companions) == ((), (TABLE,))
    text = some_texts()[0]
    begin(drafter, text)
    assert drafter.propose(0, 4) == []
    prompt = text.ids[None, : text.prompt].long()
    made = EarlyExit(stack).generate(
        prompt, max_new_tokens=8, verify=True, drafter=drafter, pass_costs=FREE
    )
    assert made.equal(EarlyExit(stack).generate(prompt, max_new_tokens=8))


@pytest.mark.parametrize(("use", "network"), [("table", False), ("table and network", True)])
def test_the_network_is_used_unless_the_table_alone_was_faster(use: Any, network: bool) -> None:
    stack = a_drafted_stack()
    record = replace(a_record(), use=use)
    made = Drafter(a_moved_network(stack), TOKENS, TABLE, record)
    assert TrainedDrafter(stack, made).has_network == network
    assert TrainedDrafter(stack, made, network=not network).has_network != network


def test_another_model_is_refused() -> None:
    other = DecoderStack(copy.deepcopy(a_drafted_stack().model))
    other.model.model.embed_tokens.weight.data += 1
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(ModelError, match="the weights of this drafter belong to"):
        EarlyExit(other).generate(ids, verify=True, drafter=a_drafter(), max_new_tokens=2)
