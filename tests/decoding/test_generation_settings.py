"""Generation settings follow transformers; invalid settings give one-line errors."""

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

# --- Defaults and overrides -------------------------------------------------------------------


def test_settings_default_to_generation_config_of_model() -> None:
    stack = DecoderStack(tiny_model("llama"))
    own: Any = stack.model
    own.generation_config = GenerationConfig(
        eos_token_id=own_ended_text(a_stack("llama"))[0], pad_token_id=0
    )
    # Without a length, transformers generates 20 new tokens with a warning.
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


def test_single_settings_override_given_config_override_model_config() -> None:
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


def test_default_is_twenty_new_tokens_within_positions() -> None:
    early = EarlyExit(a_stack("llama"))
    settings: dict[str, Any] = {"max_new_tokens": None}
    assert generated(early, PROMPT, **settings).sequences.shape == (3, 29)
    assert generated(early, random_ids(1, 60), **settings).sequences.shape == (1, 64)
    assert generated(early, random_ids(1, 60), max_new_tokens=4).sequences.shape == (1, 64)
    without_end = EarlyExit(a_stack("bloom"))
    assert without_end.stack.max_positions is None
    assert generated(without_end, random_ids(1, 60), **settings).sequences.shape == (1, 80)


# --- Invalid settings -------------------------------------------------------------------------


PADDED_AFTER_TEXT = (
    "expected prompts padded only on the left, got padding after a token (given by the "
    "attention_mask or, without one, by the padding token); set padding_side='left'"
)


PADDED_INSIDE_TEXT = (
    f"the padding token {int(PROMPT[1, 4])} is between other tokens or fills a whole row, so it "
    "could be text; pass an attention_mask"
)


UNKNOWN = "expected settings of a GenerationConfig of transformers, or seed, got "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "expected max_new_tokens to be an integer of at least 1, got 0"),
        (
            {"max_new_tokens": 2.5},
            "expected max_new_tokens to be an integer of at least 1, got 2.5",
        ),
        (
            {"max_new_tokens": True},
            "expected max_new_tokens to be an integer of at least 1, got True",
        ),
        ({"max_length": 14.5}, "expected max_length to be an integer, got 14.5"),
        (
            {"max_length": 9},
            "expected a prompt shorter than max_length 9, got 9 tokens; set max_new_tokens instead",
        ),
        (
            {"temperature": 0},
            "expected temperature to be above 0 (do_sample=False for greedy), got 0",
        ),
        (
            {"temperature": math.nan},
            "expected temperature to be above 0 (do_sample=False for greedy), got nan",
        ),
        ({"top_p": 0.0}, "expected top_p to be in (0, 1], got 0.0"),
        ({"top_p": 1.5}, "expected top_p to be in (0, 1], got 1.5"),
        ({"top_k": -1}, "expected top_k to be an integer of at least 0, got -1"),
        ({"top_k": 2.5}, "expected top_k to be an integer of at least 0, got 2.5"),
        ({"seed": 1.5}, "expected seed to be an integer, got 1.5"),
        *(
            ({"do_sample": value}, f"expected do_sample to be True or False, got {value!r}")
            for value in (1, 0, "no", "false", [True])
        ),
        *(
            (
                {"temperature": value},
                f"expected temperature to be above 0 (do_sample=False for greedy), got {value!r}",
            )
            for value in ("x", "0.7", [0.7], 10**400)
        ),
        ({"top_p": "x"}, "expected top_p to be in (0, 1], got 'x'"),
        ({"top_k": "x"}, "expected top_k to be an integer of at least 0, got 'x'"),
        *(
            (
                {"stop_strings": value},
                f"expected stop_strings to be one or several non-empty strings, got {value!r}",
            )
            for value in (5, [5], "", ["a", ""])
        ),
        *(
            (
                {"eos_token_id": value},
                f"expected eos_token_id to be one or several tokens in 0..96, got {value!r}",
            )
            for value in (VOCABULARY, [1, VOCABULARY], -1, "x", 1.5, True)
        ),
        *(
            (
                {"generation_config": value},
                f"expected a GenerationConfig of transformers as generation_config, got {name}; "
                "pass single settings by name",
            )
            for value, name in (({"top_k": 5}, "dict"), ("greedy", "str"))
        ),
        ({"pad_token_id": VOCABULARY}, "expected pad_token_id to be in 0..96, got 97"),
        ({"pad_token_id": -1}, "expected pad_token_id to be in 0..96, got -1"),
        (
            {"num_beams": 4},
            "early exit does not support the generation settings num_beams; turn them off with "
            "num_beams=1 (on the command line, each after --generation-config)",
        ),
        ({"max_tokens": 4, "beam": 2}, f"{UNKNOWN}beam, max_tokens; correct the names"),
        (
            {"stop_strings": ["a"]},
            "stop_strings need a tokenizer, and the model has none; load the model with one",
        ),
        (
            {"max_new_tokens": 56},
            "a prompt of 9 tokens and 56 new tokens exceed the model's 64 positions; shorten the "
            "prompt or use a smaller max_new_tokens",
        ),
        (
            {"verify": True},
            'verify=True with exits needs propagation="exact", got "frozen"; the full model can '
            "only confirm tokens with exact keys and values",
        ),
        ({"draft_length": 0}, "expected a draft_length of at least 1, got 0"),
        ({"draft_length": None}, "expected a draft_length of at least 1, got None"),
        (
            {"streamer": Recorder()},
            "expected one row with a streamer, got 3; generate each row separately",
        ),
        ({"attention_mask": MASK.flip(1)}, PADDED_AFTER_TEXT),
        ({"pad_token_id": int(PROMPT[1, -1])}, PADDED_AFTER_TEXT),
        ({"pad_token_id": int(PROMPT[1, 4])}, PADDED_INSIDE_TEXT),
        ({"attention_mask": torch.tensor([[1] * 9, [1, 0] + [1] * 7, [1] * 9])}, PADDED_AFTER_TEXT),
    ],
)
def test_invalid_setting_gives_one_line_error(settings: dict[str, Any], message: str) -> None:
    check_refusal(generator("llama"), PROMPT, message, **settings)
    streamer = settings.get("streamer")
    assert streamer is None or streamer.given == []


def test_end_token_of_model_beyond_vocabulary_is_rejected() -> None:
    stack = padding_stack("llama", pad_token_id=None, eos_token_id=VOCABULARY)
    message = f"expected eos_token_id to be one or several tokens in 0..96, got {VOCABULARY}"
    check_refusal(EarlyExit(stack), PROMPT, message)
    assert generated(EarlyExit(stack), PROMPT, eos_token_id=()).sequences.shape == (3, 9 + NEW)


def test_numpy_numbers_and_integer_temperature_are_accepted() -> None:
    early = EarlyExit(a_stack("llama"))
    same = {"max_new_tokens": 3, "top_k": 7, "seed": 4, "temperature": 2.0, "top_p": 0.9}
    kinds: dict[str, Any] = {"temperature": 2, "top_p": np.float64(0.9)}
    kinds |= {name: np.int64(same[name]) for name in ("max_new_tokens", "top_k", "seed")}
    expected = generated(early, PROMPT, do_sample=True, **same).sequences
    assert torch.equal(generated(early, PROMPT, do_sample=True, **kinds).sequences, expected)


@pytest.mark.parametrize("length", [64, 63, 60])
def test_prompt_and_new_tokens_may_fill_all_positions(length: int) -> None:
    early, ids = generator("llama"), random_ids(1, length)
    message = (
        f"a prompt of {length} tokens and {65 - length} new tokens exceed the model's 64 "
        "positions; shorten the prompt or use a smaller max_new_tokens"
    )
    check_refusal(early, ids, message, max_new_tokens=65 - length)
    if length < 64:
        assert generated(early, ids, max_new_tokens=64 - length).sequences.shape == (1, 64)
    else:
        check_refusal(early, ids, message)


@pytest.mark.parametrize(
    ("settings", "off"),
    [
        ({"num_beams": 4}, {"num_beams": 1}),
        ({"penalty_alpha": 0.6, "num_beams": 2}, {"num_beams": 1, "penalty_alpha": 0}),
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            {"output_hidden_states": 0},
        ),
        ({"num_return_sequences": 2, "do_sample": True}, {"num_return_sequences": 1}),
        ({"guidance_scale": 1.5}, {"guidance_scale": 1}),
        ({"guidance_scale": 0.0}, {"guidance_scale": 1}),
        ({"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 0}),
        ({"token_healing": True}, {"token_healing": 0}),
    ],
)
def test_unsupported_settings_error_lists_them_and_how_to_turn_them_off(
    settings: dict[str, Any], off: dict[str, Any]
) -> None:
    message = (
        f"early exit does not support the generation settings {', '.join(off)}; turn them off with "
        f"{', '.join(f'{name}={value}' for name, value in off.items())} (on the command line, each "
        "after --generation-config)"
    )
    given = GenerationConfig(**settings)
    check_refusal(generator("llama"), PROMPT, message, generation_config=given)
    stack = DecoderStack(tiny_model("llama"))
    stack.model.generation_config = given
    check_refusal(EarlyExit(stack), PROMPT, message)
    kept: dict[str, Any] = {"do_sample": False, "max_new_tokens": 2}
    assert as_tensor(EarlyExit(stack).generate(PROMPT, **off | kept)).shape == (3, 11)


def test_settings_without_effect_are_accepted() -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.model.generation_config = GenerationConfig(repetition_penalty=1.1, eos_token_id=1)
    stack.model.generation_config.update(chat_format="unknown to transformers")
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
