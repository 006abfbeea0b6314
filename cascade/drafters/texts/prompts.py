"""Prompts from corpora: what a user would ask the model, as the model's chat template has it."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.core.errors import CorpusError
from cascade.core.provenance import SPLITS, Split
from cascade.corpora.bos import BosRule, bos_rule, prompt_ids
from cascade.corpora.chat import has_template, is_chat, messages_of
from cascade.corpora.forms import RecordReader
from cascade.corpora.joining import Passage
from cascade.corpora.readers import read_records
from cascade.corpora.selection import split_of
from cascade.drafters.records import PromptCorpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a user asks a chat model to do with a passage of a text.
TASKS = (
    "Rewrite the following text in simpler words:",
    "Summarize the following text:",
    "Correct any mistakes in this text and repeat it:",
    "Rewrite this passage in a formal tone:",
    "Continue this text:",
    "List the key facts in this text:",
    "Write three questions about this text, with answers:",
    "Explain this to a child:",
)

#: Words of a passage, and words from which on a paragraph is one.
_PASSAGE_WORDS, _PARAGRAPH_WORDS = 90, 40

#: Most paragraphs of a record, evenly spaced: a long document must not outweigh all other prompts.
_MOST_PARAGRAPHS = 32

#: Columns that hold a chat, and columns of a question and of its context.
_CHATS = ("messages", "conversations", "conversation")
_QUESTIONS = ("instruction", "prompt", "question")
_CONTEXTS = ("input", "context")

#: Stands for a user's words in a rendered template; the character is in private use.
_PLACE = "\ue0f2"

Message = dict[str, Any]


@dataclass(frozen=True)
class CorpusSource:
    """A corpus that prompts are taken from.

    Attributes:
        source: As for `load_blocks`: "embedded", a file, a folder, a hub dataset or "-".
        text_column: The column to read (default: by the form of the records).
        num_samples: The number of records to read; None for all.
        split: A split of a hub dataset or of the embedded corpus.
        config: A configuration of a hub dataset.
    """

    source: str = "embedded"
    text_column: str | None = None
    num_samples: int | None = None
    split: str | None = None
    config: str | None = None


@dataclass(frozen=True)
class Prompts:
    """Prompts by split. All prompts of a record are in the same split.

    Attributes:
        train: The token ids of each prompt.
        held_out: The token ids of each held-out prompt.
        corpora: Where they are from.
        around: The token ids before and after a user's words in the chat template; None if there is
            no template.
    """

    train: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    corpora: tuple[PromptCorpus, ...]
    around: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class _Words:
    """A prompt as text.

    Attributes:
        text: The text.
        can_be_cut: Whether its beginning is a prompt as well.
    """

    text: str
    can_be_cut: bool = False


@dataclass
class _Found:
    """The prompts of one corpus, and how many were left out."""

    splits: dict[Split, list[tuple[int, ...]]] = field(
        default_factory=lambda: {split: [] for split in SPLITS}
    )
    records: int = 0
    too_long: int = 0


def load_prompts(
    sources: Sequence[CorpusSource],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    longest: int,
    bos: str = "auto",
) -> Prompts:
    """Read the prompts of corpora.

    The embedded corpus says of each record whether it is held out. Of other corpora, every fifth
    record is. A question becomes the user's turn of the model's chat template, and of a chat, all
    turns up to its first answer are taken. Of a text, long paragraphs are prompts, 32 at most: a
    chat model gets a task with each, any other model continues it.

    Args:
        sources: The corpora.
        tokenizer: The tokenizer of the model.
        longest: The most tokens of a prompt. Longer texts are cut, other prompts are left out.
        bos: Whether prompts begin with BOS: "auto", "yes" or "no".

    Raises:
        CorpusError: A corpus cannot be read, or there is no prompt in a split.
    """
    if tokenizer is None:
        raise CorpusError(
            "the model has no tokenizer to read prompts with; load it with its tokenizer"
        )
    rule = bos_rule(tokenizer, bos)
    everything: dict[Split, list[tuple[int, ...]]] = {split: [] for split in SPLITS}
    corpora = []
    for source in sources:
        found = _read(source, tokenizer, rule, longest)
        for split in SPLITS:
            everything[split] += found.splits[split]
        corpora.append(_provenance(source, found))
    for split, prompts in everything.items():
        if not prompts:
            names = ", ".join(source.source for source in sources)
            raise CorpusError(
                f"expected at least one prompt of {longest} tokens or less in the {split} split of "
                f"{names}, got none; take more records or another --corpus"
            )
    # A prompt that both splits have would be judged after it was trained on.
    held_out = tuple(dict.fromkeys(everything["held-out"]))
    judged = set(held_out)
    train = tuple(each for each in dict.fromkeys(everything["train"]) if each not in judged)
    if not train:
        raise CorpusError("all training prompts are held out as well; take another --corpus")
    return Prompts(train, held_out, tuple(corpora), _around(tokenizer, rule))


def _provenance(source: CorpusSource, found: _Found) -> PromptCorpus:
    digest = hashlib.sha256()
    for split in SPLITS:
        for ids in found.splits[split]:
            digest.update(np.array([len(ids), *ids], dtype="<i4").tobytes())
    return PromptCorpus(
        source=source.source,
        text_column=source.text_column,
        split=source.split,
        config=source.config,
        records=found.records,
        train=len(found.splits["train"]),
        held_out=len(found.splits["held-out"]),
        too_long=found.too_long,
        fingerprint=f"sha256:{digest.hexdigest()}",
    )


def _read(
    source: CorpusSource, tokenizer: PreTrainedTokenizerBase, rule: BosRule, longest: int
) -> _Found:
    found = _Found()
    reader = RecordReader(source.source, source.text_column)
    records = read_records(source.source, split=source.split, config=source.config, stream=False)
    for number, record in enumerate(itertools.islice(records, source.num_samples), start=1):
        found.records += 1
        split: Split = "train" if split_of(record, number, source.source) == "train" else "held-out"
        passages = reader.passages(record, number)  # refuses what is in no form that is known
        if not passages or all(passage.is_blank() for passage in passages):
            continue
        place = f"{source.source}, record {number}"
        for words in _texts(record, passages, source.text_column, tokenizer, place):
            ids = tuple(prompt_ids(tokenizer, words.text, rule))
            if len(ids) > longest and not words.can_be_cut:
                found.too_long += 1
            elif ids:
                found.splits[split].append(ids[:longest])
    return found


def _texts(
    record: Any,
    passages: Sequence[Passage],
    column: str | None,
    tokenizer: PreTrainedTokenizerBase,
    place: str,
) -> Iterator[_Words]:
    """Yield the prompts of a record as texts."""
    chats = has_template(tokenizer)
    if chats and column is None and isinstance(record, dict):
        for turns in _turns(record, place):
            yield _Words(_rendered(turns, tokenizer, place))
        if any(name in record for name in (*_CHATS, *_QUESTIONS)):
            return
    for passage in passages:
        whole = passage.whole()
        if passage.responses:
            yield _Words(whole[: passage.responses[0][0]])
        elif passage.responses is None:
            for part in _paragraphs(whole):
                if not chats:
                    yield _Words(part, can_be_cut=True)
                    continue
                # The same text gets the same task, so that prompts that are equal are found.
                task = TASKS[zlib.crc32(part.encode()) % len(TASKS)]
                turns = [{"role": "user", "content": f"{task}\n\n{part}"}]
                yield _Words(_rendered(turns, tokenizer, place))


def _paragraphs(text: str) -> list[str]:
    """Return the beginnings of long paragraphs; of a text without one, its own beginning."""
    split = [line.split() for line in text.split("\n")]
    words = [found for found in split if len(found) >= _PARAGRAPH_WORDS] or [text.split()]
    wanted = min(_MOST_PARAGRAPHS, len(words))
    chosen = [words[(2 * at + 1) * len(words) // (2 * wanted)] for at in range(wanted)]
    return [" ".join(found[:_PASSAGE_WORDS]) for found in chosen if found]


def _turns(record: dict[str, Any], place: str) -> Iterator[list[Message]]:
    """Yield the turns before each answer of a record, which a model could give."""
    for column in _CHATS:
        if record.get(column):
            messages = messages_of(record[column], f"{place}, column {column!r}")
            yield from _before_answer(messages)
            return
    asked = next((name for name in _QUESTIONS if record.get(name)), None)
    if asked is None:
        return
    question = record[asked]
    if is_chat(question):
        yield from _before_answer(messages_of(question, f"{place}, column {asked!r}"))
        return
    instances = record.get("instances")
    for rest in instances if isinstance(instances, list) and instances else [record]:
        context = next((rest[name] for name in _CONTEXTS if rest.get(name)), "")
        yield [{"role": "user", "content": f"{question}\n\n{context}" if context else question}]


def _before_answer(messages: Sequence[Message]) -> Iterator[list[Message]]:
    turns = list(itertools.takewhile(lambda message: message["role"] != "assistant", messages))
    if any(message["role"] == "user" for message in turns):
        yield turns


def _rendered(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    from cascade.core.errors import first_line

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as error:  # templates raise errors of their own
        raise CorpusError(
            f"{place}: the tokenizer's chat template does not take this chat "
            f"({first_line(error)}); fix it or name a text column with --text-column"
        ) from error


def _around(
    tokenizer: PreTrainedTokenizerBase, rule: BosRule
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the token ids before and after a user's words in the template, if it has any."""
    if not has_template(tokenizer):
        return None
    text = _rendered([{"role": "user", "content": _PLACE}], tokenizer, "a chat of one turn")
    before, place, after = text.partition(_PLACE)
    if not place:
        return None
    tail = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]
    return tuple(prompt_ids(tokenizer, before, rule)), tuple(tail)
