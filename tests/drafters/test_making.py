"""Training a drafter from prompts to a stored drafter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from support.commands import TEXTS
from support.disk import contents
from support.tiny_drafters import BRIEF, LAYERS, a_drafted_stack
from support.tiny_models import tiny_model, tiny_tokenizer

from cascade.core.errors import CorpusError, OutputError, UnsupportedModelError, UsageError
from cascade.core.locks import locked
from cascade.drafters.config import DrafterConfig
from cascade.drafters.making import TEXTS as TEXTS_FOLDER
from cascade.drafters.making import NoProgress, train_drafter
from cascade.drafters.proposer import TrainedDrafter, load_drafter
from cascade.drafters.records import METHODS, DrafterRecord
from cascade.drafters.texts.prompts import CorpusSource
from cascade.drafters.training import NetworkTraining
from cascade.models.stack import DecoderStack


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusSource:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return CorpusSource(str(path))


def made(
    folder: Path, corpus: CorpusSource, stack: DecoderStack | None = None, **settings: Any
) -> TrainedDrafter:
    config = replace(BRIEF, **settings.pop("config", {}))
    return train_drafter(stack or a_drafted_stack(), [corpus], folder, config, **settings)


def untimed(record: DrafterRecord) -> DrafterRecord:
    """Return a record without what differs between runs on the same machine."""
    assert [row.method for row in record.methods] == list(METHODS)
    return replace(record, methods=[], use="none")


def test_a_drafter_is_trained_judged_and_stored(tmp_path: Path, corpus: CorpusSource) -> None:
    drafter = made(tmp_path / "out", corpus, command="cascade train-drafter")
    record = drafter.record
    assert record.feature_layers == list(LAYERS)
    assert record.vocabulary == len(drafter.tokens) == 60
    assert 1 in drafter.tokens.tolist()
    assert record.texts.tokens >= 400
    assert record.held_out.texts == 8
    assert [each.step for each in record.evaluations] == [0, 4, 8]
    assert [each.method for each in record.methods] == list(METHODS)
    assert record.use == max(record.methods, key=lambda row: row.speed).method
    assert record.provenance.command == "cascade train-drafter"
    assert record.provenance.corpora[0].train == 32
    assert 0 < record.coverage <= 1
    assert record.contexts == len(drafter.companions[0])
    again = load_drafter(tmp_path / "out", a_drafted_stack())
    assert torch.equal(again.tokens, drafter.tokens)


def test_one_half_of_the_held_out_texts_selects_and_the_other_one_judges(
    tmp_path: Path, corpus: CorpusSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[list[list[int]]] = []

    def noted(training: NetworkTraining, texts: Any) -> Any:
        used.append([text.ids.tolist() for text in texts])
        return real(training, texts)

    real = NetworkTraining.chains
    monkeypatch.setattr(NetworkTraining, "chains", noted)
    made(tmp_path / "out", corpus)
    found = load_file(tmp_path / "out/texts/held-out.safetensors")
    texts = [ids.tolist() for ids in found["ids"].split(found["lengths"].tolist())]
    # Three evaluations, then the judgement, and the calibration that it uses.
    assert used == [texts[::2]] * 3 + [texts[1::2], texts[::2]]


def test_the_same_arguments_give_the_same_drafter(tmp_path: Path, corpus: CorpusSource) -> None:
    for name in ("a", "b"):
        made(tmp_path / name, corpus)
    found = [contents(tmp_path / name) for name in ("a", "b")]
    records = [load_drafter(tmp_path / name, a_drafted_stack()).record for name in ("a", "b")]
    assert untimed(records[0]) == untimed(records[1])
    for each in found:
        del each["record.json"]
    assert found[0] == found[1]


def test_texts_that_are_there_are_not_generated_again(tmp_path: Path, corpus: CorpusSource) -> None:
    class NoText(NoProgress):
        def generating(self, tokens: int, done: int) -> None:
            raise AssertionError

    first = made(tmp_path / "out", corpus)
    config = {"steps": 4}
    made(tmp_path / "out", corpus, overwrite=True, config=config, progress=NoText())
    resumed = made(tmp_path / "out", corpus, overwrite=True, progress=NoText())
    assert untimed(resumed.record) == untimed(first.record)


def test_an_earlier_drafter_is_refused_before_anything_is_done(
    tmp_path: Path, corpus: CorpusSource
) -> None:
    made(tmp_path / "out", corpus)
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="holds a drafter: choose another --output"):
        made(tmp_path / "out", corpus, config={"seed": 1})
    assert contents(tmp_path / "out") == before
    with pytest.raises(OutputError, match="is a file, expected a folder"):
        made(tmp_path / "texts.jsonl", corpus)


def test_another_process_that_trains_in_the_folder_is_not_disturbed(
    tmp_path: Path, corpus: CorpusSource
) -> None:
    folder = tmp_path / "out"
    message = r"another process is training a drafter in .*texts; wait for it to end"
    with locked(folder / TEXTS_FOLDER), pytest.raises(OutputError, match=message):
        made(folder, corpus)


def test_corpora_can_be_named_by_text(tmp_path: Path, corpus: CorpusSource) -> None:
    one = train_drafter(a_drafted_stack(), [corpus], tmp_path / "one", BRIEF)
    other = train_drafter(a_drafted_stack(), [corpus.source], tmp_path / "other", BRIEF)
    assert untimed(one.record) == untimed(other.record)


def test_texts_of_a_model_with_few_positions_fit_into_them(
    tmp_path: Path, corpus: CorpusSource
) -> None:
    config = {"longest_prompt": 256, "max_new_tokens": 256}
    record = made(tmp_path / "out", corpus, config=config).record
    assert (record.config.longest_prompt, record.config.max_new_tokens) == (32, 32)


def test_a_chat_model_answers_in_its_own_template(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [{"instruction": f"Add {n}", "input": "", "output": "1"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made(tmp_path / "out", CorpusSource(str(path)), a_drafted_stack(chat=True))
    found = load_file(tmp_path / "out/texts/00000.safetensors")
    ids = found["ids"].split(found["lengths"].tolist())
    prompts = [one[:size].tolist() for one, size in zip(ids, found["prompts"], strict=True)]
    texts = {"".join(tiny_tokenizer().convert_ids_to_tokens(prompt)) for prompt in prompts}
    assert all(re.fullmatch("<user>.*<eos><assistant>", text) for text in texts)
    assert sum(re.fullmatch(r"<user>Add \d+<eos><assistant>", text) is None for text in texts) > 0
    assert (
        sum(re.fullmatch(r"<user>Add \d+<eos><assistant>", text) is not None for text in texts) > 9
    )


def test_other_models_are_refused(tmp_path: Path, corpus: CorpusSource) -> None:
    stack = DecoderStack(tiny_model("gpt2"), tokenizer=tiny_tokenizer())
    with pytest.raises(UnsupportedModelError, match="gpt2 cannot have a trained drafter"):
        made(tmp_path / "out", corpus, stack)
    assert not (tmp_path / "out").exists()


def test_texts_without_tokens_to_draft_are_refused(tmp_path: Path, corpus: CorpusSource) -> None:
    with pytest.raises(CorpusError, match="texts with at least 2 generated tokens"):
        made(tmp_path / "out", corpus, config={"max_new_tokens": 1, "tokens": 20})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", 0),
        ("steps", 0),
        ("vocabulary", 0),
        ("batch_size", 0),
        ("draft_steps", 0),
        ("held_out_texts", 1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("temperature", -1.0),
        ("own_instructions", 1.0),
        ("seed", -1),
    ],
)
def test_options_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"expected (a )?{name}"):
        DrafterConfig(**{name: value}).check()
