"""Hard tokens: a base model's exit states over a corpus, made once, stored for stages to learn."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from msgspec.structs import replace
from torch import Tensor

from cascade.core.arguments import number
from cascade.core.arrays import Array
from cascade.core.errors import (
    CorpusError,
    ModelError,
    OutputError,
    RecordError,
    UsageError,
    os_reason,
)
from cascade.core.files import make_folder, remove_empty, write_text
from cascade.core.provenance import provenance_of
from cascade.core.records import read_record, record_hash, write_record
from cascade.core.schema import to_plain
from cascade.corpora.blocks import PARTS, TokenBlocks, check_blocks
from cascade.exits.history import HiddenHistory, exit_entries
from cascade.exits.rules import ExitPoint, find_rule
from cascade.models.stack import DecoderStack
from cascade.stages.dataset import KIND, RECORD, WORK, HardTokens, hash_of, load_hard_tokens
from cascade.stages.shards import (
    STATE_DTYPES,
    features_of,
    holds,
    mark_hard,
    read_similarity,
    row_bytes,
    stored,
    write_shard,
    write_split,
)
from cascade.stats.decision import least_fp32, reaches
from cascade.stats.thresholds import quantile_threshold

if TYPE_CHECKING:
    import datasets

Parts = Mapping[str, TokenBlocks]


Rows = Mapping[str, dict[str, Any]]


#: What `datasets` calls the file that lists a dataset's splits.
_SPLITS = "dataset_dict.json"


#: In the working folder: what is wanted, and a lock.
_REQUEST, _LOCK = "request.json", "lock"


#: What may lie beside the shards of a part: what `datasets` caches there is not worth keeping.
_OWN_FILE = re.compile(r"(data|cache)-.*\.arrow|tmp.*|state\.json|dataset_info\.json")


#: From here on, float16 rounds to infinity.
_FLOAT16_END = 65520


#: A given hard ratio and the one reached may differ by this much without a word.
_TOLERATED = 0.05


#: A shard is what an interruption loses: some 20 s of work (SmolLM2-135M, two cores). There are
#: never more shards than a process may have files open.
_SHARD_BYTES, _MOST_SHARDS = 16e6, 256


def expected_bytes(stack: DecoderStack, parts: Parts) -> int:
    """Return about how large a dataset will be, bytes; states take 2 bytes a number.

    Args:
        stack: The model.
        parts: The corpus, "train" and "held-out".
    """
    return int(
        sum(
            len(part.ids) * row_bytes(part.ids.shape[1], stack.hidden_size)
            for part in parts.values()
        )
    )


def collect_hard(
    stack: DecoderStack,
    parts: Parts,
    folder: Path | str,
    *,
    layer: int,
    threshold: float | None = None,
    hard_ratio: float | None = None,
    dtype: str = "float16",
    batch_size: int = 32,
    provenance: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    overwrite: bool = False,
    reuse: bool = False,
) -> HardTokens:
    """Run a model once over a corpus; store its exit states and which tokens are hard.

    A row of the dataset is one sequence, whole, with the positions that it had: nothing is left
    out and nothing put together. Memory does not grow with the corpus but for a similarity per
    token. Interrupted at any point, a second call with the same arguments goes on from the last
    finished shard, and what comes out is the same to the byte; only threshold and ratio, which
    are applied at the end, may be others.

    Args:
        stack: The model.
        parts: The corpus, "train" and "held-out", read with `marks=True`.
        folder: Where the dataset goes.
        layer: The exit layer, 1..N, whose similarity decides.
        threshold: Below it a token is hard. It decides where a ratio is given as well.
        hard_ratio: The share of hard tokens, in (0, 1): without a threshold, it is fitted to the
            training part.
        dtype: How states are stored, "float16" or "bfloat16".
        batch_size: Sequences per forward pass.
        provenance: What is known beside model, corpus and machine.
        progress: Called with the number of tokens done since the last call.
        overwrite: Replace an earlier dataset, or an unfinished one of other arguments.
        reuse: Return a whole dataset of the same arguments that is there, instead.

    Raises:
        UsageError: No such layer or dtype, a threshold or ratio that cannot be meant or neither of
            them, or a threshold that leaves no hard tokens or only hard ones.
        CorpusError: A part is missing, of another length, without marks, or too long.
        ModelError: A state is not finite, or beyond what float16 holds.
        OutputError: The folder holds something else, cannot be written, or the disk is too small.
    """
    check_wish(threshold, hard_ratio, dtype)
    exit_entries(layer, stack.num_layers)
    wish = _Wish(layer, threshold, hard_ratio, dtype, batch_size)
    _check_parts(stack, parts, batch_size)
    collection = _Collection(stack, parts, Path(folder), wish, provenance or {})
    return collection.run(progress or (lambda _: None), overwrite=overwrite, reuse=reuse)


@dataclass(frozen=True)
class _Wish:
    """What is to be collected; see `collect_hard`."""

    layer: int
    threshold: float | None
    hard_ratio: float | None
    dtype: str
    batch_size: int


def check_wish(threshold: float | None, hard_ratio: float | None, dtype: str) -> None:
    """Refuse what cannot be meant, before a model is loaded; see `collect_hard`.

    Args:
        threshold: Below it a token is hard, or None.
        hard_ratio: The share of hard tokens, or None.
        dtype: How states are stored.

    Raises:
        UsageError: Neither is given, or one is out of its range, or there is no such dtype.
    """
    if dtype not in STATE_DTYPES:
        raise UsageError(f"expected states in {' or '.join(STATE_DTYPES)}, got {dtype!r}")
    if threshold is None and hard_ratio is None:
        raise UsageError(
            "expected a threshold or a hard ratio, got neither; give --threshold or --hard-ratio"
        )
    if threshold is not None:
        find_rule("cosine").check(threshold, infinite=False)
    if hard_ratio is not None and not 0 < (number(hard_ratio) or 0) < 1:
        raise UsageError(f"expected a hard ratio between 0 and 1, got {hard_ratio}")


def _check_parts(stack: DecoderStack, parts: Parts, batch_size: int) -> None:
    if set(parts) != set(PARTS):
        raise CorpusError(
            f"expected the parts {' and '.join(PARTS)}, got {', '.join(sorted(parts)) or 'none'}"
        )
    for name in PARTS:
        check_blocks(stack, parts[name], batch_size)
        shape = parts[name].ids.shape
        marks = (parts[name].record_of, parts[name].response)
        if any(values is None or values.shape != shape for values in marks):
            raise CorpusError(
                f"the {name} part does not say which tokens are of which record and of the "
                "response; read it with load_blocks(..., marks=True)"
            )
    lengths = [parts[name].ids.shape[1] for name in PARTS]
    if lengths[0] != lengths[1]:
        raise CorpusError(
            f"expected sequences of one length, got {lengths[0]} tokens in the training part and "
            f"{lengths[1]} in the held-out one; read both with one seq_len"
        )


@dataclass(frozen=True)
class _Shard:
    """Some sequences of a part, from first to last, that are stored in one file."""

    part: str
    name: str
    sequences: range


@dataclass
class _Collection:
    """One dataset in the making.

    Its files are made in a folder of their own inside the dataset's, and moved up once all of them
    are there, the record last. What is found in that folder is gone on from.
    """

    stack: DecoderStack
    parts: Parts
    folder: Path
    wish: _Wish
    provenance: dict[str, Any]

    @property
    def work(self) -> Path:
        return self.folder / WORK

    @cached_property
    def request(self) -> dict[str, Any]:
        """What every state depends on, down to its last bit."""
        return {
            "model": to_plain(
                replace(self.stack.provenance, weights_hash=self.stack.weights_hash())
            ),
            "states": {"layer": self.wish.layer, "dtype": self.wish.dtype},
            "batches": {"batch_size": self.wish.batch_size, "per_shard": self._batches_per_shard},
        } | {
            f"{name} part": {
                "corpus": blocks.name,
                "tokens": blocks.tokens,
                "fingerprint": blocks.fingerprint(),
                "marks": _marks_hash(blocks),
            }
            for name, blocks in self.parts.items()
        }

    @property
    def _length(self) -> int:
        return int(self.parts["train"].ids.shape[1])

    @property
    def _features(self) -> datasets.Features:
        return features_of(self._length, self.stack.hidden_size, self.wish.dtype)

    @property
    def _batches_per_shard(self) -> int:
        size = max(_SHARD_BYTES, expected_bytes(self.stack, self.parts) / _MOST_SHARDS)
        row = row_bytes(self._length, self.stack.hidden_size)
        return max(1, round(size / (row * self.wish.batch_size)))

    @cached_property
    def shards(self) -> list[_Shard]:
        rows = self._batches_per_shard * self.wish.batch_size
        found = []
        for part in PARTS:
            total = len(self.parts[part].ids)
            count = -(-total // rows)
            found += [
                _Shard(
                    part,
                    f"{part}/data-{number:05d}-of-{count:05d}.arrow",
                    range(number * rows, min(total, (number + 1) * rows)),
                )
                for number in range(count)
            ]
        return found

    def run(self, progress: Callable[[int], None], *, overwrite: bool, reuse: bool) -> HardTokens:
        check_output(self.folder, overwrite=overwrite or reuse)
        interrupted = os.path.isdir(self.work)
        with self._working():
            finished = self._finished() if interrupted or reuse else None
            if finished is not None:
                shutil.rmtree(self.work)
                return finished
            _check_free(self.folder, overwrite=overwrite)
            self._open(overwrite=overwrite)
            if not (self.work / RECORD).exists():
                self._check_disk()
                self._collect(progress)
                self._finish()
            _publish(self.work, self.folder)
        return HardTokens(self.folder, read_record(self.folder / RECORD, kind=KIND))

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Hold the working folder alone; on failure keep it only where it can be gone on from."""
        made: list[Path] = []
        try:
            made = make_folder(self.work)
            with FileLock(self.work / _LOCK, timeout=0):
                try:
                    yield
                except BaseException as error:
                    if isinstance(error, ModelError) or not any(self.work.rglob("data-*.arrow")):
                        shutil.rmtree(self.work, ignore_errors=True)
                        remove_empty(made)
                    raise
        except Timeout:
            raise OutputError(
                f"another process is collecting into {self.folder}; wait for it or choose another "
                "--output"
            ) from None
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.folder}: {os_reason(error)}; free some space or choose "
                "another --output"
            ) from error

    def _finished(self) -> HardTokens | None:
        """Return the dataset in its place where it is whole and what is wanted; else None."""
        try:
            found = load_hard_tokens(self.folder)
        except RecordError:
            return None
        return found if self._asks_for(found.record) else None

    def _asks_for(self, record: dict[str, Any]) -> bool:
        asked = {"threshold": self.wish.threshold, "hard_ratio": self.wish.hard_ratio}
        return bool(record["request"] == self._request_hash and record["asked"] == asked)

    @property
    def _request_hash(self) -> str:
        text = json.dumps(self.request, sort_keys=True)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def _open(self, *, overwrite: bool) -> None:
        """Go on from what is in the working folder, or drop it."""
        path = self.work / _REQUEST
        for stray in self.work.rglob(".*"):  # half a file that a killed process left
            stray.unlink()
        difference = None
        if path.exists():
            difference = _difference(json.loads(path.read_text("utf-8")), self.request)
            if difference is None and (self.work / RECORD).exists():
                record = read_record(self.work / RECORD, kind=KIND)
                if not self._asks_for(record):
                    difference = "threshold and hard ratio"
        if difference is not None and not overwrite:
            raise OutputError(
                f"{self.folder} holds an unfinished dataset of other arguments ({difference}); go "
                "on with those, choose another --output, or drop it with --overwrite"
            )
        if difference is not None or not path.exists():
            for entry in self.work.iterdir():
                if entry.name != _LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            write_text(path, json.dumps(self.request, indent=1) + "\n")

    def _check_disk(self) -> None:
        here = sum(path.stat().st_size for path in self.work.rglob("data-*.arrow"))
        expected = expected_bytes(self.stack, self.parts)
        # A shard is written a second time when its hard mask is set.
        needed = expected - here + expected // len(self.shards)
        free = shutil.disk_usage(self.work).free
        if needed > free:
            raise OutputError(
                f"{self.folder} needs about {needed / 1e9:.3g} GB, the disk has "
                f"{free / 1e9:.3g} GB free; free some, take a smaller --max-tokens or choose "
                "another --output"
            )

    def _collect(self, progress: Callable[[int], None]) -> None:
        for shard in self.shards:
            path = self.work / shard.name
            if holds(path, shard.sequences):
                progress(len(shard.sequences) * self._length)
            else:
                write_shard(path, self._features, self._batches(shard, progress))

    def _batches(
        self, shard: _Shard, progress: Callable[[int], None]
    ) -> Iterator[dict[str, Array]]:
        blocks, size = self.parts[shard.part], self.wish.batch_size
        assert blocks.record_of is not None  # checked at the door
        assert blocks.response is not None
        for start in range(shard.sequences.start, shard.sequences.stop, size):
            rows = slice(start, min(start + size, shard.sequences.stop))
            ids = blocks.ids[rows]
            states, similarity = _visited(
                self.stack, torch.from_numpy(ids).long().to(self.stack.device), self.wish.layer
            )
            self._check_states(states)
            yield {
                "states": stored(states, self.wish.dtype),
                "input_ids": ids,
                "labels": _next_tokens(ids),
                "positions": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape),
                "similarity": similarity.cpu().numpy(),
                "response": blocks.response[rows],
                "records": blocks.record_of[rows],
                "sequence": np.arange(rows.start, rows.stop, dtype=np.int32),
            }
            progress(ids.size)

    def _check_states(self, states: Tensor) -> None:
        largest = states.abs().amax().item()
        layer = self.stack.num_layers
        if not np.isfinite(largest):
            raise _not_finite(layer)
        if self.wish.dtype == "float16" and largest >= _FLOAT16_END:
            raise ModelError(
                f"the states of layer {layer} reach {largest:.4g}, float16 holds numbers up to "
                "65504; store them with --states-dtype bfloat16"
            )

    def _finish(self) -> None:
        """Choose the threshold, set the hard mask, and complete the dataset, its record last."""
        similarity = {
            part: np.concatenate(
                [
                    read_similarity(self.work / shard.name)
                    for shard in self.shards
                    if shard.part == part
                ]
            )
            for part in PARTS
        }
        threshold, ratio = self.wish.threshold, self.wish.hard_ratio
        if threshold is None:
            assert ratio is not None  # checked at the door
            threshold = quantile_threshold(similarity["train"], ratio)
        least = least_fp32(threshold)
        rows: Rows = {
            part: self._counted(part, ~reaches(values, threshold))
            for part, values in similarity.items()
        }
        self._check_mixed(rows, threshold)
        for shard in self.shards:
            mark_hard(self.work / shard.name, least)
        record = self._record(float(threshold), rows)
        for part in PARTS:
            names = [Path(shard.name).name for shard in self.shards if shard.part == part]
            # What `datasets` knows its cached results by.
            made_of = f"{self._request_hash} {record['threshold']!r} {part}"
            write_split(self.work / part, names, self._features, made_of=made_of)
        write_text(self.work / _SPLITS, json.dumps({"splits": list(PARTS)}) + "\n")
        record["files"] = [
            {
                "name": path.relative_to(self.work).as_posix(),
                "bytes": path.stat().st_size,
                "hash": hash_of(path),
            }
            for path in sorted(self.work.rglob("*"))
            if path.is_file() and path.name not in (_LOCK, _REQUEST)
        ]
        write_record(self.work / RECORD, record | {"hash": record_hash(record)})

    def _counted(self, part: str, hard: Array) -> dict[str, Any]:
        response = self.parts[part].response
        assert response is not None  # checked at the door
        return {
            "sequences": len(hard),
            "tokens": int(hard.size),
            "hard": int(hard.sum()),
            "hard_ratio": float(hard.mean()),
            "response": int(response.sum()),
            "hard_response": int((hard & response).sum()),
        }

    def _check_mixed(self, rows: Rows, threshold: float) -> None:
        for part, row in rows.items():
            if row["hard"] in (0, row["tokens"]):
                what = "no token" if row["hard"] == 0 else "every token"
                raise UsageError(
                    f"{what} of the {part} part is hard: its similarity at layer {self.wish.layer} "
                    f"is {'never' if row['hard'] == 0 else 'always'} below {threshold:.6g}; give "
                    "another --threshold or --hard-ratio (the states collected so far are kept and "
                    "need no second pass)"
                )

    def _record(self, threshold: float, rows: Rows) -> dict[str, Any]:
        provenance = to_plain(provenance_of(self.stack, self.parts["train"], None))
        del provenance["corpus"]
        provenance["model"] = self.request["model"]
        provenance["corpora"] = {part: to_plain(self.parts[part].provenance()) for part in PARTS}
        return {
            "schema": 1,
            "kind": KIND,
            "provenance": provenance | self.provenance,
            "layer": self.wish.layer,
            "threshold": threshold,
            "asked": {"threshold": self.wish.threshold, "hard_ratio": self.wish.hard_ratio},
            "states": {
                "entry": self.stack.num_layers,
                "dtype": self.wish.dtype,
                "seq_len": self._length,
                "hidden_size": self.stack.hidden_size,
            },
            "batch_size": self.wish.batch_size,
            "parts": rows,
            "notes": self._notes(rows, threshold),
            "request": self._request_hash,
        }

    def _notes(self, rows: Rows, threshold: float) -> list[str]:
        notes = []
        wanted, reached = self.wish.hard_ratio, rows["train"]["hard_ratio"]
        if wanted is not None and abs(wanted - reached) > _TOLERATED:
            notes.append(
                f"the threshold {threshold:.6g} decides: it makes {reached:.3f} of the training "
                f"tokens hard, not the {wanted:.3f} that were asked for"
            )
        train, held_out = (set(self.parts[part].sequence_fingerprints().tolist()) for part in PARTS)
        if train & held_out:
            notes.append(
                f"{len(train & held_out)} of the held-out sequences are in the training part too: "
                "what is measured on them flatters"
            )
        return notes


@torch.no_grad()
def _visited(stack: DecoderStack, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Return what leaves the last layer, `[B, T, D]`, and the similarity at a layer, `[B, T]`."""
    last = stack.num_layers
    history = HiddenHistory(last)
    at = ExitPoint(layer, history, lambda: ids, token_ids=ids, positions=ids)
    kept = {*exit_entries(layer, last), last}
    found: list[Tensor] = []

    def look(entry: int, hidden: Tensor) -> None:
        if entry in kept:
            history.entries[entry] = hidden
        if entry == layer:
            found.append(find_rule("cosine").confidence(at))
            history.entries.pop(layer - 1)

    stack.visit(ids, look)
    (similarity,) = found
    if not torch.isfinite(similarity).all():
        raise _not_finite(layer)
    return history.entries[last], similarity


def _not_finite(layer: int) -> ModelError:
    return ModelError(
        f"layer {layer} gives NaN or infinite hidden states; use a wider --dtype, or get the "
        "checkpoint again"
    )


def _next_tokens(ids: Array) -> Array:
    """Return each token's next one in its own sequence, -100 behind the last."""
    labels = np.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return labels


def _marks_hash(blocks: TokenBlocks) -> str:
    digest = hashlib.sha256()
    assert blocks.record_of is not None  # checked at the door
    assert blocks.response is not None
    for marks in (blocks.record_of.astype("<i4"), blocks.response):
        digest.update(np.ascontiguousarray(marks).tobytes())
    return f"sha256:{digest.hexdigest()}"


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return the first thing in which two requests differ, in words; None where they are one."""
    for what, wanted in now.items():
        found = before.get(what) or {}
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                return f"{what}, {name}: {found.get(name)}, now {wanted.get(name)}"
    return None


def _check_free(folder: Path, *, overwrite: bool) -> None:
    if (folder / RECORD).exists() and not overwrite:
        raise OutputError(
            f"{folder} holds a dataset of hard tokens already: choose another --output, or replace "
            "it with --overwrite"
        )


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that a dataset cannot go to; nothing is written.

    Args:
        folder: Where it is to go.
        overwrite: An earlier dataset there may go.

    Raises:
        OutputError: It is a file, holds a dataset, or something else in a dataset's place.
    """
    # os.path answers for any string, where Path raises for an overlong name.
    if os.path.isfile(folder):
        raise OutputError(f"{folder} is a file, expected a folder; choose another --output")
    if not os.path.isdir(folder):
        return
    ours = (folder / RECORD).exists() or (folder / WORK).is_dir()
    names = [folder / name for name in (*PARTS, _SPLITS)]
    strangers = [path for path in names if path.exists()]
    if ours:
        strangers = [
            path
            for name in PARTS
            for path in sorted((folder / name).glob("*"))
            if not _OWN_FILE.fullmatch(path.name)
        ]
    if strangers:
        raise OutputError(
            f"{strangers[0]} is in the way, and of no dataset of hard tokens; choose another "
            "--output"
        )
    if not (folder / WORK).is_dir():
        _check_free(folder, overwrite=overwrite)


def _publish(work: Path, folder: Path) -> None:
    """Move a complete dataset to its place, its record last; an earlier one goes."""
    (folder / RECORD).unlink(missing_ok=True)
    for name in (*PARTS, _SPLITS, RECORD):
        if (work / name).exists():  # else it was moved before an interruption
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            (work / name).replace(folder / name)
    shutil.rmtree(work)
