"""Readers of corpus files and hub datasets."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from cascade.core.errors import CorpusError, first_line, os_reason
from cascade.corpora.record_text import Record

#: The name of the corpus in the package, with 500 records in Alpaca form.
EMBEDDED = "embedded"


def read_records(
    source: str, *, split: str | None, config: str | None, stream: bool
) -> Iterable[Record]:
    """Return the records of a corpus file or dataset."""
    if source == EMBEDDED:
        if config is not None:
            raise CorpusError(
                f"--config belongs to hub datasets, got it for {source}; leave it out"
            )
        return read_embedded(split)
    # These functions of os.path accept any string; Path's raise for "~nobody" and long names.
    path = Path(os.path.expanduser(source))
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        if os.path.isfile(path):
            raise CorpusError(f"expected a {', '.join(_READERS)} file, got {source}; convert it")
        return _read_dataset(source, split=split, config=config, stream=stream)
    if not os.path.isfile(path):
        raise CorpusError(f"no corpus file {source}; expected a path to an existing file")
    if split or config:
        raise CorpusError(f"--split and --config belong to hub datasets, got them for {source}")
    return _READERS[suffix](path)


def read_texts(texts: Iterable[str | Record], text_column: str | None) -> Iterator[Record]:
    """Yield a record for each text or row of a corpus in memory.

    Args:
        texts: Texts, or records such as the rows of a `datasets.Dataset`.
        text_column: The column that a text becomes. Default: "text".

    Example:
        >>> list(read_texts(["One text.", "Another."], None))
        [{'text': 'One text.'}, {'text': 'Another.'}]
    """
    for text in texts:
        yield {text_column or "text": text} if isinstance(text, str) else text


def name_of_texts(texts: Iterable[str | Record]) -> str:
    """Return the name of a corpus in memory: the dataset's, else "texts".

    Args:
        texts: Texts, or a `datasets.Dataset`.

    Raises:
        CorpusError: It is neither, or all splits of a dataset.

    Example:
        >>> name_of_texts(["One text."])
        'texts'
    """
    if isinstance(texts, Mapping):
        names = ", ".join(map(repr, texts)) or "none"
        raise CorpusError(f"expected texts or one split of a dataset, got the splits {names}")
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        kind = type(texts).__name__
        raise CorpusError(f"expected a list of texts, a dataset or a corpus's name, got {kind}")
    info = getattr(texts, "info", None)
    name = getattr(info, "dataset_name", None) or "texts"
    split = getattr(texts, "split", None)
    return f"{name}-{split}" if split else str(name)


def read_embedded(split: str | None) -> list[Record]:
    """Return the records of the embedded corpus.

    Args:
        split: A split; None for all records.

    Raises:
        CorpusError: There is no such split.
    """
    text = resources.files("cascade").joinpath("data/embedded.jsonl").read_text(encoding="utf-8")
    records: list[Record] = [json.loads(line) for line in text.splitlines()]
    splits = sorted({record["split"] for record in records})
    if split is not None and split not in splits:
        raise CorpusError(f"expected --split among {', '.join(splits)}, got {split}")
    return [record for record in records if split in (None, record["split"])]


def _read_lines(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CorpusError(f"{path}, line {number}: not JSON ({error}); fix it") from error


def _read_json(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{path}: not JSON ({error}); fix it") from error
    if not isinstance(content, list):
        raise CorpusError(f"{path}: expected a list of records, got {type(content).__name__}")
    return iter(content)


def _read_parquet(path: Path) -> Iterator[Record]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except Exception as error:
        # A damaged file raises Arrow's errors, OSError or UnicodeDecodeError.
        raise CorpusError(
            f"{path} is not a readable Parquet file ({first_line(error)}); get it again"
        ) from error


def _read_document(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        text = file.read()
    if text.strip():
        yield {"text": text}


def _open(path: Path) -> Any:
    try:
        # Decode the whole file at once, because later errors would not name the file. The encoding
        # accepts files with and without a byte order mark.
        return io.StringIO(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: expected UTF-8 text ({error})") from error
    except OSError as error:
        raise CorpusError(
            f"cannot read {path}: {os_reason(error)}; choose a file you can read"
        ) from error


_READERS: dict[str, Callable[[Path], Iterable[Record]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_document,
}


def _read_dataset(
    source: str, *, split: str | None, config: str | None, stream: bool
) -> Iterable[Record]:
    import datasets

    # Stream only on request, because a downloaded dataset is cached for the next run.
    streaming = {"streaming": True} if stream else {}
    try:
        records: Iterable[Record] = datasets.load_dataset(
            source, config, split=split or "train", **streaming
        )
    except Exception as error:
        raise _no_dataset(source, error) from error
    return _streamed(source, records) if stream else records


def _streamed(source: str, records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records, turning errors during the stream into the same error as at its start."""
    try:
        yield from records
    except Exception as error:
        raise _no_dataset(source, error) from error


def _no_dataset(source: str, error: Exception) -> CorpusError:
    # As with hub models, many unrelated error types mean the same for the user.
    return CorpusError(
        f"no corpus {source}: {first_line(error)}; expected embedded, a .jsonl, .json,"
        " .parquet or .txt file, or a hub dataset (with --config and --split) where the hub"
        " can be reached"
    )
