"""Generation settings are those of transformers; invalid ones are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.generating import (
    MASK,
    NEW,
    PROMPT,
    Recorder,
    as_tensor,
    check_refusal,
    generated,
    generator,
    own_ended_text,
    own_generate,
    padding_stack,
)
from support.reference_early_exit import (
    a_stack,
)
from support.tiny_models import VOCABULARY, random_ids, tiny_model
from transformers import GenerationConfig

from cascade.decoding.early_exit import EarlyExit
from cascade.models.stack import DecoderStack

# --- Where nobody leaves: transformers' own generate ------------------------------------------


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


# --- Refusals ---------------------------------------------------------------------------------


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
