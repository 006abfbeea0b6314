"""CSV, TSV and Arrow files."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from support.corpora import RECORDS, blocks_of, decoded, joined

from cascade.core.errors import CorpusError


@pytest.mark.parametrize(("name", "sign"), [("x.csv", ","), ("x.TSV", "\t")])
def test_the_first_row_names_the_columns(name: str, sign: str, tmp_path: Path) -> None:
    rows = [["n", "text"], ["1", f'"a{sign}b\n""c"""'], [], ["2", 'say "hi"']]
    (tmp_path / name).write_text("\n".join(sign.join(row) for row in rows))
    blocks = blocks_of(tmp_path / name, seq_len=15)
    shown = f'a{sign}b\n"c"\nsay "hi"'.replace("\t", "~").replace("b\n", "b~")
    assert decoded(blocks) == shown[:15]
    assert decoded(blocks_of(tmp_path / name, seq_len=3, text_column="n")) == "1\n2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,n\nabc,1\nde,f,2\n", "line 3: expected 2 fields as in the first row, got 3; quote"),
        ("text,n\nabc\n", "line 2: expected 2 fields as in the first row, got 1; quote"),
        ('text\n"abc\ndef\n', r"line 3: not CSV \(unexpected end of data\); fix it"),
        ("text,text\na,b\n", "expected different names of columns in the first row, got text"),
        ("abc def\nghi\n", "got abc def; name one with --text-column"),
        ("text\n", "is empty; expected at least one record"),
        ("", "is empty; expected at least one record"),
    ],
)
def test_a_malformed_csv_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(CorpusError, match=message):
        blocks_of(tmp_path / "x.csv")


def test_fields_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text\n" + "a" * 200_000)
    assert blocks_of(tmp_path / "x.csv", max_tokens=8).tokens == 8


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_are_read(kind: str, tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(RECORDS)
    path = tmp_path / "x.arrow"
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    assert decoded(blocks_of(path, seq_len=103)) == joined(RECORDS)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorpusError, match="is not a readable Arrow file"):
        blocks_of(path)
