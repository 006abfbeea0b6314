"""Lossless decoding gives the full model's text, whatever is drafted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drafting import FREE, Oracle, Stubborn
from support.engines import BEST, KINDS
from support.tiny_models import FAMILIES, VOCABULARY, random_ids, tiny_model
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.decoding.drafting.proposers import Proposer
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.growing_text import Generation
from cascade.models.stack import DecoderStack

SUPPORTED = ("llama", "qwen2", "qwen3", "mistral", "smollm3")

_early: dict[Any, EarlyExit] = {}


def early_of(family: str, engine: Any = "auto", dtype: torch.dtype = torch.float32) -> EarlyExit:
    key = (family, engine, dtype)
    if key not in _early:
        stack = DecoderStack(copy.deepcopy(tiny_model(family)).to(dtype))
        _early[key] = EarlyExit(stack, engine=engine)
    return _early[key]


def own_text(stack: DecoderStack, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Return what `generate` of transformers returns."""
    model: Any = stack.model
    mask = torch.ones_like(ids) if mask is None else mask
    kwargs = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | kwargs
    made: Tensor = model.generate(ids, attention_mask=mask, **kwargs)
    return made


def verified(early: EarlyExit, ids: Tensor, *args: Any, **kwargs: Any) -> Generation:
    kwargs = {"do_sample": False, "eos_token_id": (), "pass_costs": FREE} | kwargs
    made = early.generate(ids, *args, verify=True, return_dict_in_generate=True, **kwargs)
    assert isinstance(made, Generation)
    return made


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_text_is_the_models_own_whatever_is_drafted(data: st.DataObject) -> None:
    early = early_of(data.draw(st.sampled_from(SUPPORTED)), data.draw(st.sampled_from(KINDS)))
    prompt, new = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    ids = random_ids(1, prompt, seed=data.draw(st.integers(0, 99)))
    expected = own_text(early.stack, ids, max_new_tokens=new)
    drafter = Oracle(
        {0: expected[0].tolist()},
        VOCABULARY,
        wrong=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        siblings=data.draw(st.integers(0, 3)),
        length=data.draw(st.integers(1, 9)),
        seed=data.draw(st.integers(0, 99)),
    )
    made = verified(early, ids, max_new_tokens=new, drafter=drafter, draft_length=12)
    assert torch.equal(made.sequences, expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_text_in_half_precision_is_the_models_own_bit_for_bit(data: st.DataObject) -> None:
    early = early_of(data.draw(st.sampled_from(SUPPORTED)), dtype=torch.bfloat16)
    prompt, new = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    ids = random_ids(1, prompt, seed=data.draw(st.integers(0, 99)))
    expected = own_text(early.stack, ids, max_new_tokens=new)
    drafter = Oracle(
        {0: expected[0].tolist()},
        VOCABULARY,
        wrong=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        siblings=data.draw(st.integers(0, 2)),
        seed=data.draw(st.integers(0, 99)),
    )
    made = verified(early, ids, max_new_tokens=new, drafter=drafter)
    assert torch.equal(made.sequences, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_its_own_text(family: str) -> None:
    early = early_of(family)
    ids = random_ids(1, 9)
    expected = own_text(early.stack, ids, max_new_tokens=16)
    drafter = Oracle({0: expected[0].tolist()}, VOCABULARY, wrong=0.2)
    made = verified(early, ids, max_new_tokens=16, drafter=drafter)
    assert torch.equal(made.sequences, expected)
    assert made.accepted > 0
    assert made.engine is not None
    assert made.engine.startswith(BEST if family in SUPPORTED else "model (")


def test_right_drafts_save_passes() -> None:
    early, ids = early_of("llama"), random_ids(1, 9)
    expected = own_text(early.stack, ids, max_new_tokens=22)
    drafter = Oracle({0: expected[0].tolist()}, VOCABULARY, length=6)
    made = verified(early, ids, max_new_tokens=22, drafter=drafter)
    assert made.passes == 3  # the first token comes with the prompt, then 7 each
    assert made.tokens_per_pass == 7.0
    assert made.accepted == 18
    assert made.drafted >= 18
    assert made.sources is not None
    assert made.proposers == ("n-gram", "oracle", "runner-ups")
    assert made.sources[0].tolist().count(0) == 4


def test_wrong_drafts_cost_passes_but_no_tokens() -> None:
    early, ids = early_of("llama"), random_ids(1, 9)
    expected = own_text(early.stack, ids, max_new_tokens=10)
    unused = next(token for token in range(VOCABULARY) if token not in expected[0])
    made = verified(early, ids, max_new_tokens=10, drafter=Stubborn([unused] * 4))
    assert torch.equal(made.sequences, expected)
    assert made.passes <= 9


@pytest.mark.parametrize("engine", KINDS)
@pytest.mark.parametrize("batch", [2, 5])
def test_rows_of_a_batch_are_independent(batch: int, engine: str) -> None:
    early = early_of("qwen3", engine)
    ids = random_ids(batch, 12)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : row % 4] = 0
    expected = own_text(early.stack, ids, mask, max_new_tokens=15)
    texts = {row: expected[row, row % 4 :].tolist() for row in range(batch)}
    drafter = Oracle(texts, VOCABULARY, wrong=0.4, siblings=1)
    made = verified(early, ids, mask, max_new_tokens=15, drafter=drafter)
    assert torch.equal(made.sequences, expected)
    assert made.accepted > 0


def test_batch_larger_than_a_pass() -> None:
    early = early_of("llama")
    ids = random_ids(40, 5)
    expected = own_text(early.stack, ids, max_new_tokens=6)
    made = verified(early, ids, max_new_tokens=6)
    assert torch.equal(made.sequences, expected)


@pytest.mark.parametrize("where", [0, 1, 2, 4, 6, 7])
def test_text_ends_at_an_end_token_inside_a_draft(where: int) -> None:
    early, ids = early_of("llama"), random_ids(1, 9, seed=2)
    plain = own_text(early.stack, ids, max_new_tokens=12)
    end = int(plain[0, 9 + where])
    assert end not in plain[0, 9 : 9 + where]
    expected = own_text(early.stack, ids, max_new_tokens=12, eos_token_id=end)
    drafter = Oracle({0: plain[0].tolist()}, VOCABULARY)
    made = verified(early, ids, max_new_tokens=12, drafter=drafter, eos_token_id=end)
    assert torch.equal(made.sequences, expected)


def test_rows_of_a_batch_end_at_different_columns() -> None:
    early, ids = early_of("llama"), random_ids(3, 9)
    plain = own_text(early.stack, ids, max_new_tokens=12)
    end = int(plain[1, 12])
    expected = own_text(early.stack, ids, max_new_tokens=12, eos_token_id=end)
    texts = {row: plain[row].tolist() for row in range(3)}
    drafter = Oracle(texts, VOCABULARY, wrong=0.2)
    made = verified(
        early, ids, max_new_tokens=12, drafter=drafter, eos_token_id=end, pad_token_id=0
    )
    assert torch.equal(made.sequences, expected)


@pytest.mark.parametrize("engine", KINDS)
@pytest.mark.parametrize(
    "settings_",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7, 9]]},
        {"min_new_tokens": 6, "eos_token_id": 11},
    ],
    ids=lambda given: next(iter(given)),
)
def test_penalties_see_the_draft(settings_: dict[str, Any], engine: str) -> None:
    early, ids = early_of("llama", engine), random_ids(1, 9)
    expected = own_text(early.stack, ids, max_new_tokens=16, **settings_)
    drafter = Oracle({0: expected[0].tolist()}, VOCABULARY, wrong=0.2, siblings=1)
    made = verified(early, ids, max_new_tokens=16, drafter=drafter, **settings_)
    assert torch.equal(made.sequences, expected)
    assert made.accepted > 0


@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_sampled_text_is_that_of_plain_sampling(batch: int, temperature: float) -> None:
    early = early_of("qwen2")
    plain = early_of("qwen2", "model")
    ids = random_ids(batch, 9)
    sampling = {"do_sample": True, "temperature": temperature, "seed": 3, "max_new_tokens": 14}
    expected = plain.generate(ids, eos_token_id=(), **sampling)
    assert isinstance(expected, Tensor)
    texts = {row: expected[row].tolist() for row in range(batch)}
    drafter = Oracle(texts, VOCABULARY, wrong=0.3, siblings=2)
    made = verified(early, ids, drafter=drafter, **sampling)
    assert torch.equal(made.sequences, expected)
    other = verified(early, ids, **(sampling | {"seed": 4}))
    assert not torch.equal(other.sequences, expected)


def test_full_depth_without_drafts_uses_the_engine() -> None:
    early, ids = early_of("llama"), random_ids(1, 9)
    made = early.generate(ids, max_new_tokens=8, eos_token_id=(), return_dict_in_generate=True)
    assert isinstance(made, Generation)
    assert made.engine.startswith(BEST)
    assert made.drafted == 0
    assert made.passes == 7
    assert torch.equal(made.sequences, own_text(early.stack, ids, max_new_tokens=8))


def test_text_up_to_the_last_position() -> None:
    early = early_of("llama")
    limit = early.stack.max_positions
    assert limit is not None
    ids = random_ids(1, limit - 5)
    expected = own_text(early.stack, ids, max_new_tokens=5)
    drafter = Oracle({0: expected[0].tolist()}, VOCABULARY, siblings=3)
    made = verified(early, ids, max_new_tokens=5, drafter=drafter, draft_length=12)
    assert torch.equal(made.sequences, expected)


def test_hooked_model_is_decoded_by_its_own_modules() -> None:
    stack = DecoderStack(copy.deepcopy(tiny_model("llama")))
    early, ids = EarlyExit(stack), random_ids(1, 9)
    up = stack.layers[1].get_submodule("mlp.up_proj")
    up.register_forward_hook(lambda _, __, output: 2 * output)
    expected = own_text(stack, ids, max_new_tokens=12)
    made = verified(early, ids, max_new_tokens=12)
    assert torch.equal(made.sequences, expected)
    assert made.engine == "model (its layers have hooks)"


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"drafter": 3}, "expected a drafter with the methods of Proposer, got int"),
        ({"pass_costs": []}, r"expected pass_costs above 0, got \[\]"),
        ({"pass_costs": [1.0, -1.0]}, "expected pass_costs above 0"),
        ({"draft_length": 0}, "expected a draft_length of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verified(early_of("llama"), random_ids(1, 5), **given_)


@pytest.mark.parametrize("token", [-1, VOCABULARY, 10**9])
def test_drafts_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(UsageError) as error:
        verified(early_of("llama"), random_ids(1, 5), drafter=Stubborn([token]), max_new_tokens=9)
    assert str(error.value) == (
        f"expected drafted tokens in 0..96, got {token} from the drafter stubborn; use a drafter of"
        " this model's vocabulary"
    )


def test_drafter_needs_verification_without_exits() -> None:
    early = early_of("llama")
    with pytest.raises(UsageError, match="a drafter needs verify=True and no exits"):
        early.generate(random_ids(1, 5), drafter=Proposer())
    exits = EarlyExit(early.stack, layer=2, threshold=0.5, propagation="exact")
    with pytest.raises(UsageError, match="a drafter needs verify=True and no exits"):
        exits.generate(random_ids(1, 5), verify=True, drafter=Proposer())
