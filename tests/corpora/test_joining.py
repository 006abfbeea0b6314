"""Each token is marked with its record and as response text or not."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.corpora import MIXED, blocks_of, decoded, embedded_records, in_lines, in_vocabulary

from cascade.core.errors import CorpusError
from cascade.corpora.blocks import load_blocks
from cascade.corpora.forms import alpaca_text

if TYPE_CHECKING:
    from cascade import DecoderStack


def marked_by_hand(records: Sequence[dict[str, str]]) -> list[tuple[str, int, bool]]:
    """Return (symbol, record, response) of every token, with EOS between texts."""
    found = []
    for number, record in enumerate(records, start=1):
        template = ""
        if "text" not in record:
            template = alpaca_text(record["instruction"], record["input"], "")
        output = record.get("text", record.get("output", ""))
        # The tiny tokenizer reads several line breaks in a row as one token.
        found += [(symbol, number, False) for symbol in in_vocabulary(template)]
        found += [(symbol, number, True) for symbol in output]
        found += [("\n", number, True)]
    return found[:-1]


@given(records=MIXED, seq_len=st.integers(2, 9), max_tokens=st.none() | st.integers(9, 90))
def test_marks_match_a_hand_count(
    records: list[dict[str, str]], seq_len: int, max_tokens: int | None
) -> None:
    expected = marked_by_hand(records)
    limit = min(len(expected), max_tokens or len(expected)) // seq_len * seq_len
    if not limit:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = in_lines(Path(folder) / "x.jsonl", records)
        settings = {"seq_len": seq_len, "max_tokens": max_tokens}
        blocks = blocks_of(path, marks=True, **settings)
        plain = blocks_of(path, **settings)
    assert blocks.record_of is not None
    assert blocks.response is not None
    assert (blocks.record_of.dtype, blocks.response.dtype) == (np.int32, np.bool_)
    assert blocks.record_of.shape == blocks.response.shape == blocks.ids.shape
    marks = zip(decoded(blocks), blocks.record_of.flat, blocks.response.flat, strict=True)
    assert [(*mark,) for mark in marks] == expected[:limit]
    # Marks change no token.
    assert np.array_equal(blocks.ids, plain.ids)
    assert blocks.provenance() == plain.provenance()
    assert (plain.record_of, plain.response) == (None, None)


class SlowTokenizer:
    """A tokenizer without offsets, with one token per `size` letters."""

    is_fast = False
    bos_token_id = None
    eos_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        pieces = [text[start : start + self.size] for start in range(0, len(text), self.size)]
        return {"input_ids": [1 + sum(map(ord, piece)) for piece in pieces]}


def test_response_without_offsets_needs_a_token_border(tmp_path: Path) -> None:
    record = {"instruction": "Add.", "input": "", "output": "fours"}
    template = len(alpaca_text("Add.", "", ""))
    path = in_lines(tmp_path / "x.jsonl", [record])
    letters: Any = SlowTokenizer(1)
    blocks = load_blocks(str(path), letters, seq_len=template + 5, marks=True)
    assert blocks.response is not None
    assert blocks.response.sum() == 5
    assert blocks.response[0, template:].all()
    pairs: Any = SlowTokenizer(2 if template % 2 else 4)
    with pytest.raises(CorpusError, match="record 1: this tokenizer has no offsets, and a token c"):
        load_blocks(str(path), pairs, seq_len=2, marks=True)
    plain = in_lines(tmp_path / "y.jsonl", [{"text": "no border at all"}])
    unmarked = load_blocks(str(plain), pairs, seq_len=2, marks=True)
    assert unmarked.response is not None
    assert unmarked.response.all()


def test_token_across_the_border_belongs_to_the_template(tmp_path: Path) -> None:
    # The tiny tokenizer reads several line breaks in a row as one token.
    path = in_lines(tmp_path / "x.jsonl", [{"instruction": "i", "input": "", "output": "\nabc"}])
    text = in_vocabulary(alpaca_text("i", "", "\nabc"))
    blocks = blocks_of(path, seq_len=len(text), marks=True)
    assert blocks.response is not None
    assert blocks.response[0].tolist() == [False] * (len(text) - 3) + [True] * 3


@pytest.mark.saturation
def test_reference_tokenizer_marks_exactly_the_answers(
    reference_model: DecoderStack,
) -> None:
    tokenizer = reference_model.tokenizer
    assert tokenizer is not None
    blocks = load_blocks("embedded", tokenizer, num_samples=200, marks=True)
    assert blocks.record_of is not None
    assert blocks.response is not None
    for number in range(1, 180):
        own = blocks.response & (blocks.record_of == number)
        answer = tokenizer.decode(blocks.ids[own]).removesuffix(tokenizer.eos_token)
        assert answer == embedded_records()[number - 1]["output"]
