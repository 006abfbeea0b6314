"""A transcript records the generated text and where each token exited."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from support.engines import BEST
from support.tiny_models import made_tokenizer, tiny_model, tiny_tokenizer

from cascade.core.errors import UsageError
from cascade.core.schema import from_plain, to_plain
from cascade.corpora.bos import bos_rule, prompt_ids
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.transcript import GenerationRecord, transcribe
from cascade.models.stack import DecoderStack

SETTINGS = {"max_new_tokens": 6, "eos_token_id": ()}


def early_exit() -> EarlyExit:
    stack = DecoderStack(tiny_model("llama"), tokenizer=tiny_tokenizer())
    return EarlyExit(stack, layer=2, rule="random", threshold=0.5)


def test_transcript_has_every_token_with_its_layer() -> None:
    record = transcribe(early_exit(), "Number 7", SETTINGS)
    assert len(record.tokens) == len(record.exit_layers) == 6
    assert [(row.layer, row.tokens) for row in record.by_layer] == [
        (layer, record.exit_layers.count(layer)) for layer in (2, 4)
    ]
    assert (record.prompt, record.chat, record.verified) == ("Number 7", False, False)
    assert record.full is not None
    assert record.full.tokens == 6


def test_verified_transcript_matches_full_model() -> None:
    stack = early_exit().stack
    early = EarlyExit(stack, layer=2, rule="random", threshold=0.5, propagation="exact")
    record = transcribe(early, "Number 7", SETTINGS, verify=True)
    assert record.full is not None
    assert record.full.same_tokens == 6
    assert record.full.text == "".join(record.tokens)
    assert record.accepted <= record.drafted


def test_transcript_survives_round_trip() -> None:
    record = transcribe(early_exit(), "Number 7", SETTINGS, compare=False)
    assert record.full is None
    assert from_plain(to_plain(record), GenerationRecord) == record


def test_model_without_tokenizer_is_rejected() -> None:
    early = EarlyExit(DecoderStack(tiny_model("llama")), layer=2)
    with pytest.raises(UsageError, match="a prompt needs a tokenizer, and the model has none"):
        transcribe(early, "Number 7", SETTINGS)


def test_record_is_imported_without_torch() -> None:
    code = "import sys, cascade.decoding.transcript; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("template", "tokenizer", "choice", "expected"),
    [
        (None, "bos", "auto", "<bos>ab"),
        (None, "bos", "no", "ab"),
        (None, "plain", "auto", "ab"),
        (None, "plain", "yes", "<bos>ab"),
        (None, "eos too", "auto", "<bos>ab"),  # no EOS: the text goes on
        ("{{ messages[0]['content'] }}!", "bos", "auto", "<bos>ab!"),
        ("{{ bos_token }}{{ messages[0]['content'] }}!", "bos", "auto", "<bos>ab!"),
        ("{{ bos_token }}{{ messages[0]['content'] }}!", "bos", "no", "ab!"),
        ("{{ bos_token }}{{ messages[0]['content'] }}!", "plain", "auto", "<bos>ab!"),
        ("{{ bos_token }}{{ messages[0]['content'] }}!", "plain", "no", "ab!"),
        # ChatML: each message begins with what the tokenizer calls BOS.
        ("<bos>{{ messages[0]['content'] }}<bos>!", "plain", "no", "<bos>ab<bos>!"),
    ],
)
def test_prompts_and_chats_begin_like_corpora(
    template: str | None,
    tokenizer: str,
    choice: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    around = {"bos": "<bos> $A", "plain": "$A", "eos too": "<bos> $A <eos>"}[tokenizer]
    reading = made_tokenizer(around, bos_token="<bos>")
    reading.chat_template = template
    seen: list[list[int]] = []
    early = EarlyExit(DecoderStack(tiny_model("llama", vocab_size=98), tokenizer=reading), layer=2)
    right = early.generate

    def watched(ids: Any, *args: Any, **settings: Any) -> Any:
        seen.append(ids[0].tolist())
        return right(ids, *args, **settings)

    monkeypatch.setattr(early, "generate", watched)
    record = transcribe(
        early,
        "ab",
        {"max_new_tokens": 1},
        chat=template is not None,
        compare=False,
        bos=choice,
    )
    assert "".join(reading.convert_ids_to_tokens(seen[-1])) == expected
    assert record.bos == bos_rule(reading, choice).recorded
    if template is None:
        assert seen[-1] == prompt_ids(reading, "ab", bos_rule(reading, choice))


def test_text_without_exits_is_drafted() -> None:
    early = EarlyExit(early_exit().stack)
    record = transcribe(early, "Number 7", SETTINGS | {"max_new_tokens": 20}, verify=True)
    assert record.verified
    assert record.exits == []
    assert record.engine.startswith(BEST)
    assert record.proposers == ["n-gram", "runner-ups"]
    assert isinstance(record.sources, list)
    assert len(record.sources) == 20
    assert sum(source > 0 for source in record.sources) == record.accepted
    assert record.passes == 19 - record.accepted
    assert record.full is not None
    assert record.full.same_tokens == 20
    assert from_plain(to_plain(record), GenerationRecord) == record
