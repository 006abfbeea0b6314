"""Corpora: a text source becomes blocks of token ids, `[sequences, seq_len]`."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cascade.errors import CorpusError, first_line, os_reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The corpus that comes with the package: 500 records in Alpaca form.
EMBEDDED = "embedded"

Record = dict[str, Any]


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids cut into blocks; each block is one sequence, the unit of every interval.

    Attributes:
        ids: `[S, T]` int32.
        source: What the user gave.
        name: A file-system name for baselines.
        records: How many records of the corpus were read.
    """

    ids: npt.NDArray[np.int32]
    source: str
    name: str
    records: int

    @property
    def tokens(self) -> int:
        """Tokens in all blocks."""
        return int(self.ids.size)

    def fingerprint(self) -> str:
        """Return a SHA-256 over shape and ids: equal exactly when every token is."""
        digest = hashlib.sha256(f"{self.ids.shape}".encode())
        digest.update(np.ascontiguousarray(self.ids, dtype="<i4").tobytes())
        return f"sha256:{digest.hexdigest()}"

    def sequence_fingerprints(self) -> npt.NDArray[np.uint64]:
        """Return 64 bits of SHA-256 per sequence, `[S]`: which sequences two runs share."""
        return np.array(
            [
                int.from_bytes(hashlib.sha256(row.astype("<i4").tobytes()).digest()[:8], "little")
                for row in self.ids
            ],
            dtype=np.uint64,
        )

    def batches(
        self, batch_size: int
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
        """Yield `(ids [B, T], sequence numbers [B])`; the last batch can be smaller."""
        for start in range(0, len(self.ids), batch_size):
            rows = self.ids[start : start + batch_size]
            yield rows, np.arange(start, start + len(rows))

    def provenance(self) -> dict[str, Any]:
        """Return what a record says of the corpus."""
        return {
            "source": self.source,
            "name": self.name,
            "fingerprint": self.fingerprint(),
            "records": self.records,
            "tokens": self.tokens,
            "sequences": len(self.ids),
            "seq_len": int(self.ids.shape[1]),
        }


def load_blocks(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int = 128,
    num_samples: int | None = 500,
    max_tokens: int | None = None,
    split: str | None = None,
    config: str | None = None,
    text_column: str | None = None,
    seed: int | None = None,
) -> TokenBlocks:
    """Read a corpus, put its records together, and cut the tokens into blocks.

    Records in Alpaca form become the seed study's text, others give their text column. Token ids
    of all records are joined by the tokenizer's EOS; what does not fill a last block is dropped.

    Args:
        source: "embedded", a `.jsonl`, `.json`, `.parquet` or `.txt` file (one document), or
            whatever `datasets.load_dataset` takes: a hub id or a folder.
        tokenizer: The model's.
        seq_len: Tokens per block.
        num_samples: How many records to take; None for all.
        max_tokens: Stop at this many tokens, rounded down to whole blocks.
        split: A split of a hub dataset ("train" where not given), or of the embedded corpus
            ("train", "held-out"; all of it where not given).
        config: A configuration of a hub dataset.
        text_column: The column to read, for records that are not in Alpaca form.
        seed: Take the records in an order drawn with this seed; in the corpus's own where None.

    Raises:
        CorpusError: The corpus is missing, empty, malformed or too small for one block.
    """
    if tokenizer is None:
        raise CorpusError("the model has no tokenizer to read text with; load it with one")
    if seq_len < 2:
        raise CorpusError(f"expected --seq-len of at least 2, got {seq_len}")
    if max_tokens is not None and max_tokens < seq_len:
        raise CorpusError(
            f"expected --max-tokens of at least one block of {seq_len} tokens, got {max_tokens}; "
            "raise it or take a smaller --seq-len"
        )
    records = _read(source, split=split, config=config)
    if seed is not None:
        records = _shuffled(records, seed)
    texts = (
        record_text(record, source=source, number=number, text_column=text_column)
        for number, record in enumerate(itertools.islice(records, num_samples), start=1)
    )
    wanted = None if max_tokens is None else max_tokens // seq_len * seq_len
    ids, count = _join(texts, tokenizer, wanted)
    if count == 0:
        raise CorpusError(f"{source} is empty; expected at least one record")
    rows = len(ids) // seq_len
    if wanted is not None:
        rows = min(rows, wanted // seq_len)
    if rows == 0:
        raise CorpusError(
            f"{source} gives {len(ids)} tokens, expected at least one block of {seq_len}; "
            "take more records or a smaller --seq-len"
        )
    blocks = np.array(ids[: rows * seq_len], dtype=np.int32).reshape(rows, seq_len)
    return TokenBlocks(blocks, source, corpus_name(source, config=config, split=split), count)


def corpus_name(source: str, *, config: str | None = None, split: str | None = None) -> str:
    """Return the file-system name that baselines know a corpus by; nothing of it is read.

    Args:
        source: As for `load_blocks`.
        config: A configuration of a hub dataset.
        split: A split.
    """
    path = Path(os.path.expanduser(source))
    name = path.resolve().stem if os.path.exists(path) else source.replace("/", "--")
    return "-".join(part.lower() for part in (name, config, split) if part)


def _join(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None
) -> tuple[list[int], int]:
    """Return the ids of all texts joined by EOS, and how many texts were taken."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise CorpusError("the tokenizer has no EOS token to join records with; set one")
    ids: list[int] = []
    count = 0
    for count, text in enumerate(texts, start=1):
        if count > 1:
            ids.append(int(eos))
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if wanted is not None and len(ids) >= wanted:
            break
    return ids, count


def _shuffled(records: Iterable[Record], seed: int) -> Iterator[Record]:
    everything = list(records)
    random.Random(seed).shuffle(everything)
    return iter(everything)


def record_text(record: Any, *, source: str, number: int, text_column: str | None = None) -> str:
    """Return a record's text: Alpaca form as the seed put it together, else its text column.

    Args:
        record: A mapping of columns.
        source: The corpus, for the error.
        number: The record's number from 1, for the error.
        text_column: The column to take; without it, Alpaca form or a column called "text".

    Raises:
        CorpusError: The columns are others, or do not hold text.
    """
    place = f"{source}, record {number}"
    if not isinstance(record, dict):
        raise CorpusError(f"{place}: expected an object, got {type(record).__name__}; mend it")
    fields = _alpaca_fields(record) if text_column is None else None
    if fields is not None:
        for column, value in fields.items():
            _check_text(value, column, place)
        return alpaca_text(*fields.values())
    column = text_column or "text"
    if column not in record:
        raise CorpusError(
            f"{place}: expected the column {column!r}"
            f"{'' if text_column else ' or instruction and output'}, got "
            f"{', '.join(sorted(map(str, record))) or 'no columns'}; name one with --text-column"
        )
    _check_text(record[column], column, place)
    text: str = record[column]
    return text


def _alpaca_fields(record: Record) -> dict[str, Any] | None:
    """Return instruction, input and output, or None where the record is not in Alpaca form."""
    nested = record.get("instances")
    rest = nested[0] if isinstance(nested, list) and nested else record
    if "instruction" not in record or not isinstance(rest, dict) or "output" not in rest:
        return None
    return {
        "instruction": record["instruction"],
        "input": rest.get("input") or "",
        "output": rest["output"],
    }


def _check_text(value: Any, column: str, place: str) -> None:
    if not isinstance(value, str):
        raise CorpusError(
            f"{place}: expected text in column {column!r}, got {type(value).__name__}; "
            "mend it or name another with --text-column"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell one half of a surrogate pair
        raise CorpusError(
            f"{place}: column {column!r} is no valid Unicode ({error.reason} at character "
            f"{error.start}); mend it"
        ) from error


def alpaca_text(instruction: str, given: str, output: str) -> str:
    """Return a record in Alpaca form as one text, its `input` part only where there is one."""
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n{output}"


def _read(source: str, *, split: str | None, config: str | None) -> Iterable[Record]:
    if source == EMBEDDED:
        if config is not None:
            raise CorpusError(
                f"--config belongs to hub datasets, got it for {source}; leave it out"
            )
        return _read_embedded(split)
    # These of os.path answer for any string; Path's raise for "~nobody" and for long names.
    path = Path(os.path.expanduser(source))
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        if os.path.isfile(path):
            raise CorpusError(f"expected a {', '.join(_READERS)} file, got {source}; convert it")
        return _read_dataset(source, split=split, config=config)
    if not os.path.isfile(path):
        raise CorpusError(f"no corpus file {source}; expected a path to an existing file")
    if split or config:
        raise CorpusError(f"--split and --config belong to hub datasets, got them for {source}")
    return _READERS[suffix](path)


def _read_embedded(split: str | None) -> list[Record]:
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
                raise CorpusError(f"{path}, line {number}: not JSON ({error}); mend it") from error


def _read_json(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{path}: not JSON ({error}); mend it") from error
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
        # Damage shows as Arrow's errors, OSError or UnicodeDecodeError, by where it struck.
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
        # Decoding errors would surface lines later, without a place: check them at the door.
        # With or without a byte order mark.
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


def _read_dataset(source: str, *, split: str | None, config: str | None) -> Iterable[Record]:
    import datasets

    try:
        records: Iterable[Record] = datasets.load_dataset(source, config, split=split or "train")
        return records
    except Exception as error:
        # As with hub models: many unrelated types, one meaning for the user.
        raise CorpusError(
            f"no corpus {source}: {first_line(error)} -- expected embedded, a .jsonl, .json,"
            " .parquet or .txt file, or a hub dataset (with --config and --split) where the hub"
            " can be reached"
        ) from error
