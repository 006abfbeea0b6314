"""Each token has one class, which depends on its text and the token before it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from cascade.corpora.token_classes import CLASSES, classify, token_texts

WORDS = ["<eos>", "Ġthe", "the", "ing", "Ġ12", "7", ".", "Ġ(", "Ċ", "Ġ", "ĊĊ", ";", "Ã", "Ġa1"]
NUMBER = {word: number for number, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(NUMBER, unk_token="<eos>"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def classes_of(tokenizer: PreTrainedTokenizerFast, words: list[str]) -> list[str]:
    ids = np.array([[NUMBER[word] for word in words]])
    return [CLASSES[number] for number in classify(ids, tokenizer)[0][0]]


def test_classes_of_tokens_in_context(byte_level: PreTrainedTokenizerFast) -> None:
    words = ["Ġthe", "ing", "Ġthe", ".", "the", "ing", "Ġ12", "7", "Ċ", "the", "<eos>", "Ġ(", "ing"]
    assert classes_of(byte_level, words) == [
        "start",  # for any text
        "continuation",
        "word start",
        "punctuation",
        "word start",  # without a space, but after punctuation
        "continuation",
        "digits",
        "digits",
        "whitespace",
        "word start",
        "special",
        "punctuation",
        "word start",
    ]


def test_incomplete_character_is_a_continuation(byte_level: PreTrainedTokenizerFast) -> None:
    assert classes_of(byte_level, ["Ġthe", "Ã", "Ġa1"]) == ["start", "continuation", "word start"]


def test_delimiters_are_punctuation_marks_and_line_breaks(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    ids = np.arange(len(WORDS))[None]
    _, delimiters = classify(ids, byte_level)
    assert {WORDS[place] for place in np.flatnonzero(delimiters[0])} == {".", ";", "Ċ", "ĊĊ"}


def test_token_texts_keep_the_leading_space(byte_level: PreTrainedTokenizerFast) -> None:
    texts = token_texts(np.array([NUMBER["Ġthe"], NUMBER["the"], NUMBER["Ċ"]]), byte_level)
    assert texts == [" the", "the", "\n"]


@given(text=st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), min_size=2))
def test_every_token_has_a_class_and_only_the_first_is_start(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = np.array([tokenizer(text)["input_ids"]])
    classes, delimiters = classify(ids, tokenizer)
    assert classes.shape == delimiters.shape == ids.shape
    assert (classes[0] == CLASSES.index("start")).tolist() == [True] + [False] * (len(text) - 1)
    for character, number in zip(text[1:], classes[0, 1:].tolist(), strict=True):
        if character.isdigit():
            assert CLASSES[number] == "digits"
        elif character == " ":
            assert CLASSES[number] == "whitespace"
        elif character.isalpha():
            assert CLASSES[number] in ("word start", "continuation")
