"""Files are decompressed and decoded, or refused in one line that says what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from support.corpora import RECORDS, blocks_of, decoded, joined

from cascade.core.errors import CorpusError

LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_are_read(ending: str, tmp_path: Path) -> None:
    half = LINES.index(b"\n") + 1
    content = COMPRESS[ending](LINES[:half]) + COMPRESS[ending](LINES[half:])
    path = tmp_path / f"My.Rows.jsonl{ending.upper()}"
    path.write_bytes(content)
    blocks = blocks_of(path, seq_len=103)
    assert decoded(blocks) == joined(RECORDS)
    assert blocks.name == "my.rows"
    for damaged in (content[:-9], b"no compression", LINES):
        path.write_bytes(damaged)
        with pytest.raises(CorpusError, match=f"is not a readable {ending} file .*; get it again"):
            blocks_of(path)


def test_compressed_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet.gz").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"expected Parquet without \.gz, got .*; unpack it"):
        blocks_of(tmp_path / "x.parquet.gz")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_names_the_encoding(encoding: str, newline: str, tmp_path: Path) -> None:
    text = LINES.decode().replace("\n", newline)
    (tmp_path / "x.jsonl").write_bytes(text.encode(encoding))
    assert decoded(blocks_of(tmp_path / "x.jsonl", seq_len=103)) == joined(RECORDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("quiet forest".encode("utf-16-le"), "got UTF-16LE without .*: iconv -f UTF-16LE -t UTF-8"),
        ("quiet forest".encode("utf-16-be"), "got UTF-16BE without .*: iconv -f UTF-16BE -t UTF-8"),
        (
            "caf\u00e9 ol\u00e9".encode("latin-1"),
            "expected UTF-8 text .*: iconv -f LATIN1 -t UTF-8",
        ),
    ],
)
def test_other_encodings_are_refused_with_the_command_that_converts(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        blocks_of(tmp_path / "x.txt")
