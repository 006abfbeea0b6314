"""Corpora by hand: a few records, in every form of file."""

from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
from hypothesis import strategies as st
from pyarrow import parquet

from cascade.core.errors import CorpusError
from cascade.corpora.blocks import TokenBlocks, load_blocks
from support.tiny_models import tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


EOS = 1
RECORDS = [{"text": f"{number:02} {letter * 9}"} for number, letter in enumerate("abcdefgh")]
SPLITS = {"train": RECORDS[:5], "test": RECORDS[5:]}


@functools.cache
def the_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of one token per character: text can be read back from its ids."""
    return tiny_tokenizer()


def blocks_of(source: object, **settings: Any) -> TokenBlocks:
    return load_blocks(str(source), the_tokenizer(), **({"seq_len": 4} | settings))


def decoded(blocks: TokenBlocks) -> str:
    """Return the text of all blocks, EOS shown as a line break, the unknown as a tilde."""
    symbols = the_tokenizer().convert_ids_to_tokens(blocks.ids.ravel().tolist())
    return "".join(symbols).replace("<eos>", "\n").replace("<unk>", "~")


def in_vocabulary(text: str) -> str:
    """Return a text as `decoded` shows it: line breaks in a row are one unknown token."""
    return re.sub("\n+", "~", text)


def outcome(read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a call returns, or the CorpusError that it raises; no other error."""
    try:
        return read(*args, **kwargs)
    except CorpusError as error:
        return error


def joined(records: Sequence[dict[str, str]]) -> str:
    return "\n".join(record["text"] for record in records)


def in_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def in_json(path: Path, records: Sequence[Any]) -> Path:
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def in_parquet(path: Path, records: Sequence[Any]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(list(records)), path, row_group_size=3)
    return path


def some_blocks(ids: Any) -> TokenBlocks:
    return TokenBlocks(np.array(ids, dtype=np.int32), "here", "here", 1)


@functools.cache
def embedded_records() -> list[dict[str, str]]:
    text = resources.files("cascade").joinpath("data/embedded.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


ALPACA = st.fixed_dictionaries(
    {
        "instruction": st.text(string.ascii_lowercase + " ", min_size=1, max_size=9),
        "input": st.text(string.ascii_lowercase, max_size=5),
        "output": st.text(string.ascii_lowercase + " ", max_size=9),
    }
)
PLAIN = st.fixed_dictionaries({"text": st.text(string.ascii_lowercase, min_size=1, max_size=9)})
MIXED = st.lists(ALPACA, min_size=1, max_size=12) | st.lists(PLAIN, min_size=1, max_size=12)
