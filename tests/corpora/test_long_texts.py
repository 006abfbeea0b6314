"""A long text that is tokenized in pieces gives the ids of the whole text."""

from __future__ import annotations

import functools
import itertools
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpora import blocks_of
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cascade.corpora import long_texts
from cascade.corpora.files.documents import LongText
from cascade.corpora.long_texts import tokens_in_pieces

if TYPE_CHECKING:
    from pathlib import Path

    from cascade import DecoderStack

WORDS = [
    "river",
    "stone",
    "caf\u00e9",
    "\u65e5\u672c\u8a9e",
    "\U0001f600",
    "12345",
    "<eos>",
    "don't",
]
WORDS += ["lamp", "orbit", "violet", "\n\n", "", ""]


def text_of(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a kind, which differ in how far a token depends on text around it."""
    options: dict[str, Any] = {"special_tokens": ["<unk>", "<eos>"], "show_progress": False}
    if kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        trainer: Any = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **options)
    elif kind == "metaspace":
        # As Llama 2: the whole text is one word, and a space is put before it.
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        trainer = trainers.BpeTrainer(vocab_size=300, **options)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if kind == "digits from the right":
            groups = Regex(r"\d{1,3}(?=(\d{3})*(?!\d))")
            steps.insert(0, pre_tokenizers.Split(groups, behavior="isolated"))
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **options)
    backend.train_from_iterator([text_of(0, 400), "a" * 40, "123 456 789"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


KINDS = ["bytes", "digits from the right", "metaspace", "unigram"]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_WINDOW", 307), ("_OVERLAP", 160), ("_MARGIN", 40)):
        monkeypatch.setattr(long_texts, name, value)


def in_pieces(text: str | LongText, kind: str) -> tuple[list[int], list[int]]:
    pieces = list(tokens_in_pieces(text, tokenizer(kind)))
    return tuple(list(itertools.chain(*parts)) for parts in zip(*pieces, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    words=st.integers(1, 600),
    middle=st.sampled_from(["", "a" * 2000, "1" * 1999, "1" * 2001, "\n" * 900, " " * 700]),
)
def test_pieces_have_the_ids_and_offsets_of_the_whole(
    kind: str, seed: int, words: int, middle: str
) -> None:
    text = text_of(seed, words) + middle + text_of(seed + 1, words)
    whole = tokenizer(kind)(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = in_pieces(text, kind)
    assert ids == whole["input_ids"]
    assert starts == [start for start, _ in whole["offset_mapping"]]
    size = 1 + seed % 500
    long = LongText(lambda: (text[at : at + size] for at in range(0, len(text), size)))
    assert in_pieces(long, kind)[0] == ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["a", "1"])
def test_stretches_without_white_space_have_the_ids_of_the_whole(kind: str, unit: str) -> None:
    for length in range(150, 900, 50):
        text = "river " * 10 + "12345" + unit * length + " lamp" * 150
        whole = tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
        assert in_pieces(text, kind)[0] == whole, length


@pytest.mark.parametrize("unit", ["river ", "a"])
def test_no_more_text_is_read_than_needed(unit: str) -> None:
    read = []

    def pieces() -> Any:
        for number in range(10_000):
            read.append(number)
            yield unit * 10

    found = 0
    for ids, _ in tokens_in_pieces(LongText(pieces), tokenizer("bytes")):
        found += len(ids)
        if found > 20:
            break
    assert len(read) < 200


@pytest.mark.parametrize("kind", ["x.txt", "x.jsonl"])
def test_long_documents_give_the_blocks_of_the_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from cascade.corpora import joining
    from cascade.corpora.files import documents

    text = text_of(1, 900).replace("\n", " ")
    path = tmp_path / kind
    path.write_text(text if kind == "x.txt" else json.dumps({"text": text}))
    options = {"seq_len": 16, "marks": True}
    whole = blocks_of(path, **options)
    monkeypatch.setattr(joining, "LONG", 700)
    monkeypatch.setattr(documents, "_CHUNK", 100)
    for max_tokens in (None, 64):
        some = blocks_of(path, max_tokens=max_tokens, **options)
        assert (some.ids == whole.ids[: len(some.ids)]).all()
        assert len(some.ids) == (len(whole.ids) if max_tokens is None else 4)
        assert some.response is not None
        assert some.response.all()


@pytest.mark.saturation
def test_reference_tokenizer_gives_the_same_ids_in_pieces(reference_model: DecoderStack) -> None:
    reference = reference_model.tokenizer
    assert reference is not None
    text = text_of(2, 4000)
    whole = reference(text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [ids for ids, _ in tokens_in_pieces(text, reference)]
    assert len(pieces) > 20
    assert list(itertools.chain(*pieces)) == whole
