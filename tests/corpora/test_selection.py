"""Records are drawn by seed, and no more of them are held than needed."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.corpora import blocks_of

from cascade.corpora import long_texts
from cascade.corpora.selection import drawn


class Again:
    """Records that can be read again, as those of a file."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> object:
        return iter(range(self._count))


@given(
    count=st.integers(0, 40), seed=st.integers(0, 99), num_samples=st.none() | st.integers(1, 50)
)
def test_shuffled_records_are_those_of_one_shuffled_list(
    count: int, seed: int, num_samples: int | None
) -> None:
    expected = list(range(count))
    random.Random(seed).shuffle(expected)
    expected = expected[:num_samples]
    for records in (range(count), Again(count), iter(range(count))):
        assert list(drawn(records, seed, num_samples)) == expected  # type: ignore[arg-type]
        if not isinstance(records, range):
            continue
        assert list(drawn(records, None, num_samples)) == list(range(count))[:num_samples]


def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny tokenizer makes a token of each character, and offsets take 100 bytes each.
    monkeypatch.setattr(long_texts, "_WINDOW", 4099)
    line = json.dumps({"text": "quiet forest " * 80}) + "\n"
    documents = {"lines.jsonl": line * 4000, "long.txt": "quiet forest " * 1_000_000}
    for name, text in documents.items():
        (tmp_path / name).write_text(text)
        for seed in (None, 1):
            options = {"seed": seed, "num_samples": 5, "max_tokens": 64, "seq_len": 16}
            tracemalloc.start()
            assert blocks_of(tmp_path / name, **options).tokens == 64
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 0.6 * len(text), (name, seed, peak)
