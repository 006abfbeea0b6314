"""Prompts come from held-out records, fit into the model, and are of the wanted kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import tiny_tokenizer

from cascade.benchmarks.lossless.config import LosslessBenchmarkConfig
from cascade.benchmarks.lossless.prompts import PromptSets, read_prompts
from cascade.benchmarks.timing import BenchmarkError
from cascade.core.errors import CorpusError
from cascade.corpora.readers import read_embedded

_TEMPLATE = (
    "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def prompts(most: int | None = None, *, template: str | None = None, **changes: Any) -> PromptSets:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    small: dict[str, Any] = {"prompts": 4, "new_tokens": 8, "long_tokens": 500}
    return read_prompts(LosslessBenchmarkConfig(**(small | changes)), tokenizer, most)


def texts(found: PromptSets, kind: str) -> list[str]:
    tokens = tiny_tokenizer().convert_ids_to_tokens
    return ["".join(tokens(list(ids))) for ids in found.kinds[kind]]


def test_instructions_are_those_of_held_out_records_in_the_chat_template() -> None:
    held_out = read_embedded("held-out")
    asked = {
        f"<{record['instruction']}\n\n{record['input']}>A:"
        if record["input"]
        else f"<{record['instruction']}>A:"
        for record in held_out
    }
    tokenizer = tiny_tokenizer()
    expected = {tuple(tokenizer(text)["input_ids"]) for text in asked}
    found = prompts(template=_TEMPLATE)
    assert set(found.kinds["instructions"]) <= expected
    assert found.records == len(held_out)


def test_rewriting_has_the_text_in_the_prompt() -> None:
    held_out = [record["output"] for record in read_embedded("held-out")]
    held_out += [record["input"] for record in read_embedded("held-out")]
    # The tokenizer of one token per character has no line breaks.
    known = {" ".join(text.split())[:60] for text in held_out}
    for text in texts(prompts(kinds=("rewriting",)), "rewriting"):
        assert any(start in text for start in known if len(start) == 60)
        assert "following text" in text


def test_long_contexts_have_almost_the_wanted_length_and_differ() -> None:
    found = prompts(long_tokens=700).kinds["long-context"]
    assert len(set(found)) == 4
    assert all(660 <= len(ids) <= 700 for ids in found)


def test_all_prompts_are_different_and_leave_room_for_new_tokens() -> None:
    found = prompts(200, kinds=("instructions",), prompts=20).kinds["instructions"]
    assert len(set(found)) == 20
    assert max(map(len, found)) <= 192


def test_too_few_prompts_that_fit_are_refused() -> None:
    with pytest.raises(BenchmarkError, match=r"expected 90 prompts .* of at most 92 tokens, but"):
        prompts(100, kinds=("instructions",), prompts=90)


def test_a_context_beyond_the_positions_is_refused() -> None:
    with pytest.raises(BenchmarkError) as caught:
        prompts(400)
    assert str(caught.value) == (
        "500 --long-tokens and 8 --new-tokens exceed the model's 400 positions; use fewer, or "
        "leave long-context out of --kinds"
    )


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(CorpusError, match="the model has no tokenizer to read prompts with"):
        read_prompts(LosslessBenchmarkConfig(), None, None)


def corpus_of(folder: Path, records: list[Any]) -> str:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_every_fifth_record_of_another_corpus_is_used(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": f"Question {number}?"}]}
        for number in range(1, 21)
    ]
    found = prompts(corpus=corpus_of(tmp_path, records), kinds=("instructions",), prompts=4)
    assert texts(found, "instructions") == [f"Question {number}?" for number in (5, 10, 15, 20)]
    about = found.provenance()
    assert about.record_split == "held-out"
    assert about.split_rule == "by record, every 5th is held out"
    assert about.sequences == 4


def test_the_beginning_of_plain_text_is_continued(tmp_path: Path) -> None:
    records = [{"text": f"{number} " + "word " * 80} for number in range(1, 11)]
    found = prompts(corpus=corpus_of(tmp_path, records), kinds=("instructions",), prompts=2)
    assert texts(found, "instructions") == [f"{number}" + " word" * 39 for number in (5, 10)]
