"""Prompts of corpora: their form, their split, and what is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_drafters import TEMPLATE
from support.tiny_models import tiny_bos_tokenizer, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from cascade.core.errors import CorpusError
from cascade.drafters.texts.prompts import TASKS, CorpusSource, Prompts, load_prompts

Load = Callable[..., Prompts]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return a function that writes records to a file and reads its prompts."""

    def load(records: Iterable[Any], tokenizer: Any = None, **settings: Any) -> Prompts:
        path = tmp_path / "corpus.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        source = CorpusSource(str(path), settings.pop("text_column", None))
        usual: dict[str, Any] = {"longest": 400}
        return load_prompts([source], tokenizer or chat_tokenizer(), **(usual | settings))

    return load


def words(ids: tuple[int, ...]) -> str:
    return "".join(tiny_tokenizer().convert_ids_to_tokens(ids))


def as_tokens(text: str) -> str:
    """Return a text as the tiny tokenizer knows it: line breaks are one unknown token."""
    return re.sub("\n+", "<unk>", text)


#: Records of a form -> the prompt of the first one, with and without a chat template.
FORMS: dict[str, tuple[Callable[[int], Any], str, str]] = {
    "Alpaca": (
        lambda n: {"instruction": f"Add {n}.", "input": "1 and 2", "output": "3"},
        "<user>Add 1.\n\n1 and 2<eos><assistant>",
        "### Instruction:\nAdd 1.\n\n### Input:\n1 and 2\n\n### Response:\n",
    ),
    "Alpaca without input": (
        lambda n: {"instruction": f"Add {n}.", "input": "", "output": "3"},
        "<user>Add 1.<eos><assistant>",
        "### Instruction:\nAdd 1.\n\n### Response:\n",
    ),
    "instances": (
        lambda n: {"instruction": f"Add {n}.", "instances": [{"input": "4", "output": "5"}]},
        "<user>Add 1.\n\n4<eos><assistant>",
        "### Instruction:\nAdd 1.\n\n### Input:\n4\n\n### Response:\n",
    ),
    "Dolly": (
        lambda n: {"instruction": f"Add {n}.", "context": "So.", "response": "3"},
        "<user>Add 1.\n\nSo.<eos><assistant>",
        "### Instruction:\nAdd 1.\n\n### Input:\nSo.\n\n### Response:\n",
    ),
    "chat": (
        lambda n: {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Hello {n}"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "Bye"},
            ]
        },
        "<system>Be brief.<eos><user>Hello 1<eos><assistant>",
        "system: Be brief.\nuser: Hello 1\nassistant: ",
    ),
    "ShareGPT": (
        lambda n: {
            "conversations": [
                {"from": "human", "value": f"Hello {n}"},
                {"from": "gpt", "value": "Hi"},
            ]
        },
        "<user>Hello 1<eos><assistant>",
        "user: Hello 1\nassistant: ",
    ),
    "prompt and completion": (
        lambda n: {"prompt": f"Hello {n}", "completion": " you"},
        "<user>Hello 1<eos><assistant>",
        "Hello 1",
    ),
    "question and answer": (
        lambda n: {"question": f"Why {n}?", "answer": "So."},
        "<user>Why 1?<eos><assistant>",
        "user: Why 1?\nassistant: ",
    ),
    "text": (
        lambda n: {"text": f"Text {n} goes on."},
        f"<user>{TASKS[7]}\n\nText 1 goes on.<eos><assistant>",
        "Text 1 goes on.",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_what_a_user_asks_in_the_chat_template(form: str, load: Load) -> None:
    record, wanted, _ = FORMS[form]
    found = load(map(record, range(1, 11)))
    assert words(found.train[0]) == as_tokens(wanted)
    assert (len(found.train), len(found.held_out)) == (8, 2)


@pytest.mark.parametrize("form", FORMS)
def test_prompts_of_a_model_without_template_are_plain_text(form: str, load: Load) -> None:
    record, _, wanted = FORMS[form]
    found = load(map(record, range(1, 11)), tiny_tokenizer())
    assert words(found.train[0]) == as_tokens(wanted)
    assert found.around is None


def test_every_fifth_record_is_held_out_with_all_of_its_prompts(load: Load) -> None:
    def record(number: int) -> dict[str, Any]:
        return {"text": "\n".join(f"{number} {part} " + "word " * 45 for part in "abc")}

    found = load(map(record, range(1, 16)), tiny_tokenizer(), longest=10)
    held_out = {words(ids).split(" ")[0] for ids in found.held_out}
    train = {words(ids).split(" ")[0] for ids in found.train}
    assert held_out == {"5", "10", "15"}
    assert train == {str(number) for number in range(1, 16)} - held_out
    assert (len(found.train), len(found.held_out)) == (36, 9)


def test_the_embedded_corpus_says_which_records_are_held_out() -> None:
    found = load_prompts([CorpusSource()], chat_tokenizer(), longest=10_000)
    (corpus,) = found.corpora
    assert (corpus.records, corpus.train, corpus.held_out) == (500, 400, 100)


def test_a_prompt_of_both_splits_is_held_out_alone(load: Load) -> None:
    found = load({"text": f"{number % 5}"} for number in range(1, 11))
    assert len(found.held_out) == 2 - 1
    assert not set(found.train) & set(found.held_out)


def test_the_same_prompt_twice_is_one(load: Load) -> None:
    found = load([{"text": "a"}] * 4 + [{"text": "b"}])
    assert (len(found.train), len(found.held_out)) == (1, 1)


def test_long_paragraphs_are_prompts_and_short_lines_are_not(load: Load) -> None:
    long = ["word " * 41 + name for name in ("one", "two")]
    text = "A title\n" + long[0] + "\nshort\n" + long[1]
    found = load([{"text": text}] * 4 + [{"text": "b"}])
    assert len(found.train) == 2
    tasks = [words(ids).split("<unk>")[0] for ids in found.train]
    assert set(tasks) <= {f"<user>{task}" for task in TASKS}


def test_a_long_document_gives_evenly_spaced_paragraphs(load: Load) -> None:
    text = "\n".join(f"{number} " + "word " * 45 for number in range(320))
    found = load([{"text": text}] * 4 + [{"text": "b"}], tiny_tokenizer(), longest=10)
    numbers = [int(words(ids).split(" ")[0]) for ids in found.train]
    assert numbers == list(range(5, 320, 10))


def test_texts_that_are_too_long_are_cut_and_questions_are_left_out(load: Load) -> None:
    texts = load(
        ({"text": f"{n} and more of it"} for n in range(1, 11)), tiny_tokenizer(), longest=6
    )
    assert {len(ids) for ids in (*texts.train, *texts.held_out)} == {6}
    questions = [{"prompt": "x" * size, "completion": "y"} for size in (3, 4, 50, 5, 6)]
    found = load(questions, longest=30)
    assert (len(found.train), found.corpora[0].too_long) == (3, 1)


def test_blank_records_are_left_out(load: Load) -> None:
    found = load([{"text": "a"}, {"text": " "}, {"text": "b"}, {"text": "c"}, {"text": "d"}])
    assert (len(found.train), len(found.held_out)) == (3, 1)


def test_words_around_a_user_turn_are_those_of_the_template(load: Load) -> None:
    found = load({"text": f"{number}"} for number in range(1, 6))
    assert found.around is not None
    assert [words(ids) for ids in found.around] == ["<user>", "<eos><assistant>"]


def test_prompts_begin_with_bos_as_texts_do(load: Load) -> None:
    records = [{"text": f"{number}"} for number in range(1, 6)]
    tokenizer = tiny_bos_tokenizer()
    assert {ids[0] for ids in load(records, tokenizer).train} == {97}
    assert 97 not in {ids[0] for ids in load(records, tokenizer, bos="no").train}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a"}] * 4, "at least one prompt of 400 tokens or less in the held-out split"),
        ([{"text": "a"}] * 5, "all training prompts are held out as well"),
        ([{"ids": [1]}], "expected the column 'text' or instruction and output"),
        ([{"messages": [{"role": "user"}]}], "expected messages with role and content"),
    ],
)
def test_corpora_without_prompts_are_refused(load: Load, records: list[Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        load(records)


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(CorpusError, match="the model has no tokenizer to read prompts with"):
        load_prompts([CorpusSource()], None, longest=10)
