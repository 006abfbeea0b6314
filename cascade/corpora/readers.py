"""Sources of records: files, folders, pipes, hub datasets, and texts in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from cascade.core.errors import CorpusError, first_line
from cascade.corpora.files.documents import read_document
from cascade.corpora.files.folders import files_of, is_saved, read_saved
from cascade.corpora.files.json_values import read_json
from cascade.corpora.files.kinds import ENDINGS, CorpusFile, file_of
from cascade.corpora.files.standard_input import (
    PipedFile,
    check_no_device,
    is_pipe,
    piped_file,
)
from cascade.corpora.files.tables import read_arrow, read_csv, read_parquet
from cascade.corpora.forms import Record

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
    check_no_device(source)
    if is_pipe(source):
        _check_no_split(source, split, config)
        return _Records([piped_file(source)])
    # These functions of os.path accept any string; Path's raise for "~nobody" and long names.
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return _read_folder(path, source, split=split, config=config, stream=stream)
    file = file_of(path)
    if file is None:
        if os.path.isfile(path):
            raise CorpusError(f"expected a {ENDINGS} file, got {source}; convert it")
        return _read_dataset(source, split=split, config=config, stream=stream)
    if not os.path.isfile(path):
        raise CorpusError(f"no corpus file {source}; expected a path to an existing file")
    _check_no_split(source, split, config)
    return _Records([file])


def _check_no_split(source: str, split: str | None, config: str | None) -> None:
    if split or config:
        raise CorpusError(
            f"--split and --config belong to hub datasets, got them for {source}; leave them out"
        )


def _read_folder(
    path: Path, source: str, *, split: str | None, config: str | None, stream: bool
) -> Iterable[Any]:
    if is_saved(path):
        if config is not None:
            raise CorpusError(
                f"--config belongs to hub datasets, got it for {source}; leave it out"
            )
        return read_saved(path, split)
    # A copy of a hub dataset says in its card which files a configuration has.
    if config is not None or _has_configs(path):
        return _read_dataset(source, split=split, config=config, stream=stream)
    return _Records(files_of(path, split))


def _has_configs(folder: Path) -> bool:
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return card.startswith("---") and "\nconfigs:" in card


class _Records:
    """The records of files. Each iteration reads them again, as a stream."""

    def __init__(self, files: Sequence[CorpusFile | PipedFile]) -> None:
        for file in files:
            if file.compression and file.kind in ("Parquet", "Arrow"):
                raise CorpusError(
                    f"expected {file.kind} without {file.compression}, got {file}; unpack it"
                )
        self._files = files

    def __iter__(self) -> Iterator[Any]:
        for file in self._files:
            yield from _READERS[file.kind](file)


def read_texts(texts: Iterable[str | Record], text_column: str | None) -> Iterator[Record]:
    """Yield a record for each text or row of a corpus in memory.

    Args:
        texts: Texts, or records such as the rows of a `datasets.Dataset`.
        text_column: The column that a text becomes. Default: "text".

    Example:
        >>> list(read_texts(["One text.", "Another."], None))
        [{'text': 'One text.'}, {'text': 'Another.'}]
    """
    for text in _rows(texts):
        yield {text_column or "text": text} if isinstance(text, str) else text


def _rows(texts: Any) -> Iterable[Any]:
    """Return the rows of a pandas DataFrame or an Arrow table, which iterate over columns."""
    if hasattr(texts, "iterrows") and hasattr(texts, "to_dict"):
        return (dict(row) for row in texts.to_dict("records"))
    if hasattr(texts, "to_batches") and hasattr(texts, "schema"):
        return (row for batch in texts.to_batches() for row in batch.to_pylist())
    rows: Iterable[Any] = texts
    return rows


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
    if isinstance(texts, bytes) or not (
        isinstance(texts, Iterable) or hasattr(texts, "to_batches")
    ):
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


_READERS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "JSON": read_json,
    "CSV": read_csv,
    "TSV": read_csv,
    "text": read_document,
    "Parquet": read_parquet,
    "Arrow": read_arrow,
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
        f"no corpus {source}: {first_line(error)}; expected embedded, a {ENDINGS} file, a folder"
        " of such files, or a hub dataset (with --config and --split) where the hub can be reached"
    )
