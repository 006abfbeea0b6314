"""Kinds of corpus files, by the ending of their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Endings of compressed files. The ending before it names the kind.
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")

#: Kinds of text files, which may be compressed. The three JSON endings are one kind.
TEXT_KINDS = {
    ".jsonl": "JSON",
    ".json": "JSON",
    ".ndjson": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".txt": "text",
}

#: All kinds of files.
KINDS = TEXT_KINDS | {".parquet": "Parquet", ".arrow": "Arrow"}

#: What help texts and errors say.
ENDINGS = ".jsonl, .json, .ndjson, .csv, .tsv, .txt, .parquet or .arrow"


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus.

    Attributes:
        path: The file.
        kind: A value of `KINDS`.
        compression: One of `COMPRESSED`, or "".
    """

    path: Path
    kind: str
    compression: str = ""

    def __str__(self) -> str:
        return str(self.path)


def file_of(path: Path) -> CorpusFile | None:
    """Return the kind of a file by its name; None if it is no corpus file.

    Args:
        path: The file, which need not exist.

    Example:
        >>> file_of(Path("rows.csv.gz"))
        CorpusFile(path=PosixPath('rows.csv.gz'), kind='CSV', compression='.gz')
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return None if kind is None else CorpusFile(path, kind, compression)


def name_of_file(path: Path) -> str:
    """Return a file's name without its ending, and without that of its compression."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem
