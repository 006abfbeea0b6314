"""Generating is scoring token by token, and verified generation is the full model's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.reference_early_exit import (
    ALL_FAMILIES,
    ALL_PROPAGATIONS,
    CLOSE,
    LAYERS,
    PROPAGATIONS,
    SKIPPING,
    a_bf16_stack,
    a_settled_stack,
    a_stack,
    apart,
    bf16_heads,
    by_hand,
    head_logits,
    one_line,
    own_logits,
    positions_of,
    some_exits,
    some_heads,
    some_mask,
    state_of,
    visited,
)
from support.tiny_models import FAMILIES, VOCABULARY, random_ids, tiny_model, tiny_tokenizer
from tokenizers import decoders
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

from cascade.core.errors import UsageError
from cascade.decoding.early_exit import EarlyExit, Propagation, make_exit
from cascade.decoding.forward import Exit
from cascade.decoding.generation import Generation
from cascade.decoding.kv_cache import KeyValueCache
from cascade.decoding.selective_layers import SkippingLayers
from cascade.models.stack import DecoderStack

INF = math.inf
NEW = 10
PROMPT = random_ids(3, 9, seed=3)
#: The first row is three tokens shorter, padded on the left.
MASK = some_mask(3, 9)
#: Rules that let single tokens go by what they see.
RULES = ("cosine", "mean_cosine", "top2_gap", "max_probability", "entropy", "patience", "random")

#: Rules for families whose tiny models write one token again and again, equally sure of each.
REPEATING = {"gpt2": "cosine", "bloom": "random"}


@functools.cache
def generator(
    family: str,
    propagation: Propagation = "frozen",
    *,
    rule: str = "",
    layers: tuple[int, ...] = (1, 2, 3),
    settled: bool = False,
    skip: bool = True,
) -> EarlyExit:
    """Return early exit whose exits each let about a third of the tokens go."""
    stack = a_settled_stack(family) if settled else a_stack(family)
    heads = None if settled else some_heads(family)
    rule = rule or REPEATING.get(family, "top2_gap")
    exits = some_exits(stack, rule, layers, heads=heads, propagation=propagation, share=0.35)
    return EarlyExit(stack, exits=exits, propagation=propagation, skip=skip)


def generated(early: EarlyExit, *args: Any, **settings: Any) -> Generation:
    """Generate; no token ends a row unless the settings say so."""
    settings = {"max_new_tokens": NEW, "eos_token_id": None} | settings
    result = early.generate(*args, return_dict_in_generate=True, **settings)
    assert isinstance(result, Generation)
    return result


@functools.cache
def a_text(family: str, propagation: Propagation, *, padded: bool = True) -> Generation:
    """Return what a family's generator writes after the prompts; made once, not to be changed."""
    return generated(generator(family, propagation), PROMPT, MASK if padded else None)


def own_generate(stack: DecoderStack, ids: Tensor, **settings: Any) -> Tensor:
    """Generate as the model's users do, without anything of ours."""
    model: Any = stack.model
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 1} | settings
    settings.setdefault("attention_mask", torch.ones_like(ids))
    sequences: Tensor = model.generate(ids, **settings)
    return sequences


@functools.cache
def own_text(stack: DecoderStack, *, padded: bool = True) -> Tensor:
    """Return what the model writes by itself after the prompts; made once, not to be changed."""
    return own_generate(stack, PROMPT, attention_mask=MASK if padded else torch.ones_like(PROMPT))


def longer(mask: Tensor, sequences: Tensor) -> Tensor:
    """Return a prompt's mask with ones for what was generated."""
    new = mask.new_ones((len(mask), sequences.shape[1] - mask.shape[1]))
    return torch.cat([mask, new], dim=1)


# --- Generating is scoring -------------------------------------------------------------------


def check_generating_is_scoring(early: EarlyExit, result: Generation, mask: Tensor | None) -> None:
    """Raise AssertionError unless each new token and its exit are what scoring the text gives."""
    start = PROMPT.shape[1]
    assert result.sequences.shape == (len(PROMPT), start + NEW)
    assert result.exit_layers.shape == (len(PROMPT), NEW)
    assert torch.equal(result.sequences[:, :start], PROMPT)
    score = early.score(result.sequences, None if mask is None else longer(mask, result.sequences))
    assert torch.equal(score.predictions[:, start - 1 : -1], result.sequences[:, start:])
    assert torch.equal(score.exit_layers[:, start - 1 : -1], result.exit_layers)


#: Without padding transformers prepares no mask, which is another way through a layer.
PADDED_AND_NOT = pytest.mark.parametrize(
    ("propagation", "padded"),
    [("frozen", False), *((propagation, True) for propagation in PROPAGATIONS)],
    ids=["frozen-unpadded", *PROPAGATIONS],
)


@PADDED_AND_NOT
@ALL_FAMILIES
def test_generating_is_scoring_the_generated_text(
    family: str, propagation: Propagation, padded: bool
) -> None:
    result = a_text(family, propagation, padded=padded)
    check_generating_is_scoring(generator(family, propagation), result, MASK if padded else None)
    left = set(result.exit_layers.flatten().tolist())
    assert LAYERS in left, "nobody went all the way"
    assert len(left) >= 3, f"only {left}: too few exits to prove anything"


@ALL_PROPAGATIONS
@pytest.mark.parametrize(
    ("family", "rule"),
    [
        (family, rule)
        for family in ("llama", "gpt2")
        for rule in RULES
        if (family, rule) != ("gpt2", "patience")  # two exits that always agree
    ],
)
def test_generating_is_scoring_by_every_rule(
    family: str, rule: str, propagation: Propagation
) -> None:
    early = generator(family, propagation, rule=rule, layers=(2, 3))
    result = generated(early, PROMPT, MASK)
    check_generating_is_scoring(early, result, MASK)
    left = result.exit_layers
    assert 0 < int((left < LAYERS).sum()) < left.numel()


@ALL_PROPAGATIONS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generating_by_a_fixed_exit_is_scoring(family: str, propagation: Propagation) -> None:
    heads = some_heads(family)
    for layer in (1, 3, LAYERS):
        early = EarlyExit(
            a_stack(family),
            layer=layer,
            rule="fixed",
            threshold=1.0,
            heads=heads,
            propagation=propagation,
        )
        result = generated(early, PROMPT, MASK)
        check_generating_is_scoring(early, result, MASK)
        assert bool((result.exit_layers == layer).all())


@ALL_PROPAGATIONS
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_an_exit_at_the_last_layer_is_one_exit_more(family: str, propagation: Propagation) -> None:
    early = generator(family, propagation, layers=(2, LAYERS))
    result = generated(early, PROMPT, MASK)
    check_generating_is_scoring(early, result, MASK)
    assert {2, LAYERS} == set(result.exit_layers.flatten().tolist())


@pytest.mark.parametrize(
    ("family", "propagation"),
    [*((family, "frozen") for family in SKIPPING), ("qwen3", "ridge"), ("gemma3_text", "ridge")],
)
def test_generating_beyond_the_window_and_without_skipping_gives_the_same_text(
    family: str, propagation: Propagation
) -> None:
    packed, generic = (generator(family, propagation, skip=skip) for skip in (True, False))
    assert (packed.fallback_reason is None, generic.fallback_reason is None) == (True, False)
    one, other = a_text(family, propagation), generated(generic, PROMPT, MASK)
    assert one.sequences.shape[1] - 3 >= 2 * 8  # the windows are of 8
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.exit_layers, other.exit_layers)
    assert sum(one.counts.layer_rows) < sum(other.counts.layer_rows)


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_generating_in_bfloat16_agrees_with_scoring(family: str, propagation: Propagation) -> None:
    stack, heads = a_bf16_stack(family), bf16_heads(family)
    rule = REPEATING.get(family, "top2_gap")
    exits = some_exits(stack, rule, (2, 3), heads=heads, propagation=propagation, share=0.35)
    early = EarlyExit(stack, exits=exits, propagation=propagation)
    left = generated(early, PROMPT).exit_layers
    assert 0 < int((left < LAYERS).sum()) < left.numel()
    for ids in (PROMPT, PROMPT[1:2]):
        result = generated(early, ids)
        score = early.score(result.sequences)
        # Eight bits: where two tokens' logits round to one number, either may come first.
        same = score.predictions[:, 8:-1] == result.sequences[:, 9:]
        assert same.float().mean() >= 0.8
        assert (score.exit_layers[:, 8:-1] == result.exit_layers).float().mean() >= 0.8


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_a_left_padded_row_generates_what_it_would_alone(
    family: str, propagation: Propagation
) -> None:
    together = a_text(family, propagation)
    alone = generated(generator(family, propagation), PROMPT[:1, 3:])
    assert torch.equal(together.sequences[:1, 3:], alone.sequences)
    assert torch.equal(together.exit_layers[:1], alone.exit_layers)


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_where_everybody_leaves_the_exit_head_writes_alone(
    family: str, propagation: Propagation
) -> None:
    stack, heads = a_stack(family), some_heads(family)
    early = EarlyExit(
        stack, layer=3, rule="entropy", threshold=-INF, heads=heads, propagation=propagation
    )
    ids = PROMPT
    for _ in range(4):
        logits = head_logits(stack, early.exits[0], visited(stack, ids)[3])[:, -1:]
        ids = torch.cat([ids, logits.argmax(dim=-1)], dim=1)
    assert torch.equal(generated(early, PROMPT, max_new_tokens=4).sequences, ids)


# --- Where nobody leaves: transformers' own generate -----------------------------------------


@functools.cache
def own_ended_text(stack: DecoderStack) -> tuple[int, Tensor]:
    """Return a token that the model itself writes, and its text with rows that end there."""
    end = int(own_text(stack)[1, 13])
    return end, own_generate(stack, PROMPT, attention_mask=MASK, eos_token_id=end)


@PADDED_AND_NOT
@ALL_FAMILIES
def test_where_nobody_leaves_the_text_is_that_of_transformers(
    family: str, propagation: Propagation, padded: bool
) -> None:
    stack, heads = a_stack(family), some_heads(family)
    exits = [
        make_exit(stack, layer, "top2_gap", INF, heads=heads, propagation=propagation)
        for layer in (1, 3)
    ]
    early = EarlyExit(stack, exits=exits, propagation=propagation)
    result = generated(early, PROMPT, MASK if padded else None)
    expected = own_text(stack, padded=padded)
    assert result.sequences.dtype == expected.dtype
    assert torch.equal(result.sequences, expected)
    assert bool((result.exit_layers == LAYERS).all())
    if padded:
        end, expected = own_ended_text(stack)
        result = generated(early, PROMPT, MASK, eos_token_id=end, pad_token_id=1)
        assert torch.equal(result.sequences, expected)
        assert set(result.exit_layers.flatten().tolist()) <= {0, LAYERS}


@ALL_FAMILIES
def test_without_any_exit_the_text_is_that_of_transformers(family: str) -> None:
    stack = a_stack(family)
    end, expected = own_ended_text(stack)
    result = generated(EarlyExit(stack), PROMPT, MASK, eos_token_id=end, pad_token_id=1)
    assert torch.equal(result.sequences, expected)


@ALL_PROPAGATIONS
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neo", "falcon"])
def test_rows_end_one_by_one_and_are_padded(family: str, propagation: Propagation) -> None:
    early = generator(family, propagation)
    free = generated(early, PROMPT, MASK)
    ends = [int(free.sequences[0, 9 + 2]), int(free.sequences[1, 9 + 5])]
    result = generated(early, PROMPT, MASK, eos_token_id=ends, pad_token_id=1)
    lengths = [length_of(row, ends) for row in free.sequences[:, 9:].tolist()]
    assert len(set(lengths)) > 1
    assert result.sequences.shape[1] == 9 + max(lengths)
    for row, length in enumerate(lengths):
        kept = 9 + length
        assert torch.equal(result.sequences[row, :kept], free.sequences[row, :kept])
        assert bool((result.sequences[row, kept:] == 1).all())
        assert torch.equal(result.exit_layers[row, :length], free.exit_layers[row, :length])
        assert not bool(result.exit_layers[row, length:].any())


def length_of(tokens: Sequence[int], ends: Sequence[int]) -> int:
    """Return how many tokens a row has, its end included."""
    return next((place for place, token in enumerate(tokens, 1) if token in ends), len(tokens))


def test_a_row_that_ended_costs_nothing_more() -> None:
    early = generator("llama")
    alone = generated(early, PROMPT[2:])
    end = int(generated(early, PROMPT[1:]).sequences[0, 9])
    assert end not in alone.sequences[0, 9:].tolist()
    both = generated(early, PROMPT[1:], eos_token_id=end)
    assert both.exit_layers[0].tolist()[1:] == [0] * (NEW - 1)
    assert torch.equal(both.sequences[1:], alone.sequences)
    prompt = both.passed - alone.passed
    assert prompt == 9
    rows = [a - b for a, b in zip(both.counts.layer_rows, alone.counts.layer_rows, strict=True)]
    assert rows[0] == 9


def test_generation_stops_at_once_where_every_row_ends() -> None:
    early = generator("llama")
    first = generated(early, PROMPT).sequences[:, 9].tolist()
    result = generated(early, PROMPT, eos_token_id=first)
    assert result.sequences.shape == (3, 10)
    assert result.passed == 27


def test_the_models_own_settings_hold_where_nothing_else_is_said() -> None:
    stack = DecoderStack(tiny_model("llama"))
    own: Any = stack.model
    own.generation_config = GenerationConfig(
        eos_token_id=own_ended_text(a_stack("llama"))[0], pad_token_id=0
    )
    # Without a length of its own transformers makes 20 new tokens, and warns.
    expected = own.generate(PROMPT, attention_mask=MASK, max_new_tokens=20)
    early = EarlyExit(stack)
    assert torch.equal(as_tensor(early.generate(PROMPT, MASK)), expected)
    assert expected.shape[1] == 9 + 20
    assert 0 in expected
    given = GenerationConfig(max_new_tokens=8)
    expected = own.generate(PROMPT, attention_mask=MASK, generation_config=given)
    got = as_tensor(early.generate(PROMPT, MASK, generation_config=given))
    assert 0 in expected
    assert torch.equal(got, expected)
    got = as_tensor(early.generate(PROMPT, MASK, generation_config=given, eos_token_id=None))
    assert torch.equal(got, own_generate(stack, PROMPT, attention_mask=MASK, max_new_tokens=8))


def as_tensor(result: Tensor | Generation) -> Tensor:
    assert isinstance(result, Tensor)
    return result


def test_a_given_generation_config_goes_before_the_models_own_and_behind_single_settings() -> None:
    early = EarlyExit(a_stack("llama"))
    given = GenerationConfig(max_length=14, eos_token_id=None)
    assert generated(
        early, PROMPT, max_new_tokens=None, generation_config=given
    ).sequences.shape == (
        3,
        14,
    )
    given = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.5, top_p=0.9, top_k=7)
    drawn = early.generate(PROMPT, generation_config=given, eos_token_id=None, seed=4)
    assert torch.equal(
        as_tensor(drawn),
        generated(
            early,
            PROMPT,
            max_new_tokens=3,
            do_sample=True,
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            seed=4,
        ).sequences,
    )
    assert generated(early, PROMPT, generation_config=given, max_new_tokens=5).sequences.shape == (
        3,
        14,
    )


def test_twenty_new_tokens_are_made_where_nobody_says_how_many_and_never_too_many() -> None:
    early = EarlyExit(a_stack("llama"))
    settings: dict[str, Any] = {"max_new_tokens": None}
    assert generated(early, PROMPT, **settings).sequences.shape == (3, 29)
    assert generated(early, random_ids(1, 60), **settings).sequences.shape == (1, 64)
    assert generated(early, random_ids(1, 60), max_new_tokens=4).sequences.shape == (1, 64)
    without_end = EarlyExit(a_stack("bloom"))
    assert without_end.stack.max_positions is None
    assert generated(without_end, random_ids(1, 60), **settings).sequences.shape == (1, 80)


# --- Padding without a mask ------------------------------------------------------------------

#: As a tokenizer that pads with token 0 would give it.
PADDED = PROMPT.masked_fill(MASK == 0, 0)


def padding_stack(family: str, **settings: Any) -> DecoderStack:
    """Return a stack whose generation config says how it pads and ends."""
    stack = DecoderStack(tiny_model(family))
    stack.model.generation_config = GenerationConfig(**settings)
    return stack


@pytest.mark.parametrize("propagation", ["frozen", "exact"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_padding_without_a_mask_is_found_where_transformers_finds_it(
    family: str, propagation: Propagation
) -> None:
    stack = padding_stack(family, pad_token_id=0, eos_token_id=1)
    expected = own_generate(stack, PADDED, attention_mask=None, pad_token_id=0, eos_token_id=1)
    early = EarlyExit(stack, propagation=propagation)
    got = as_tensor(early.generate(PADDED, max_new_tokens=NEW))
    assert torch.equal(got, expected)
    assert torch.equal(got, as_tensor(early.generate(PADDED, MASK, max_new_tokens=NEW)))
    as_text = as_tensor(early.generate(PADDED, torch.ones_like(PADDED), max_new_tokens=NEW))
    assert not torch.equal(got, as_text)


@pytest.mark.parametrize(
    ("own", "single"),
    [
        ({"pad_token_id": 0, "eos_token_id": 0}, {}),
        ({"pad_token_id": 0, "eos_token_id": [1, 0]}, {}),
        ({"pad_token_id": 0, "eos_token_id": 1}, {"eos_token_id": 0}),
        ({"eos_token_id": 0}, {}),
        ({}, {}),
    ],
)
def test_a_token_that_may_end_rows_or_that_nobody_pads_with_is_text(
    own: dict[str, Any], single: dict[str, Any]
) -> None:
    stack = padding_stack("llama", **own)
    settings: dict[str, Any] = {"max_new_tokens": NEW} | single
    model: Any = stack.model
    expected = model.generate(PADDED, **settings)
    got = as_tensor(EarlyExit(stack).generate(PADDED, **settings))
    assert torch.equal(got, expected)
    as_text = model.generate(PADDED, attention_mask=torch.ones_like(PADDED), **settings)
    assert torch.equal(got, as_text)


def test_where_no_token_ends_a_row_padding_is_found_too() -> None:
    stack = padding_stack("llama", pad_token_id=0, eos_token_id=0)
    expected = own_generate(stack, PADDED, attention_mask=None, pad_token_id=0)
    assert torch.equal(generated(EarlyExit(stack), PADDED).sequences, expected)
    assert torch.equal(expected, own_generate(stack, PADDED, attention_mask=MASK))


@pytest.mark.parametrize("propagation", ["frozen", "exact"])
def test_scoring_finds_the_padding_that_generating_found(propagation: Propagation) -> None:
    stack = padding_stack("llama", pad_token_id=0, eos_token_id=1)
    early = EarlyExit(stack, exits=some_exits(stack, layers=(2, 3)), propagation=propagation)
    result = generated(early, PADDED, eos_token_id=1)
    assert 0 not in result.sequences[:, 9:]
    score = early.score(result.sequences)
    assert torch.equal(
        score.scored, early.score(result.sequences, longer(MASK, result.sequences)).scored
    )
    assert torch.equal(score.predictions[:, 8:-1], result.sequences[:, 9:])
    assert torch.equal(score.exit_layers[:, 8:-1], result.exit_layers)


def test_scoring_takes_rows_that_ended_as_generating_fills_them() -> None:
    stack = padding_stack("llama", pad_token_id=0, eos_token_id=1)
    early = EarlyExit(stack)
    ids = PADDED.clone()
    ids[1, -2:] = 0
    mask = (ids != 0).long()
    assert torch.equal(early.score(ids).scored, early.score(ids, mask).scored)
    assert early.score(ids).perplexity == early.score(ids, mask).perplexity
    text = early.score(ids, torch.ones_like(ids))
    assert text.perplexity != early.score(ids).perplexity
    stack.model.generation_config.eos_token_id = 0
    assert early.score(ids).perplexity == text.perplexity


@pytest.mark.parametrize("row", [[5, 0, 6], [0, 5, 0, 6], [0, 0], [5, 0, 0, 6, 0]])
def test_padding_that_may_be_text_is_refused(row: list[int]) -> None:
    stack = padding_stack("llama", pad_token_id=0, eos_token_id=1)
    early, ids = EarlyExit(stack), torch.tensor([row, [7] * len(row)])
    for call in (early.score, early.generate):
        with pytest.raises(UsageError) as error:
            call(ids)
        assert one_line(error) == (
            "token 0, with which the model pads, stands between other tokens or alone in a row; "
            "give an attention_mask that says what is padding"
        )
    assert early.score(ids, torch.ones_like(ids)).scored.all()


# --- Stop strings and streams ----------------------------------------------------------------


@functools.cache
def speaking(propagation: Propagation, *, exits: bool = True) -> EarlyExit:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # a character per token, no spaces
    stack = DecoderStack(tiny_model("llama"), tokenizer=tokenizer)
    if not exits:
        return EarlyExit(stack)
    return EarlyExit(
        stack,
        exits=some_exits(stack, layers=(2, 3), heads=some_heads("llama"), propagation=propagation),
        propagation=propagation,
    )


@ALL_PROPAGATIONS
def test_stop_strings_end_their_row_and_are_kept(propagation: Propagation) -> None:
    early = speaking(propagation)
    tokenizer: Any = early.stack.tokenizer
    free = generated(early, PROMPT, MASK)
    texts = [tokenizer.decode(row) for row in free.sequences[:, 9:]]
    stops = [tokenizer.decode(free.sequences[0, 11:13]), tokenizer.decode(free.sequences[1, 14:16])]
    result = generated(early, PROMPT, MASK, stop_strings=stops, pad_token_id=1)
    lengths = []
    for row, text in enumerate(texts):
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        length = min(ends) if ends else NEW
        lengths.append(length)
        assert torch.equal(result.sequences[row, : 9 + length], free.sequences[row, : 9 + length])
        assert bool((result.sequences[row, 9 + length :] == 1).all())
    assert lengths[0] <= 4
    assert lengths[1] <= 7
    assert len(set(lengths)) > 1
    one = generated(early, PROMPT, MASK, stop_strings=stops[0], pad_token_id=1)
    assert torch.equal(one.sequences[0, : 9 + lengths[0]], free.sequences[0, : 9 + lengths[0]])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_strings_are_those_of_transformers(length: int) -> None:
    early = speaking("frozen", exits=False)
    tokenizer: Any = early.stack.tokenizer
    free = own_generate(early.stack, PROMPT)
    # Without any token that ends rows, transformers goes on with rows that a string has ended.
    stops = {"stop_strings": [tokenizer.decode(free[1, 13 : 13 + length])], "eos_token_id": 0}
    assert 0 not in free
    expected = own_generate(early.stack, PROMPT, tokenizer=tokenizer, **stops)
    got = generated(early, PROMPT, pad_token_id=1, **stops).sequences
    assert torch.equal(got, expected)
    assert not torch.equal(got, free)


class Recorder(BaseStreamer):
    """Keeps what it is given, and when it ended."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@ALL_PROPAGATIONS
def test_a_streamer_gets_the_prompt_and_each_token_once_in_order(
    propagation: Propagation, verify: bool
) -> None:
    if verify and propagation != "exact":
        return
    streamer = Recorder()
    early = speaking(propagation)
    result = generated(early, PROMPT[:1], streamer=streamer, verify=verify)
    assert streamer.given[0] == PROMPT[0].tolist()
    assert streamer.given[1:] == [[token] for token in result.sequences[0, 9:].tolist()]
    assert streamer.ended == 1


def test_a_text_streamer_prints_what_transformers_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    early = speaking("frozen", exits=False)
    tokenizer: Any = early.stack.tokenizer
    own_generate(early.stack, PROMPT[:1], streamer=TextStreamer(tokenizer))
    expected = capsys.readouterr().out
    generated(early, PROMPT[:1], streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == expected
    assert len(expected) > NEW


def test_a_streamer_sees_a_token_before_the_next_one_is_made() -> None:
    early = speaking("frozen")
    passes: list[int] = []

    class Counting(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            passes.append(calls[0])

    calls = [0]
    handle = (
        early.stack.layers[0]
        .get_submodule("mlp")
        .register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    )
    try:
        generated(early, PROMPT[:1], streamer=Counting())
    finally:
        handle.remove()
    assert passes == list(range(NEW + 1))


# --- Sampling --------------------------------------------------------------------------------


def drawn(early: EarlyExit, ids: Tensor, **settings: Any) -> Tensor:
    """Draw among all tokens, unless the settings say otherwise."""
    return generated(early, ids, do_sample=True, **{"top_k": 0} | settings).sequences


@ALL_PROPAGATIONS
def test_the_same_seed_draws_the_same_text_and_another_another(propagation: Propagation) -> None:
    early = generator("llama", propagation)
    first, again, other = (drawn(early, PROMPT, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert bool((first != other).any(dim=1).all())
    assert not torch.equal(first, generated(early, PROMPT).sequences)


def test_rows_draw_each_for_itself_and_the_first_as_it_would_alone() -> None:
    early = generator("llama")
    same = PROMPT[:1].expand(4, -1)
    rows = drawn(early, same)
    assert len({tuple(row) for row in rows.tolist()}) == 4
    assert torch.equal(rows[:1], drawn(early, same[:1]))


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**32 - 1, 20_240_101, 2**63, 10**30])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert drawn(EarlyExit(a_stack("llama")), PROMPT, seed=seed).shape == (3, 9 + NEW)


@functools.cache
def draws(**settings: Any) -> Tensor:
    """Return 4,096 next tokens after one prompt: 256 rows of 16 seeds."""
    early = EarlyExit(a_stack("llama"))
    rows = PROMPT[:1].expand(256, -1)
    return torch.cat(
        [drawn(early, rows, seed=seed, max_new_tokens=1, **settings)[:, -1] for seed in range(16)]
    )


def check_distribution(tokens: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless the tokens could be draws from the probabilities."""
    count = len(tokens)
    shares = torch.bincount(tokens, minlength=VOCABULARY).double() / count
    spread = (expected * (1 - expected) / count).sqrt()
    # 4.5 standard deviations, and one token for the rare ones: once in 10,000 tables of 97.
    assert bool(((shares - expected).abs() <= 4.5 * spread + 1 / count).all())


@functools.cache
def next_logits() -> Tensor:
    return own_logits(a_stack("llama"), PROMPT[:1])[0, -1].double()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax_of_the_logits(temperature: float) -> None:
    tokens = draws(temperature=temperature)
    check_distribution(tokens, (next_logits() / temperature).softmax(dim=-1))
    if temperature != 1.0:
        with pytest.raises(AssertionError):
            check_distribution(tokens, next_logits().softmax(dim=-1))


def test_top_k_draws_among_so_many_in_their_proportions() -> None:
    kept = next_logits().topk(5)
    expected = torch.zeros(VOCABULARY).double()
    expected[kept.indices] = kept.values.softmax(dim=-1)
    check_distribution(draws(top_k=5), expected)
    assert set(draws(top_k=5).tolist()) == set(kept.indices.tolist())


def test_top_p_draws_among_the_fewest_that_reach_the_probability() -> None:
    ordered = next_logits().softmax(dim=-1).sort(descending=True)
    before = ordered.values.cumsum(dim=0) - ordered.values
    kept = ordered.indices[before < 0.4]
    assert 2 < len(kept) < VOCABULARY / 2
    expected = torch.zeros(VOCABULARY).double()
    expected[kept] = next_logits()[kept].softmax(dim=-1)
    check_distribution(draws(top_p=0.4), expected)
    assert set(draws(top_p=0.4).tolist()) == set(kept.tolist())


def own_draws(stack: DecoderStack, **settings: Any) -> Tensor:
    """Return 4,096 next tokens that the model draws by itself."""
    rows = PROMPT[:1].expand(256, -1)
    torch.manual_seed(0)
    return torch.cat(
        [
            own_generate(stack, rows, do_sample=True, max_new_tokens=1, **settings)[:, -1]
            for _ in range(16)
        ]
    )


def among_the_best(count: int) -> Tensor:
    """Return the probabilities of a draw among so many of the likeliest tokens."""
    kept = next_logits().topk(count)
    expected = torch.zeros(VOCABULARY).double()
    expected[kept.indices] = kept.values.softmax(dim=-1)
    return expected


def open_draws(early: EarlyExit, **settings: Any) -> Tensor:
    """Return 4,096 next tokens drawn by nothing but the settings given."""
    settings = {"max_new_tokens": 1, "do_sample": True} | settings
    rows = PROMPT[:1].expand(256, -1)
    return torch.cat(
        [as_tensor(early.generate(rows, seed=seed, **settings))[:, -1] for seed in range(16)]
    )


def test_a_draw_of_which_nothing_is_said_is_that_of_transformers() -> None:
    theirs, ours = own_draws(a_stack("llama")), open_draws(EarlyExit(a_stack("llama")))
    for tokens in (theirs, ours):
        check_distribution(tokens, among_the_best(50))
    # Draws among all tokens, as ours once were, would show.
    with pytest.raises(AssertionError):
        check_distribution(draws(), among_the_best(50))


@pytest.mark.parametrize(
    ("own", "given", "single", "kept"),
    [
        ({"top_k": 4}, {}, {}, 4),
        ({"top_k": 4}, {"top_k": 50}, {}, 50),
        ({"top_k": 4}, {"top_k": 9}, {"top_k": 6}, 6),
        ({"top_k": 4}, {}, {"top_k": 0}, VOCABULARY),
        ({"top_k": 4}, {}, {"top_k": None}, VOCABULARY),
        ({"top_p": 0.01}, {"top_k": 7}, {"top_p": 1.0}, 7),
        ({"temperature": 1e-6}, {"top_k": 7}, {"temperature": None}, 7),
    ],
)
def test_whoever_says_how_to_draw_is_heard_as_by_transformers(
    own: dict[str, Any], given: dict[str, Any], single: dict[str, Any], kept: int
) -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.model.generation_config = GenerationConfig(pad_token_id=1, **own)
    config = GenerationConfig(max_new_tokens=1, do_sample=True, **given)
    settings: dict[str, Any] = {"generation_config": config} | single
    for tokens in (own_draws(stack, **settings), open_draws(EarlyExit(stack), **settings)):
        check_distribution(tokens, among_the_best(kept))


def test_neighbouring_rows_and_seeds_draw_independently() -> None:
    tokens = draws().view(16, 256)
    chance = next_logits().softmax(dim=-1).square().sum().item()
    for one, other in ((tokens[:, 1:], tokens[:, :-1]), (tokens[1:], tokens[:-1])):
        count = one.numel()
        same = (one == other).double().mean().item()
        assert abs(same - chance) <= 4.5 * math.sqrt(chance * (1 - chance) / count)


def test_neighbouring_places_draw_independently() -> None:
    # Every token comes from one flat distribution, so places agree as often as chance has it.
    stack = DecoderStack(tiny_model("llama"))
    with torch.no_grad():
        stack.model.get_parameter("lm_head.weight").zero_()
    new = drawn(EarlyExit(stack), random_ids(128, 1), max_new_tokens=24)[:, 1:]
    same = (new[:, 1:] == new[:, :-1]).double().mean().item()
    chance = 1 / VOCABULARY
    assert abs(same - chance) <= 4.5 * math.sqrt(chance / new[:, 1:].numel())
    check_distribution(new.flatten(), torch.full((VOCABULARY,), chance).double())


def test_tokens_that_leave_are_drawn_from_their_exit_head() -> None:
    stack, heads = a_stack("llama"), some_heads("llama")
    early = EarlyExit(stack, layer=2, rule="cosine", threshold=-INF, heads=heads)
    rows = PROMPT[:1].expand(512, -1)
    tokens = torch.cat(
        [drawn(early, rows, seed=seed, max_new_tokens=1)[:, -1] for seed in range(4)]
    )
    logits = head_logits(stack, early.exits[0], visited(stack, PROMPT[:1])[2])[0, -1]
    check_distribution(tokens, logits.double().softmax(dim=-1))


# --- Verified: the full model's text, token for token ----------------------------------------


DRAFT_LENGTHS = (1, 2, 8)


@pytest.mark.parametrize(
    ("family", "settled"),
    [*((family, True) for family in FAMILIES), ("llama", False), ("gemma2", False)],
)
def test_verified_text_is_that_of_transformers(family: str, settled: bool) -> None:
    early = generator(family, "exact", settled=settled)
    free = own_text(early.stack)
    end = int(free[1, 13])
    lengths = [length_of(row, [end]) for row in free[:, 9:].tolist()]
    result = generated(early, PROMPT, MASK, verify=True)
    assert torch.equal(result.sequences, free)
    left = (result.exit_layers > 0) & (result.exit_layers < LAYERS)
    assert result.accepted == int(left.sum())
    assert result.drafted >= result.accepted
    behind = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    for draft_length in DRAFT_LENGTHS:
        ended = generated(
            early,
            PROMPT,
            MASK,
            verify=True,
            draft_length=draft_length,
            eos_token_id=end,
            pad_token_id=1,
        )
        assert torch.equal(ended.sequences[:, 9:], free[:, 9 : 9 + max(lengths)].where(~behind, 1))
        assert torch.equal(ended.exit_layers == 0, behind)


def test_drafts_are_both_confirmed_and_refused_so_that_a_wrong_one_would_show() -> None:
    drafted = accepted = 0
    for family in ("llama", "gemma2", "gpt2", "falcon"):
        result = generated(generator(family, "exact", settled=True), PROMPT, MASK, verify=True)
        drafted, accepted = drafted + result.drafted, accepted + result.accepted
    assert 0.2 * drafted < accepted < drafted


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_verified_text_does_not_depend_on_the_rule(family: str, rule: str) -> None:
    early = generator(family, "exact", rule=rule, layers=(2, 3), settled=True)
    result = generated(early, PROMPT, MASK, verify=True, draft_length=3)
    assert torch.equal(result.sequences, own_text(early.stack))
    assert result.drafted > 0


@pytest.mark.parametrize("layers", [(1,), (2,), (LAYERS,), (2, LAYERS), (1, 2, 3, LAYERS)])
@pytest.mark.parametrize("threshold", [-INF, INF])
def test_verified_text_does_not_depend_on_the_exits(
    layers: tuple[int, ...], threshold: float
) -> None:
    stack = a_settled_stack("qwen3")
    exits = [make_exit(stack, layer, "cosine", threshold) for layer in layers]
    early = EarlyExit(stack, exits=exits, propagation="exact")
    for draft_length in DRAFT_LENGTHS:
        result = generated(early, PROMPT, MASK, verify=True, draft_length=draft_length)
        assert torch.equal(result.sequences, own_text(stack))
        assert (result.drafted > 0) == (threshold == -INF and layers[0] < LAYERS)


@pytest.mark.parametrize("draft_length", DRAFT_LENGTHS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neo", "bloom"])
def test_verified_draws_are_the_full_models(family: str, draft_length: int) -> None:
    early = generator(family, "exact", settled=True)
    full = EarlyExit(early.stack)
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "seed": 3}
    expected = generated(full, PROMPT, MASK, **settings)
    result = generated(early, PROMPT, MASK, verify=True, draft_length=draft_length, **settings)
    assert torch.equal(result.sequences, expected.sequences)
    assert not torch.equal(result.sequences, generated(full, PROMPT, MASK).sequences)
    assert result.accepted > 0


def test_verified_stop_strings_end_rows_as_unverified_ones_do() -> None:
    full, early = speaking("exact", exits=False), speaking("exact")
    tokenizer: Any = full.stack.tokenizer
    text = generated(full, PROMPT, MASK).sequences
    stops = [tokenizer.decode(text[0, 11:13]), tokenizer.decode(text[1, 14:16])]
    expected = generated(full, PROMPT, MASK, stop_strings=stops, pad_token_id=1)
    got = generated(early, PROMPT, MASK, stop_strings=stops, pad_token_id=1, verify=True)
    assert torch.equal(got.sequences, expected.sequences)
    assert not torch.equal(got.sequences[:, : text.shape[1]], text)


def test_a_draft_is_no_longer_than_asked_and_full_passes_are_fewer() -> None:
    stack = a_settled_stack("llama")
    exits = [make_exit(stack, 2, "cosine", -INF)]
    early = EarlyExit(stack, exits=exits, propagation="exact")
    rows: dict[int, int] = {}
    for draft_length in (1, 4):
        looks: list[int] = []
        handle = (
            stack.layers[-1]
            .get_submodule("mlp")
            .register_forward_hook(lambda _, args, __, looks=looks: looks.append(args[0].shape[1]))
        )
        try:
            generated(early, PROMPT[:1], verify=True, draft_length=draft_length)
        finally:
            handle.remove()
        assert max(looks[1:]) <= draft_length
        rows[draft_length] = len(looks)
    assert rows[1] == NEW
    assert rows[4] < NEW


# --- The cache that generation leaves --------------------------------------------------------


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[KeyValueCache]:
    """Return a list that fills with the caches that generation makes."""
    made: list[KeyValueCache] = []
    new_cache = SkippingLayers.new_cache

    def keeping(self: SkippingLayers, *args: Any, **kwargs: Any) -> KeyValueCache:
        made.append(new_cache(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(SkippingLayers, "new_cache", keeping)
    return made


def held(states: Tensor, valid: Tensor) -> Tensor:
    """Return `[n, heads, head_dim]` of a cache's `[B, heads, T, head_dim]`."""
    return states[:, :, : valid.shape[1]].transpose(1, 2)[valid]


@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
@ALL_FAMILIES
def test_after_frozen_and_ridge_generation_the_cache_is_that_of_the_mixed_pass_by_hand(
    family: str, propagation: Propagation, caches: list[KeyValueCache]
) -> None:
    early = generator(family, propagation)
    result = generated(early, PROMPT, MASK)
    seen = result.sequences[:, :-1]  # nobody looked at the last token yet
    mask = longer(MASK, seen)
    expected = by_hand(
        early.stack, seen, early.exits, mask, propagation=propagation, heads=some_heads(family)
    )
    assert int((expected.exit_layers < LAYERS).sum()) > 20
    for ours, theirs in zip(caches[-1].layers, expected.cache.layers, strict=True):
        for name in ("keys", "values"):
            got, wanted = (held(getattr(layer, name), mask.bool()) for layer in (ours, theirs))
            assert apart(got, wanted) <= CLOSE


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@ALL_FAMILIES
def test_after_exact_generation_the_cache_holds_the_full_models_keys_and_values(
    family: str, verify: bool, caches: list[KeyValueCache]
) -> None:
    early = generator(family, "exact", settled=True)
    result = generated(early, PROMPT, MASK, verify=verify)
    seen, mask = result.sequences[:, :-1], longer(MASK, result.sequences[:, :-1])
    theirs = full_cache(early.stack, seen, mask)
    hard = (result.exit_layers == LAYERS).any(dim=0).nonzero()
    # A token that went all the way took everything before it along; verifying is for everybody.
    least = seen.shape[1] if verify else 9 + int(hard.max()) if len(hard) else 0
    for number, (ours, full) in enumerate(zip(caches[-1].layers, theirs.layers, strict=True), 1):
        states: Any = ours
        keys = states.keys
        written = [] if keys is None else keys.abs().amax(dim=(0, 1, 3)).nonzero()[:, 0].tolist()
        done = max(written, default=-1) + 1
        assert done >= (seen.shape[1] if number == 1 else min(least, seen.shape[1]))
        valid = mask.bool()[:, :done]
        for name in ("keys", "values") if done else ():
            got, wanted = (held(getattr(layer, name), valid) for layer in (ours, full))
            assert apart(got, wanted) <= CLOSE


@torch.no_grad()
def full_cache(stack: DecoderStack, ids: Tensor, mask: Tensor) -> DynamicCache:
    """Return what the model itself caches in one plain forward."""
    cache = DynamicCache()
    model: Any = stack.model
    padded: dict[str, Any] = {"attention_mask": mask}
    if model.config.model_type != "bloom":
        padded["position_ids"] = positions_of(ids, mask)
    model(input_ids=ids, past_key_values=cache, use_cache=True, **padded)
    return cache


# --- Counted, not assumed --------------------------------------------------------------------


@pytest.fixture
def rows_seen() -> Iterator[Callable[[DecoderStack], dict[str, list[int]]]]:
    """Return a function that counts the token rows a stack's own modules see, per layer."""
    handles = []

    def watch(stack: DecoderStack) -> dict[str, list[int]]:
        seen = {name: [0] * LAYERS for name in ("mlp", "self_attn.o_proj", "self_attn.k_proj")}
        seen["lm_head"] = [0]

        def counting(name: str, index: int) -> Callable[..., None]:
            def hook(_: Any, args: Any, __: Any) -> None:
                seen[name][index] += args[0].numel() // args[0].shape[-1]

            return hook

        for index, layer in enumerate(stack.layers):
            for name in ("mlp", "self_attn.o_proj", "self_attn.k_proj"):
                hook = counting(name, index)
                handles.append(layer.get_submodule(name).register_forward_hook(hook))
        handles.append(stack.lm_head.register_forward_hook(counting("lm_head", 0)))
        return seen

    yield watch
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@ALL_PROPAGATIONS
@pytest.mark.parametrize("family", SKIPPING)
def test_the_counts_of_generation_are_the_rows_that_the_modules_saw(
    family: str,
    propagation: Propagation,
    verify: bool,
    rows_seen: Callable[[DecoderStack], dict[str, list[int]]],
) -> None:
    if verify and propagation != "exact":
        return
    early = generator(family, propagation)
    seen = rows_seen(early.stack)
    result = generated(early, PROMPT, verify=verify)
    counts = result.counts
    assert seen["mlp"] == seen["self_attn.o_proj"] == counts.layer_rows
    projected = [a + b for a, b in zip(counts.layer_rows, counts.key_value_rows, strict=True)]
    assert seen["self_attn.k_proj"] == projected
    assert seen["lm_head"] == [counts.lm_head_rows]
    assert result.layers_per_token == sum(counts.layer_rows) / result.passed
    if verify:
        return
    assert result.passed == counts.layer_rows[0] == 3 * (9 + NEW - 1)
    if propagation != "exact":
        left = early.score(result.sequences[:, :-1]).exit_layers
        above = [int((left >= layer).sum()) for layer in range(1, LAYERS + 1)]
        assert counts.layer_rows == above
        assert result.layers_per_token == pytest.approx(left.double().mean().item())


def test_exact_generation_leaves_upper_layers_alone_until_somebody_needs_them() -> None:
    stack = a_stack("llama")
    early = EarlyExit(stack, layer=2, rule="cosine", threshold=-INF, propagation="exact")
    counts = generated(early, PROMPT).counts
    assert counts.layer_rows == [3 * 18, 3 * 18, 0, 0]
    full = EarlyExit(stack, propagation="exact")
    assert generated(full, PROMPT).counts.layer_rows == [3 * 18] * 4


# --- What generation leaves behind -----------------------------------------------------------


def raise_it(*_: Any, **__: Any) -> Any:
    raise ArithmeticError("planted")


class Raising(Recorder):
    def put(self, value: Tensor) -> None:
        super().put(value)
        if len(self.given) == 4:
            raise_it()


@pytest.mark.parametrize("place", ["layer", "projection", "lm_head", "streamer"])
@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@ALL_PROPAGATIONS
def test_the_model_is_left_as_it_was_also_when_generation_breaks_off(
    propagation: Propagation, verify: bool, place: str
) -> None:
    if verify and propagation != "exact":
        return
    early = generator("llama", propagation)
    before = state_of(early.stack)
    expected = generated(early, PROMPT[:1], verify=verify)
    assert state_of(early.stack) == before
    if place == "streamer":
        with pytest.raises(ArithmeticError, match="planted"):
            generated(early, PROMPT[:1], verify=verify, streamer=Raising())
    else:
        modules = {
            "layer": early.stack.layers[3],
            "projection": early.stack.layers[3].get_submodule("self_attn.o_proj"),
            "lm_head": early.stack.lm_head,
        }
        handle = modules[place].register_forward_pre_hook(raise_it)
        try:
            with pytest.raises(ArithmeticError, match="planted"):
                generated(early, PROMPT[:1], verify=verify)
        finally:
            handle.remove()
    assert state_of(early.stack) == before
    assert torch.equal(generated(early, PROMPT[:1], verify=verify).sequences, expected.sequences)


def test_what_is_generated_carries_no_gradient_and_is_the_callers_own() -> None:
    early, ids = generator("llama"), PROMPT.clone()
    result = generated(early, ids)
    assert not result.sequences.requires_grad
    result.sequences.zero_()
    assert torch.equal(ids, PROMPT)


# --- Refusals --------------------------------------------------------------------------------


def check_refusal(early: EarlyExit, ids: Any, said: str, **settings: Any) -> None:
    with pytest.raises(UsageError) as error:
        early.generate(ids, **settings)
    assert one_line(error) == said


RIGHT = (
    "a prompt has padding behind a token, by its attention_mask or, without one, by the token that "
    "the model pads with; expected prompts padded on the left only, so that every row's last token "
    "is the one to go on from"
)
AMONG = (
    f"token {int(PROMPT[1, 4])}, with which the model pads, stands between other tokens or alone in"
    " a row; give an attention_mask that says what is padding"
)
KNOWN = (
    "do_sample, eos_token_id, max_length, max_new_tokens, pad_token_id, seed, stop_strings, "
    "temperature, top_k, top_p"
)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "expected max_new_tokens a whole number from 1, got 0"),
        ({"max_new_tokens": 2.5}, "expected max_new_tokens a whole number from 1, got 2.5"),
        ({"max_new_tokens": True}, "expected max_new_tokens a whole number from 1, got True"),
        ({"max_length": 14.5}, "expected max_length a whole number, got 14.5"),
        (
            {"max_length": 9},
            "a prompt of 9 tokens leaves nothing of max_length 9; give max_new_tokens",
        ),
        (
            {"temperature": 0},
            "expected temperature more than 0 (do_sample=False for greedy), got 0",
        ),
        (
            {"temperature": math.nan},
            "expected temperature more than 0 (do_sample=False for greedy), got nan",
        ),
        ({"top_p": 0.0}, "expected top_p in (0, 1], got 0.0"),
        ({"top_p": 1.5}, "expected top_p in (0, 1], got 1.5"),
        ({"top_k": -1}, "expected top_k a whole number from 0, got -1"),
        ({"top_k": 2.5}, "expected top_k a whole number from 0, got 2.5"),
        ({"seed": 1.5}, "expected seed a whole number, got 1.5"),
        *(
            ({"do_sample": value}, f"expected do_sample True or False, got {value!r}")
            for value in (1, 0, "no", "false", [True])
        ),
        *(
            (
                {"temperature": value},
                f"expected temperature more than 0 (do_sample=False for greedy), got {value!r}",
            )
            for value in ("x", "0.7", [0.7], 10**400)
        ),
        ({"top_p": "x"}, "expected top_p in (0, 1], got 'x'"),
        ({"top_k": "x"}, "expected top_k a whole number from 0, got 'x'"),
        *(
            (
                {"stop_strings": value},
                f"expected stop_strings a text or several, none empty, got {value!r}",
            )
            for value in (5, [5], "", ["a", ""])
        ),
        *(
            (
                {"eos_token_id": value},
                f"expected eos_token_id a token in 0..96, or several, got {value!r}",
            )
            for value in (VOCABULARY, [1, VOCABULARY], -1, "x", 1.5, True)
        ),
        *(
            (
                {"generation_config": value},
                f"expected generation_config a GenerationConfig of transformers, got {name}; give "
                "single settings by name",
            )
            for value, name in (({"top_k": 5}, "dict"), ("greedy", "str"))
        ),
        ({"pad_token_id": VOCABULARY}, "expected pad_token_id in 0..96, got 97"),
        ({"pad_token_id": -1}, "expected pad_token_id in 0..96, got -1"),
        ({"num_beams": 4}, f"expected settings among {KNOWN}, got num_beams"),
        (
            {"max_tokens": 4, "beam": 2},
            f"expected settings among {KNOWN}, got beam, max_tokens",
        ),
        (
            {"stop_strings": ["a"]},
            "stop_strings need the model's tokenizer; load the model with it",
        ),
        (
            {"max_new_tokens": 56},
            "a prompt of 9 tokens and 56 new ones exceed the model's 64 positions; shorten the "
            "prompt or take a smaller max_new_tokens",
        ),
        (
            {"verify": True},
            'verify=True needs propagation="exact", got "frozen": only exact keys and values let '
            "the full model confirm a token",
        ),
        ({"draft_length": 0}, "expected a draft_length of at least 1, got 0"),
        ({"draft_length": None}, "expected a draft_length of at least 1, got None"),
        ({"streamer": Recorder()}, "a streamer takes one row, got 3; generate row by row"),
        ({"attention_mask": MASK.flip(1)}, RIGHT),
        ({"pad_token_id": int(PROMPT[1, -1])}, RIGHT),
        ({"pad_token_id": int(PROMPT[1, 4])}, AMONG),
        ({"attention_mask": torch.tensor([[1] * 9, [1, 0] + [1] * 7, [1] * 9])}, RIGHT),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_in_one_line(
    settings: dict[str, Any], said: str
) -> None:
    check_refusal(generator("llama"), PROMPT, said, **settings)
    streamer = settings.get("streamer")
    assert streamer is None or streamer.given == []


def test_a_models_own_end_beyond_its_vocabulary_is_refused_by_its_name() -> None:
    stack = padding_stack("llama", pad_token_id=None, eos_token_id=VOCABULARY)
    said = f"expected eos_token_id a token in 0..96, or several, got {VOCABULARY}"
    check_refusal(EarlyExit(stack), PROMPT, said)
    assert generated(EarlyExit(stack), PROMPT, eos_token_id=()).sequences.shape == (3, 9 + NEW)


def test_numbers_of_numpy_are_numbers_and_a_whole_temperature_is_one() -> None:
    early = EarlyExit(a_stack("llama"))
    same = {"max_new_tokens": 3, "top_k": 7, "seed": 4, "temperature": 2.0, "top_p": 0.9}
    kinds: dict[str, Any] = {"temperature": 2, "top_p": np.float64(0.9)}
    kinds |= {name: np.int64(same[name]) for name in ("max_new_tokens", "top_k", "seed")}
    expected = generated(early, PROMPT, do_sample=True, **same).sequences
    assert torch.equal(generated(early, PROMPT, do_sample=True, **kinds).sequences, expected)


@pytest.mark.parametrize("length", [64, 63, 60])
def test_a_prompt_fills_the_positions_to_the_last_one(length: int) -> None:
    early, ids = generator("llama"), random_ids(1, length)
    said = (
        f"a prompt of {length} tokens and {65 - length} new ones exceed the model's 64 positions; "
        "shorten the prompt or take a smaller max_new_tokens"
    )
    check_refusal(early, ids, said, max_new_tokens=65 - length)
    if length < 64:
        assert generated(early, ids, max_new_tokens=64 - length).sequences.shape == (1, 64)
    else:
        check_refusal(early, ids, said)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"repetition_penalty": 1.2, "num_beams": 2}, "num_beams, repetition_penalty"),
        ({"no_repeat_ngram_size": 1}, "no_repeat_ngram_size"),
        ({"min_new_tokens": 1}, "min_new_tokens"),
        ({"forced_eos_token_id": 0}, "forced_eos_token_id"),
        ({"max_time": 1.0}, "max_time"),
        ({"min_p": 0.1, "do_sample": True}, "min_p"),
        ({"suppress_tokens": [3]}, "suppress_tokens"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
    ],
)
def test_settings_that_early_exit_does_not_follow_are_refused_by_name(
    settings: dict[str, Any], refused: str
) -> None:
    said = (
        f"early exit does not follow the generation settings {refused}; give a generation_config "
        "that turns them off"
    )
    given = GenerationConfig(**settings)
    check_refusal(generator("llama"), PROMPT, said, generation_config=given)
    stack = DecoderStack(tiny_model("llama"))
    stack.model.generation_config = given
    check_refusal(EarlyExit(stack), PROMPT, said)


def test_settings_that_change_nothing_are_taken() -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.model.generation_config = GenerationConfig(repetition_penalty=1.1, eos_token_id=1)
    stack.model.generation_config.update(chat_format="of the checkpoint's own")
    given = GenerationConfig(
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_return_sequences=1,
        typical_p=1.0,
        min_new_tokens=0,
        suppress_tokens=[],
        use_cache=True,
        cache_implementation="dynamic",
        return_dict_in_generate=False,
        max_new_tokens=3,
    )
    got = as_tensor(EarlyExit(stack).generate(PROMPT, generation_config=given, eos_token_id=[]))
    assert torch.equal(got, own_generate(stack, PROMPT, max_new_tokens=3, repetition_penalty=1.0))


@pytest.mark.parametrize("propagation", ["frozen", "exact"])
def test_controls_score_but_do_not_generate(propagation: Propagation) -> None:
    stack = a_stack("llama")
    exits: list[Exit] = [make_exit(stack, 1, "cosine", 0.9), make_exit(stack, 2, "oracle", 1.0)]
    early = EarlyExit(stack, exits=exits, propagation=propagation)
    early.score(PROMPT)
    said = "oracle needs the full model's answer: it can score, not generate"
    check_refusal(early, PROMPT, said)
    check_refusal(early, PROMPT, said, verify=propagation == "exact")


def test_ended_and_kept_rows_share_no_memory_with_the_prompt() -> None:
    result = generated(generator("llama"), PROMPT)
    assert result.sequences.data_ptr() != PROMPT.data_ptr()
    assert by_name(result) == {
        "sequences",
        "exit_layers",
        "counts",
        "passed",
        "drafted",
        "accepted",
    }


def by_name(result: Generation) -> set[str]:
    return set(vars(result))
