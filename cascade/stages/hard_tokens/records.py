"""The record of a dataset of hard tokens, and the request file of one that is being collected."""

from __future__ import annotations

from typing import ClassVar, Literal

from msgspec import field

from cascade.core.provenance import CorpusProvenance, MachineProvenance, ModelProvenance
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Index,
    Part,
    Share,
    StoredRecord,
    Text,
    UnsetType,
)

#: The splits of a corpus: what a stage is trained on, and what it is chosen and judged by.
Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")

#: The dtypes in which states can be stored.
StatesDtype = Literal["float16", "bfloat16"]


class HardTokensProvenance(Part, frozen=True, kw_only=True):
    """Where a dataset comes from: model, machine, versions, command, and the text of each split."""

    tokenizer_hash: str | None = None
    model: ModelProvenance
    machine: MachineProvenance | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    command: str | None = None
    corpora: dict[Split, CorpusProvenance]


class AskedFor(Part, frozen=True, kw_only=True):
    """The threshold and the hard ratio that the caller gave."""

    threshold: Finite | None = None
    hard_ratio: Finite | None = None


class StoredStates(Part, frozen=True, kw_only=True):
    """What states are stored, and in which form.

    Attributes:
        entry: Their entry of the hidden history: the model's number of layers.
        dtype: How a number is stored.
        seq_len: Tokens per sequence.
        hidden_size: Numbers per state.
    """

    entry: Index
    dtype: StatesDtype
    seq_len: Count
    hidden_size: Count


class SplitCounts(Part, frozen=True, kw_only=True):
    """What one split holds.

    Attributes:
        sequences: Sequences, all of one length.
        tokens: Tokens in them.
        hard: Tokens that are hard.
        hard_ratio: Their share of all tokens.
        response: Tokens of response text.
        hard_response: Tokens of response text that are hard.
    """

    sequences: Count
    tokens: Count
    hard: Count
    hard_ratio: Share
    response: Index
    hard_response: Index


class DatasetFile(Part, frozen=True, kw_only=True):
    """One file of a dataset.

    Attributes:
        name: Its path inside the dataset's folder.
        bytes: Its size.
        hash: A hash over its bytes, by which an edit is noticed.
    """

    name: Text
    bytes: Index
    hash: Text


class HardTokensRecord(StoredRecord, frozen=True, kw_only=True):
    """What a dataset of hard tokens is, and where it comes from.

    Attributes:
        provenance: Model, corpora, machine, versions and command.
        layer: The exit layer whose similarity decides.
        threshold: A token whose similarity is below it is hard.
        asked: The threshold and the hard ratio that the caller gave.
        states: What states are stored, and in which form.
        batch_size: Sequences per forward pass.
        parts: What each split holds.
        notes: What a user should know of how it came out, one line each.
        request: A hash over all that the states depend on; see `CollectionRequest`.
        files: Every file of the dataset except this record.
        hash: A hash over this record without this field.
    """

    KIND: ClassVar[str] = "hard-tokens"
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "collect-hard --output"

    schema: int = SCHEMA
    kind: Literal["hard-tokens"] = "hard-tokens"
    provenance: HardTokensProvenance
    layer: Count
    threshold: Finite
    asked: AskedFor
    states: StoredStates
    batch_size: Count
    parts: dict[Split, SplitCounts]
    notes: list[Text]
    request: Text
    files: list[DatasetFile]
    hash: Text


def missing_split(record: HardTokensRecord) -> str | None:
    """Return what a record does not say of one of its splits, in words; None where nothing lacks.

    Args:
        record: A record as it was read.
    """
    for split in SPLITS:
        if split not in record.parts:
            return f"expected parts.{split}, got nothing"
        if split not in record.provenance.corpora:
            return f"expected provenance.corpora.{split}, got nothing"
    return None


# --- A dataset that is being collected -------------------------------------------------------


class RequestedStates(Part, frozen=True, kw_only=True):
    """Which states are collected."""

    layer: Count
    dtype: StatesDtype


class RequestedBatches(Part, frozen=True, kw_only=True):
    """How sequences are grouped."""

    batch_size: Count
    per_shard: Count


class RequestedSplit(Part, frozen=True, kw_only=True):
    """Which text a split is, and a hash over its marks of records and response text."""

    corpus: str
    tokens: Count
    fingerprint: str
    marks: str


class CollectionRequest(Part, frozen=True, kw_only=True):
    """Everything that decides the stored states, to the last bit.

    It is stored while a dataset is collected: only an equal request resumes.
    """

    model: ModelProvenance
    states: RequestedStates
    batches: RequestedBatches
    train: RequestedSplit = field(name="train part")
    held_out: RequestedSplit = field(name="held-out part")
