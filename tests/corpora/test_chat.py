"""Chats go through the chat template, and the assistant's turns are marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.corpora import decoded, in_lines
from support.tiny_models import save_checkpoint, tiny_bos_tokenizer, tiny_tokenizer

from cascade.core.errors import CorpusError
from cascade.core.schema import UNSET
from cascade.corpora.blocks import TokenBlocks, load_blocks

HEADED = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
#: Takes two roles alone, which must alternate, as those of Llama 2 and Gemma.
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '(' + m.content + ')' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)
#: Leaves out what a reasoning model thought before it answered, as that of Qwen 3.
THINKING = HEADED.replace("m.content | trim", "m.content.split('#')[-1]")
#: Writes no turn of a role that it does not know.
SILENT = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.content }}>{% endif %}"
    "{% endfor %}"
)

TURNS = [
    ("system", "be brief"),
    ("user", "hi"),
    ("assistant", " ab "),
    ("user", "a"),
    ("assistant", "a"),
]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
SHAREGPT = [{"from": NAMES[role], "value": text} for role, text in TURNS]


def read(
    records: list[Any], folder: Path, template: str | None = None, **options: Any
) -> TokenBlocks:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    path = in_lines(folder / "x.jsonl", records)
    return load_blocks(path, tokenizer, **({"seq_len": 2, "marks": True} | options))


def responses(blocks: TokenBlocks) -> str:
    """Return the text of all response tokens, the others shown as dots."""
    assert blocks.response is not None
    pairs = zip(decoded(blocks), blocks.response.ravel(), strict=True)
    return "".join(symbol if marked else "." for symbol, marked in pairs)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": MESSAGES},
        {"conversations": SHAREGPT, "id": "1"},
        {"conversations": MESSAGES},
        {"conversation": SHAREGPT},
        {"messages": [{**one, "name": None, "tool_calls": None} for one in MESSAGES]},
        {"messages": {"role": [role for role, _ in TURNS], "content": [text for _, text in TURNS]}},
        {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": text}]} for role, text in TURNS
            ]
        },
    ],
)
def test_every_way_to_write_messages_gives_the_same_text(record: Any, tmp_path: Path) -> None:
    blocks = read([record], tmp_path, HEADED)
    text = "[system] be brief\n [user] hi\n [assistant] ab\n [user] a\n [assistant] a\n "
    assert decoded(blocks) == text[:-1]
    marks = responses(blocks)
    assert marks.strip(".") == "ab\n" + "." * 23 + "a\n"
    assert marks.index("ab") == text.index("ab\n")
    column = next(name for name in record if name != "id")
    assert blocks.provenance().form == f"chat ({column}), chat template"
    named = read([{"a": {"b": [record]}}], tmp_path, HEADED, text_column=f"a.b.0.{column}")
    assert np.array_equal(named.ids, blocks.ids)


def test_without_a_template_roles_are_written_as_text(tmp_path: Path) -> None:
    blocks = read([{"messages": MESSAGES}, {"messages": MESSAGES[:3]}], tmp_path)
    text = "system: be brief~user: hi~assistant:  ab ~user: a~assistant: a"
    assert decoded(blocks).startswith(text + "\nsystem: be brief")
    marks = responses(blocks)[: len(text) + 1]
    assert marks == "." * text.index(" ab ") + " ab " + "." * 20 + "a\n"
    assert blocks.provenance().form == "chat (messages), plain roles"


def test_records_of_a_template_that_ends_with_eos_are_joined_without_another(
    tmp_path: Path,
) -> None:
    blocks = read([{"messages": MESSAGES[1:3]}] * 2, tmp_path, STRICT)
    assert decoded(blocks) == "(hi) ab \n(hi) ab \n"
    assert responses(blocks) == ".... ab \n.... ab \n"


def test_a_template_that_writes_bos_gives_one(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", [{"messages": MESSAGES[1:3]}] * 2)
    tokenizer = tiny_bos_tokenizer()
    found = []
    for template in (STRICT, "{{ bos_token }}" + STRICT):
        tokenizer.chat_template = template
        found.append(load_blocks(path, tokenizer, seq_len=10, marks=True))
    assert found[0].ids[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    assert np.array_equal(found[0].ids, found[1].ids)
    assert np.array_equal(found[0].response, found[1].response)  # type: ignore[arg-type]
    assert found[0].response is not None
    assert found[0].response[0].tolist() == [False] * 5 + [True] * 5


def test_marks_change_no_token(tmp_path: Path) -> None:
    records = [{"messages": MESSAGES[1:]}, {"messages": MESSAGES[1:3]}]
    for template in (None, HEADED, STRICT):
        marked = read(records, tmp_path, template)
        assert np.array_equal(read(records, tmp_path, template, marks=False).ids, marked.ids)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "ab ", "completion": "cd"}, "...cd"),
        ({"prompt": MESSAGES[1:4], "completion": MESSAGES[4:]}, "(hi) ab \n(a)a\n|a\n"),
        ({"prompt": "hi", "completion": MESSAGES[2:3]}, "(hi) ab \n| ab \n"),
        ({"prompt": "ab ", "chosen": "cd", "rejected": "x"}, "...cd"),
        ({"prompt": "ab ", "chosen": "ab cd", "rejected": "x"}, "...cd"),
        ({"chosen": "abcdef", "rejected": "x"}, "abcdef"),
        ({"prompt": "hi", "chosen": MESSAGES[1:3], "rejected": []}, "(hi) ab \n| ab \n"),
        ({"prompt": MESSAGES[1:2], "chosen": MESSAGES[2:3]}, "(hi) ab \n| ab \n"),
        ({"chosen": MESSAGES[1:3]}, "(hi) ab \n| ab \n"),
        ({"question": "hi", "answer": "cd"}, "(hi)cd\n|cd\n"),
    ],
)
def test_prompts_are_no_responses(record: Any, expected: str, tmp_path: Path) -> None:
    text, _, marked = expected.rpartition("|")
    blocks = read([record], tmp_path, STRICT, seq_len=len(text or marked))
    if text:
        assert decoded(blocks) == text
        marked = "." * (len(text) - len(marked)) + marked
    assert responses(blocks) == marked
    assert isinstance(blocks.provenance().form, str)


def test_a_template_that_changes_texts_is_marked_by_turns(tmp_path: Path) -> None:
    turns = [MESSAGES[1], {"role": "assistant", "content": "why#ab"}]
    blocks = read([{"messages": turns}], tmp_path, THINKING)
    assert decoded(blocks) == "[user] hi\n [assistant] ab\n"
    assert responses(blocks) == "." * 23 + "ab\n"


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (MESSAGES, STRICT, r"chat template does not take this chat \(Roles must alternate\); fix"),
        (MESSAGES, SILENT, r"leaves out message 1 \(role system\); rename the role or name a text"),
        (["hi"], HEADED, "message 1: expected messages with role and content, or with from and"),
        ([{"role": "user"}], HEADED, "message 1: expected messages .*, got role; fix it"),
        ("hi", HEADED, "column 'messages': expected messages with role and content, .* got str"),
        ([{"role": "user", "content": 3}], None, "message 1: expected text, got int; remove it"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            HEADED,
            "message 1: expected text, got image; remove it",
        ),
    ],
)
def test_chats_that_would_lose_text_are_refused(
    messages: Any, template: str | None, message: str, tmp_path: Path
) -> None:
    good = {"messages": MESSAGES[1:3]}
    with pytest.raises(CorpusError, match=rf"x\.jsonl, record 2.*{message}") as caught:
        read([good, {"messages": messages}], tmp_path, template)
    assert "\n" not in str(caught.value)


def test_null_and_empty_chats_are_counted(tmp_path: Path) -> None:
    records = [{"messages": None}, {"messages": []}, {"messages": MESSAGES[1:3]}]
    blocks = read(records, tmp_path, STRICT)
    assert (blocks.records, blocks.empty_records) == (1, 2)


def test_reports_name_the_form(tmp_path: Path) -> None:
    from cascade.models.loading import load
    from cascade.report.common.records import headline
    from cascade.saturation.profile import analyze

    stack = load(save_checkpoint(tmp_path / "model"))
    profile = analyze(stack, [{"messages": MESSAGES}], seq_len=8)
    assert dict(headline(profile.record()))["Corpus"].endswith(
        "; read as chat (messages), plain roles"
    )


def test_old_forms_record_none(tmp_path: Path) -> None:
    for record in ({"text": "abcd"}, {"instruction": "a", "output": "b"}):
        assert read([record], tmp_path, HEADED).provenance().form is UNSET


@pytest.mark.parametrize("template", [None, HEADED])
def test_a_system_column_is_the_first_message(tmp_path: Path, template: str | None) -> None:
    expected = read([{"messages": MESSAGES}], tmp_path, template)
    rest = [one for one in SHAREGPT if one["from"] != "system"]
    for record in (
        {"system": "be brief", "messages": MESSAGES[1:]},
        {"system": "be brief", "conversations": rest},
        {"system": "not this", "messages": MESSAGES},
        {"system": " ", "messages": MESSAGES},
        {"system": None, "messages": MESSAGES},
    ):
        found = read([record], tmp_path, template)
        np.testing.assert_array_equal(found.ids, expected.ids)
        assert responses(found) == responses(expected)


def test_tool_calls_need_a_chat_template(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(CorpusError, match="expected a chat template for its tool calls"):
        read([{"messages": [MESSAGES[1], call, *MESSAGES[3:]]}], tmp_path)
