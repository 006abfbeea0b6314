"""Tables: CSV, TSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from cascade.core.errors import CorpusError, first_line
from cascade.corpora.files.kinds import CorpusFile
from cascade.corpora.files.opening import open_text

#: Rows that are read at a time.
_ROWS = 256

#: The longest field. The default of the csv module, 131,072, is less than a long document.
_LONGEST_FIELD = 2**31 - 1


def read_csv(file: CorpusFile) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV or TSV file, whose first row names the columns.

    Raises:
        CorpusError: A row has more or fewer fields than the first one, or a quote has no end.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    with open_text(file, newline="") as text:
        rows = csv.reader(text, delimiter="\t" if file.kind == "TSV" else ",", strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise CorpusError(
                    f"{file}: expected different names of columns in the first row, got "
                    f"{', '.join(header)[:80]}; rename them"
                )
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise CorpusError(
                        f"{file}, line {rows.line_num}: expected {len(header)} fields as in the "
                        f"first row, got {len(row)}; quote fields that hold commas, tabs or lines"
                    )
                yield dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise CorpusError(
                f"{file}, line {rows.line_num}: not {file.kind} ({error}); fix it"
            ) from error


def read_parquet(file: CorpusFile) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file.

    Raises:
        CorpusError: It cannot be read.
    """
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(_ROWS):
                yield from batch.to_pylist()
    except Exception as error:
        raise _unreadable(file, error) from error


def read_arrow(file: CorpusFile) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow file, as a stream or with a footer.

    Raises:
        CorpusError: It cannot be read.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(str(file.path)) as source:
            footer = source.read(6) == b"ARROW1"
            source.seek(0)
            if footer:
                table = pyarrow.ipc.open_file(source)
                batches = (table.get_batch(number) for number in range(table.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(source))
            for batch in batches:
                for start in range(0, len(batch), _ROWS):
                    yield from batch.slice(start, _ROWS).to_pylist()
    except Exception as error:
        raise _unreadable(file, error) from error


def _unreadable(file: CorpusFile, error: Exception) -> CorpusError:
    # A damaged file raises Arrow's errors, OSError or UnicodeDecodeError.
    return CorpusError(
        f"{file} is not a readable {file.kind} file ({first_line(error)}); get it again"
    )
