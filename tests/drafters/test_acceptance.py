"""Acceptance on held-out texts is that of chains which are decoded one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_drafters import (
    DRAFTED,
    LAYERS,
    a_drafted_stack,
    a_moved_network,
    drafted_alone,
    some_texts,
)

from cascade.drafters.acceptance import (
    CHAIN,
    Chains,
    accepted_by_position,
    calibrated,
    calibration_of,
    chains_of,
    evaluation_of,
    tokens_per_pass,
)
from cascade.drafters.network.drafter_network import DraftHead, embeddings_of
from cascade.drafters.network.layers import rotary_tables
from cascade.drafters.records import BINS
from cascade.drafters.texts.batches import GeneratedText

#: Half of the vocabulary, so that the tokens of the prompt matter.
TOKENS = torch.arange(1, 97, 2)


@pytest.mark.parametrize("family", DRAFTED)
def test_chains_are_those_that_are_drafted_alone_from_each_place(family: str) -> None:
    stack = a_drafted_stack(family)
    network, head = a_moved_network(stack), DraftHead(stack, TOKENS, torch.float32)
    checked = 0
    for text in some_texts(family):
        ids = text.ids.tolist()
        with torch.no_grad():
            found = chains_of(network, head, embeddings_of(stack), text, rotary_tables(stack, 64))
            assert len(found.hits) == max(0, len(ids) - 1 - text.prompt)
            for row, place in enumerate(range(text.prompt - 1, len(ids) - 2)):
                tokens, probabilities = drafted_alone(network, stack, text, place, TOKENS.tolist())
                rest = ids[place + 2 :]
                right = [one == two for one, two in zip(tokens, rest, strict=False)]
                accepted = right.index(False) if False in right else len(right)
                assert int(found.accepted[row]) == accepted
                # Behind the first wrong draft, the text and the chain are different.
                for step in range(min(accepted + 1, len(right))):
                    assert bool(found.hits[row, step]) == right[step]
                    probability = float(found.probabilities[row, step])
                    assert probability == pytest.approx(probabilities[step], rel=1e-4)
                assert found.within[row].tolist() == [step < len(rest) for step in range(CHAIN)]
                checked += 1
    assert checked > 20


def test_a_token_of_the_prompt_can_be_proposed() -> None:
    stack = a_drafted_stack()
    network = a_moved_network(stack)
    head = DraftHead(stack, torch.tensor([1, 3]), torch.float32)
    text = max(some_texts(), key=lambda text: text.new_tokens)
    chains = chains_of(network, head, embeddings_of(stack), text, rotary_tables(stack, 64))
    alone = torch.tensor([1, 3])
    whole = DraftHead(stack, alone, torch.float32).with_tokens(text.ids[: text.prompt].tolist())
    assert len(whole.tokens) > 2
    # With two tokens to choose from, no probability could be below a half.
    assert float(chains.probabilities[chains.within].min()) < 0.5


def some_chains(seed: int, places: int = 40) -> Chains:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand((places, CHAIN), generator=generator)
    hits = torch.rand((places, CHAIN), generator=generator) < probabilities
    within = torch.ones((places, CHAIN), dtype=torch.bool)
    for step in range(CHAIN):
        within[places - step :, step] = False
    return Chains(hits & within, probabilities, within)


def a_text(ids: Sequence[int], prompt: int) -> GeneratedText:
    return GeneratedText(torch.tensor(ids, dtype=torch.int32), prompt, True, torch.zeros(0))


def test_acceptance_by_position_counts_drafts_whose_predecessors_were_accepted() -> None:
    hits = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]]).bool()
    within = torch.ones_like(hits)
    within[3, 3] = False
    found = accepted_by_position([Chains(hits, torch.zeros(4, 4), within)])
    assert found == [3 / 4, 2 / 3, 1 / 2, 0.0]


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 2**20))
def test_tokens_per_pass_are_those_of_decoding_step_by_step(
    places: int, prompt: int, seed: int
) -> None:
    chains = some_chains(seed, places)
    passes = tokens = 0
    while tokens < places:
        row, accepted = chains.hits[tokens], 0
        while accepted < CHAIN and row[accepted]:
            accepted += 1
        # A pass gives the full model's token behind what it accepts, if the text goes on.
        tokens = min(places, tokens + accepted + 1)
        passes += 1
    text = a_text([1] * (prompt + places + 1), prompt)
    assert tokens_per_pass([text], [chains]) == pytest.approx(places / passes)


def test_an_evaluation_has_acceptance_and_tokens_per_pass_of_the_drafter_alone() -> None:
    text, chains = a_text(list(range(45)), 4), some_chains(3)
    found = evaluation_of(7, [text], [chains])
    assert found.step == 7
    assert found.accepted == accepted_by_position([chains])
    assert found.tokens_per_pass == tokens_per_pass([text], [chains])


# --- Calibration ---


def test_calibration_is_the_share_that_is_accepted_by_probability() -> None:
    chains = [some_chains(seed, 500) for seed in range(40)]
    centres = (np.arange(BINS) + 0.5) / BINS
    # Drafts of the first position were accepted with just their probability; a bin has about 1,250.
    np.testing.assert_allclose(calibration_of(chains)[0], centres, atol=0.05)


@given(st.integers(0, 2**20), st.integers(1, 60))
def test_calibration_never_decreases_and_stays_in_0_to_1(seed: int, places: int) -> None:
    for bins in calibration_of([some_chains(seed, places)]):
        assert len(bins) == BINS
        assert bins == sorted(bins)
        assert 0 <= bins[0] <= bins[-1] <= 1
        shares = [calibrated(bins)(probability) for probability in np.linspace(0, 1, 33)]
        assert shares == sorted(shares)


def test_calibration_of_a_later_draft_counts_those_whose_predecessors_were_accepted() -> None:
    hits = torch.tensor([[True, True, True, True]] * 300 + [[False, False, True, True]] * 300)
    chains = [Chains(hits, torch.full((600, CHAIN), 0.6), torch.ones_like(hits))]
    first, second, *_ = calibration_of(chains)
    assert first[9] == pytest.approx(0.5, abs=0.02)
    assert second[9] > 0.98


def test_calibration_is_the_closest_that_never_decreases() -> None:
    # Many drafts of which the likely ones are rejected, and the unlikely ones accepted.
    hits = torch.tensor([[True] * CHAIN] * 300 + [[False] * CHAIN] * 300)
    probabilities = torch.tensor([[0.1] * CHAIN] * 300 + [[0.9] * CHAIN] * 300)
    found = calibration_of([Chains(hits, probabilities, torch.ones_like(hits))])
    assert found[0][2] == pytest.approx(0.5, abs=0.05)
    assert found[0][12] == pytest.approx(0.5, abs=0.05)


def test_network_of_the_tests_reads_the_layers_of_their_texts() -> None:
    assert some_texts()[0].features.shape[1] == len(LAYERS) + 1
