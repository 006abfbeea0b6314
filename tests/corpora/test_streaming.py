"""A corpus read as a stream: the sequences of `load_blocks`, without holding them."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.disk import largest_file
from support.tiny_models import tiny_tokenizer

from cascade.core.errors import CorpusError, OutputError
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.corpora.joining import cut
from cascade.corpora.streaming import sequences, stream_blocks, write_ids

TOKENIZER = tiny_tokenizer()


def same(blocks: TokenBlocks, expected: TokenBlocks) -> bool:
    return (
        np.array_equal(blocks.ids, expected.ids)
        and blocks.provenance() == expected.provenance()
        and np.array_equal(blocks.sequence_fingerprints(), expected.sequence_fingerprints())
    )


def loaded(texts: list[str], options: dict[str, Any]) -> TokenBlocks | str:
    """Return the sequences of `load_blocks`, or the message of its error."""
    try:
        return load_blocks(texts, TOKENIZER, num_samples=None, **options)
    except CorpusError as error:
        return str(error)


@given(
    st.lists(st.text("abc de", min_size=1, max_size=12), min_size=1, max_size=12),
    st.integers(2, 6),
    st.one_of(st.none(), st.integers(6, 40)),
    st.one_of(st.none(), st.integers(0, 3)),
)
def test_a_stream_has_the_sequences_of_load_blocks(
    texts: list[str], seq_len: int, max_tokens: int | None, seed: int | None
) -> None:
    options: dict[str, Any] = {"seq_len": seq_len, "max_tokens": max_tokens, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        expected = loaded(texts, options)
        if isinstance(expected, TokenBlocks):
            assert same(stream_blocks(texts, TOKENIZER, path, **options), expected)
            return
        with pytest.raises(CorpusError) as caught:
            stream_blocks(texts, TOKENIZER, path, **options)
        assert str(caught.value) == expected


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=7), max_size=8),
    st.integers(2, 5),
    st.sampled_from([None, 0, 1]),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_sequences_are_cut_from_pieces_as_from_the_whole(
    pieces: list[list[int]], seq_len: int, bos: int | None, most: int | None
) -> None:
    ids = array("i", [one for piece in pieces for one in piece])
    whole = cut(ids, seq_len, bos, most)
    expected = np.array(ids, dtype=np.int32)[whole.places]
    if bos is not None and len(expected):
        expected[whole.begun, 0] = bos
    found = [row.tolist() for row in sequences(pieces, seq_len, bos, most)]
    assert found == expected.tolist()


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.txt", "texts.csv"])
@pytest.mark.parametrize("bos", ["no", "auto"])
def test_files_are_streamed_as_they_are_loaded(tmp_path: Path, name: str, bos: str) -> None:
    lines = [f"number {k} of some texts" for k in range(20)]
    written = {
        "texts.jsonl": "\n".join(json.dumps({"text": line}) for line in lines),
        "texts.txt": "\n".join(lines),
        "texts.csv": "\n".join(["text", *lines]),
    }
    (tmp_path / name).write_text(written[name])
    options: dict[str, Any] = {"seq_len": 8, "num_samples": 15, "bos": bos}
    found = stream_blocks(tmp_path / name, TOKENIZER, tmp_path / "tokens.bin", **options)
    assert same(found, load_blocks(tmp_path / name, TOKENIZER, **options))


def test_the_embedded_corpus_and_its_splits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"seq_len": 32, "max_tokens": 3200, "record_split": "held-out"}
    found = stream_blocks("embedded", TOKENIZER, tmp_path / "tokens.bin", **options)
    assert same(found, load_blocks("embedded", TOKENIZER, **options))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    def texts(count: int) -> Iterator[str]:
        return (f"number {k} of many" for k in range(count))

    peaks = []
    for count in (1000, 8000):
        tracemalloc.start()
        blocks = stream_blocks(texts(count), TOKENIZER, tmp_path / f"{count}", seq_len=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Eight times the text: what is held is the same, and far less than the ids.
    assert peaks[1] < 1.2 * peaks[0] + 50_000
    assert blocks.ids.nbytes > 400_000


def test_a_full_disk_and_an_unreadable_corpus_are_different_errors(tmp_path: Path) -> None:
    def failing() -> Iterator[str]:
        yield "some text of a corpus"
        raise OSError(5, "the corpus is broken")

    with largest_file(1000), pytest.raises(OutputError, match=r"cannot write .*tokens"):
        stream_blocks(["some text"] * 1000, TOKENIZER, tmp_path / "tokens", seq_len=8)
    with pytest.raises(OSError, match="the corpus is broken"):
        stream_blocks(failing(), TOKENIZER, tmp_path / "tokens", seq_len=2)


def test_blocks_are_written_as_they_are(tmp_path: Path) -> None:
    ids = np.arange(24, dtype=np.int32).reshape(6, 4)
    blocks = TokenBlocks(ids, "numbers", "numbers", records=6)
    found = write_ids(tmp_path / "tokens.bin", blocks)
    assert isinstance(found.ids, np.memmap)
    assert same(found, blocks)
