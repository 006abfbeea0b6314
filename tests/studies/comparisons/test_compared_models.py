"""Tests of the models to compare and of the text that they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.build_models import levels, measured
from support.commands import TEXTS
from support.tiny_models import tiny_model, tiny_tokenizer

from cascade.core.errors import CorpusError, ModelError, UsageError
from cascade.models.stack import DecoderStack
from cascade.studies.comparisons.altered_models import Alteration
from cascade.studies.comparisons.compared_models import (
    MOST_MODELS,
    Candidate,
    SameText,
    candidates,
)
from cascade.studies.comparisons.model_comparison import compare_models


def test_copies_come_after_the_first_model_and_unmeasured_models_last(here: Path) -> None:
    found = candidates(
        ["a", "b"], copies=[Alteration("int8"), Alteration("bf16")], unmeasured=["c"]
    )
    assert found == [
        Candidate("a"),
        Candidate("a", Alteration("int8")),
        Candidate("a", Alteration("bf16")),
        Candidate("b"),
        Candidate("c", measured=False),
    ]


def test_a_folder_without_weights_is_not_measured(here: Path, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert [each.measured for each in candidates(["a", str(folder)])] == [True, False]
    with pytest.raises(UsageError, match="not measured; leave out --copy"):
        candidates([str(folder)], copies=[Alteration("int8")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"models": []}, "expected at least two models, got 0"),
        ({"models": ["a"]}, "expected at least two models, got 1"),
        ({"models": ["a"] * 13}, f"expected at most {MOST_MODELS} models, got 13"),
        ({"models": [], "copies": [Alteration("int8")]}, "the first model, which is not measured"),
        (
            {"models": ["a"], "copies": [Alteration("int8")], "config_only": True},
            "the first model, which is not measured",
        ),
    ],
)
def test_invalid_choices_of_models_are_refused(
    here: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        candidates(options.pop("models"), **options)


def test_a_single_model_is_refused() -> None:
    with pytest.raises(UsageError, match="expected at least two models, got 1"):
        compare_models([measured(levels(10))])


def test_a_candidate_is_checked_before_it_is_loaded(here: Path, folder: Path) -> None:
    Candidate(str(folder)).check()
    with pytest.raises(ModelError, match="no model nobody/nothing"):
        Candidate("nobody/nothing").check()
    (folder / "config.json").write_text('{"model_type": "t5"}')
    for flag in (True, False):
        with pytest.raises(ModelError, match="encoder-decoder"):
            Candidate(str(folder), measured=flag).check()


# --- The text ------------------------------------------------------------------------------


def stack_of(tokenizer: Any) -> DecoderStack:
    return DecoderStack(tiny_model("llama"), tokenizer=tokenizer)


def coarse_tokenizer() -> Any:
    """Return a tokenizer with another hash, which maps every word to one token."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Replace
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1, "w": 2}, unk_token="<unk>"))
    backend.normalizer = Replace(Regex(r"\S+"), "w")
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


def test_another_tokenizer_reads_the_same_records(here: Path) -> None:
    text = SameText("texts.jsonl", seq_len=8, max_tokens=640)
    first = text.blocks(stack_of(tiny_tokenizer()))
    other = text.blocks(stack_of(coarse_tokenizer()))
    assert first.tokens == 640
    assert 1 < first.records == other.records < len(TEXTS)
    assert other.tokens < first.tokens
    # Each record has ten words and EOS.
    words = sum(len(each.split()) + 1 for each in TEXTS[: first.records])
    assert other.tokens == words // 8 * 8
    # The first model's tokens are cached, also if another model reads in between.
    assert text.blocks(stack_of(tiny_tokenizer())) is first


def test_a_tokenizer_of_more_tokens_reads_the_same_records_to_their_end(here: Path) -> None:
    text = SameText("texts.jsonl", seq_len=8, max_tokens=160)
    first = text.blocks(stack_of(coarse_tokenizer()))
    other = text.blocks(stack_of(tiny_tokenizer()))
    assert (first.tokens, first.records) == (160, other.records)
    letters = sum(len(each) + 1 for each in TEXTS[: first.records])
    assert other.tokens == letters // 8 * 8 > 160


def test_one_long_document_is_read_up_to_the_same_number_of_tokens(here: Path) -> None:
    Path("one.txt").write_text(" ".join(TEXTS))
    text = SameText("one.txt", seq_len=8, max_tokens=160)
    assert text.blocks(stack_of(tiny_tokenizer())).tokens == 160
    assert text.blocks(stack_of(coarse_tokenizer())).tokens == 160


def test_a_model_without_a_tokenizer_is_refused(here: Path) -> None:
    text = SameText("texts.jsonl", seq_len=8)
    with pytest.raises(CorpusError, match="no tokenizer"):
        text.blocks(stack_of(None))
    text.blocks(stack_of(tiny_tokenizer()))
    with pytest.raises(CorpusError, match="no tokenizer"):
        text.blocks(stack_of(None))
