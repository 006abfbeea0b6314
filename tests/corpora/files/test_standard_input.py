"""A pipe holds text or JSON Lines, and can be read several times."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.corpora import RECORDS, blocks_of, decoded, joined

from cascade.core.errors import CorpusError
from cascade.corpora.files import standard_input

LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    standard_input._kept.cache_clear()


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    standard_input._kept.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LINES, joined(RECORDS)),
        (json.dumps(RECORDS), joined(RECORDS)),
        ("  \n" + json.dumps(RECORDS, indent=1), joined(RECORDS)),
        ("plain words", "plain words"),
        ("{curly} words", "{curly} words"),
        ("[1] a footnote", "[1] a footnote"),
    ],
)
def test_the_first_line_says_whether_it_is_json(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, text)
    for _ in range(2):
        blocks = blocks_of("-", seq_len=len(expected))
        assert decoded(blocks) == expected
        assert (blocks.source, blocks.name) == ("-", "stdin")


def test_no_more_is_read_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        read_bytes = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            line = LINES.encode()[: len(buffer)]
            buffer[: len(line)] = line
            self.read_bytes += len(line)
            assert self.read_bytes < 1_000_000
            return len(line)

    standard_input._kept.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    assert blocks_of("-", num_samples=20, seq_len=16).records == 20


def test_a_named_pipe_is_read(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as file:
        file.write(LINES)
    blocks = blocks_of(f"/dev/fd/{reading}", seq_len=103)
    os.close(reading)
    assert (decoded(blocks), blocks.name) == (joined(RECORDS), "pipe")


def test_a_terminal_and_a_split_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, LINES)
    with pytest.raises(CorpusError, match="--split and --config belong to hub datasets"):
        blocks_of("-", split="test")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with pytest.raises(CorpusError, match="got a terminal; pipe a file into the command"):
        blocks_of("-")
