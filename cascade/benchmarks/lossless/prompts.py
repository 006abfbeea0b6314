"""Prompts of the benchmark of lossless decoding, made from held-out records of a corpus."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.benchmarks.lossless.config import LosslessBenchmarkConfig
from cascade.benchmarks.timing import BenchmarkError
from cascade.core.errors import CorpusError
from cascade.core.provenance import CorpusProvenance
from cascade.core.schema import UNSET
from cascade.corpora.blocks import corpus_name
from cascade.corpora.bos import bos_rule, prompt_ids
from cascade.corpora.chat import has_template, messages_of
from cascade.corpora.forms import RecordReader
from cascade.corpora.readers import EMBEDDED, read_records
from cascade.corpora.selection import HELD_OUT_EVERY, split_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What is asked for with a text that is in the prompt.
_REWRITING = (
    "Rewrite the following text in simpler words:",
    "Summarize the following text:",
    "Correct any mistakes in the following text and repeat it:",
    "Rewrite the following text in a formal tone:",
)

#: What is asked for with many texts.
_LONG = "Read the following notes, then summarize them:"

#: Words from which on a text is long enough to be rewritten, and words of one that is too long.
_LEAST_WORDS, _MOST_WORDS = 30, 120

#: Words of a text that is to be continued.
_BEGINNING = 40

#: Held-out records that are read at most.
_RECORDS = 4000

_CHATS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Material:
    """What prompts are made of: the question and the text of one record."""

    question: str
    text: str


@dataclass(frozen=True)
class PromptSets:
    """The prompts of all kinds.

    Attributes:
        kinds: Token ids of each prompt, by kind.
        config: The options that they were read with.
        records: Held-out records that were read.
    """

    kinds: Mapping[str, Sequence[Sequence[int]]]
    config: LosslessBenchmarkConfig
    records: int

    def provenance(self) -> CorpusProvenance:
        """Return the provenance of the prompts."""
        prompts = [ids for found in self.kinds.values() for ids in found]
        digest = hashlib.sha256()
        for ids in prompts:
            digest.update(np.array([len(ids), *ids], dtype="<i4").tobytes())
        source, column = self.config.corpus, self.config.text_column
        rule = "as the corpus says of each"
        if source != EMBEDDED:
            rule = f"every {HELD_OUT_EVERY}th is held out"
        return CorpusProvenance(
            source=source,
            name=f"{corpus_name(source)}-held-out",
            fingerprint=f"sha256:{digest.hexdigest()}",
            records=self.records,
            tokens=sum(map(len, prompts)),
            sequences=len(prompts),
            seq_len=max(map(len, prompts)),
            record_split="held-out",
            split_rule=f"by record, {rule}",
            form="prompts: " + ", ".join(self.kinds),
            text_column=UNSET if column is None else column,
        )


def read_prompts(
    config: LosslessBenchmarkConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    max_positions: int | None,
) -> PromptSets:
    """Return prompts of each kind.

    Args:
        config: The options.
        tokenizer: The model's tokenizer. Its chat template is used, if it has one.
        max_positions: Positions of the model; None if unlimited. Prompts leave room for new tokens.

    Raises:
        BenchmarkError: There are too few prompts that fit.
        CorpusError: The corpus cannot be read.
    """
    if tokenizer is None:
        raise CorpusError(
            "the model has no tokenizer to read prompts with; load it with its tokenizer"
        )
    room = None if max_positions is None else max_positions - config.new_tokens
    if room is not None and "long-context" in config.kinds and config.long_tokens > room:
        raise BenchmarkError(
            f"{config.long_tokens} --long-tokens and {config.new_tokens} --new-tokens exceed the "
            f"model's {max_positions} positions; use fewer, or leave long-context out of --kinds"
        )
    materials = list(_materials(config, chats=has_template(tokenizer)))
    maker = _Maker(tokenizer, materials, config)
    makers = {
        "instructions": maker.instructions,
        "rewriting": maker.rewriting,
        "long-context": maker.long_context,
    }
    found = {}
    for kind in config.kinds:
        fitting = (ids for ids in makers[kind]() if room is None or len(ids) <= room)
        prompts = list(itertools.islice(dict.fromkeys(fitting), config.prompts))
        if len(prompts) < config.prompts:
            limit = "" if room is None else f" of at most {room} tokens"
            raise BenchmarkError(
                f"expected {config.prompts} prompts of the kind {kind}{limit}, but the held-out "
                f"records of {config.corpus} give {len(prompts)}; use fewer --prompts, other "
                "--kinds or another --corpus"
            )
        found[kind] = prompts
    return PromptSets(found, config, len(materials))


def _materials(config: LosslessBenchmarkConfig, *, chats: bool) -> Iterator[Material]:
    """Yield question and text of held-out records."""
    source, column = config.corpus, config.text_column
    reader = RecordReader(source, column)
    records = read_records(source, split=None, config=None, stream=False)
    held_out = (
        (number, record)
        for number, record in enumerate(records, start=1)
        if split_of(record, number, source) == "held-out"
    )
    for number, record in itertools.islice(held_out, _RECORDS):
        passages = reader.passages(record, number)  # refuses what is in no form that is known
        if not passages or all(passage.is_blank() for passage in passages):
            continue
        found = None
        if column is None and isinstance(record, dict):
            found = _of_columns(record, f"{source}, record {number}")
        if found is None:
            whole = passages[0].whole()
            if passages[0].responses:
                start, end = passages[0].responses[0]
                found = Material(whole[:start], whole[start:end])
            else:
                beginning = " ".join(whole.split()[:_BEGINNING])
                found = Material(
                    f"Continue this text:\n\n{beginning}" if chats else beginning, whole
                )
        yield found


def _of_columns(record: dict[str, Any], place: str) -> Material | None:
    """Return question and text of an Alpaca record or of a chat; None for other records."""
    asked, given, answer = (record.get(name) for name in ("instruction", "input", "output"))
    if isinstance(asked, str) and isinstance(answer, str):
        given = given if isinstance(given, str) else ""
        question = f"{asked}\n\n{given}" if given else asked
        return Material(question, max(given, answer, key=len))
    column = next((name for name in _CHATS if record.get(name)), None)
    if column is None:
        return None
    first: dict[str, str] = {}
    for message in messages_of(record[column], f"{place}, column {column!r}"):
        first.setdefault(message["role"], message["content"])
    return Material(first.get("user", ""), first.get("assistant", ""))


class _Maker:
    """Makes prompts of each kind."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        materials: Sequence[Material],
        config: LosslessBenchmarkConfig,
    ) -> None:
        self.tokenizer, self.materials, self.config = tokenizer, materials, config
        self.rule = bos_rule(tokenizer, "auto")
        self.chats = has_template(tokenizer)

    def instructions(self) -> Iterator[tuple[int, ...]]:
        """Yield the questions of records."""
        for material in self.materials:
            if material.question.strip():
                yield self._ids(material.question)

    def rewriting(self) -> Iterator[tuple[int, ...]]:
        """Yield tasks with a text that is to be rewritten or summarized."""
        texts = [material.text.split() for material in self.materials]
        texts = [words for words in texts if len(words) >= _LEAST_WORDS]
        for number, words in enumerate(texts):
            task = _REWRITING[number % len(_REWRITING)]
            yield self._ids(f"{task}\n\n{' '.join(words[:_MOST_WORDS])}")

    def long_context(self) -> Iterator[tuple[int, ...]]:
        """Yield a task with the texts of many records, each time beginning at another record."""
        notes = [f"{at.question}\n{at.text}".split() for at in self.materials]
        count = len(notes)
        step = max(1, count // self.config.prompts)
        for start in range(0, count, step):
            words = [word for note in (*notes[start:], *notes[:start]) for word in note]
            ids = self._fill(words)
            if ids is None:
                return
            yield ids

    def _fill(self, words: Sequence[str]) -> tuple[int, ...] | None:
        """Return the longest prompt within the wanted length; None if all words are too few."""
        most = self.config.long_tokens

        def prompt(count: int) -> tuple[int, ...]:
            return self._ids(f"{_LONG}\n\n{' '.join(words[:count])}")

        fits, over = 0, 1
        while over <= len(words) and len(prompt(over)) <= most:
            fits, over = over, 2 * over
        if over > len(words):
            over = len(words) + 1
            if len(prompt(len(words))) <= most:
                return None
        while over - fits > 1:
            middle = (fits + over) // 2
            fits, over = (middle, over) if len(prompt(middle)) <= most else (fits, middle)
        return prompt(fits) if fits else None

    def _ids(self, text: str) -> tuple[int, ...]:
        if self.chats:
            text = str(
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
            )
        return tuple(prompt_ids(self.tokenizer, text, self.rule))
