"""Records of a dataset of hard tokens, and the request of an unfinished one."""

from __future__ import annotations

from typing import ClassVar, Literal

from msgspec import field

from cascade.core.provenance import (
    SPLITS,
    CorpusProvenance,
    MachineProvenance,
    ModelProvenance,
    Split,
)
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Index,
    Part,
    PathBelow,
    Share,
    StoredRecord,
    Text,
    UnsetType,
    known,
)

#: The dtypes in which states can be stored.
StatesDtype = Literal["float16", "bfloat16"]


class HardTokensProvenance(Part, frozen=True, kw_only=True):
    """Origin of a dataset: model, machine, versions, command, and the text of each split."""

    tokenizer_hash: str | None = None
    model: ModelProvenance
    machine: MachineProvenance | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    command: str | None = None
    corpora: dict[Split, CorpusProvenance]


class RequestedThreshold(Part, frozen=True, kw_only=True):
    """The threshold and the hard ratio that the caller requested."""

    threshold: Finite | None = None
    hard_ratio: Finite | None = None


class StoredStates(Part, frozen=True, kw_only=True):
    """The stored states and their format.

    Attributes:
        entry: Entry of the hidden history that is stored: the model's number of layers.
        dtype: Storage dtype.
        seq_len: Tokens per sequence.
        hidden_size: Width of a state.
    """

    entry: Index
    dtype: StatesDtype
    seq_len: Count
    hidden_size: Count


class SplitCounts(Part, frozen=True, kw_only=True):
    """Counts of one split.

    Attributes:
        sequences: Number of sequences, all of the same length.
        tokens: Number of tokens.
        hard: Number of hard tokens.
        hard_ratio: Share of hard tokens.
        response: Number of response tokens.
        hard_response: Number of hard response tokens.
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
        name: Path inside the dataset's folder.
        bytes: Size of the file.
        hash: Hash over the file's bytes, which detects edits.
    """

    name: PathBelow
    bytes: Index
    hash: Text


class HardTokensRecord(StoredRecord, frozen=True, kw_only=True):
    """A dataset of hard tokens: its contents, its files and its provenance.

    Attributes:
        provenance: Model, corpora, machine, versions and command.
        layer: Exit layer whose similarity decides which tokens are hard.
        threshold: A token with a similarity below this value is hard.
        requested: Threshold and hard ratio that the caller requested.
        states: The stored states and their format.
        batch_size: Sequences per forward pass.
        splits: Counts of each split.
        notes: Warnings about the collected dataset, one line each.
        request: Hash over everything that affects the states; see `CollectionRequest`.
        files: All files of the dataset except this record.
        hash: Hash over this record without this field.
    """

    KIND: ClassVar[str] = "hard-tokens"
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "collect-hard --output"

    schema: int = SCHEMA
    kind: Literal["hard-tokens"] = "hard-tokens"
    provenance: HardTokensProvenance
    layer: Count
    threshold: Finite
    requested: RequestedThreshold = field(name="asked")
    states: StoredStates
    batch_size: Count
    splits: dict[Split, SplitCounts] = field(name="parts")
    notes: list[Text]
    request: Text
    files: list[DatasetFile]
    hash: Text

    def inconsistency(self) -> str | None:
        """Describe the first entry that contradicts another one; None if none does."""
        for split in SPLITS:
            counts, text = self.splits.get(split), self.provenance.corpora.get(split)
            if counts is None:
                return f"expected parts.{split}, got nothing"
            if text is None:
                return f"expected provenance.corpora.{split}, got nothing"
            found = _wrong_count(counts, text, self.states.seq_len)
            if found is not None:
                return f"parts.{split}: {found}"
        names = [file.name for file in self.files]
        if len(set(names)) < len(names):
            return "expected every file once"
        for split in SPLITS:
            if not any(name.startswith(f"{split}/data-") for name in names):
                return f"expected files of {split}, got none"
        layers = known(self.provenance.model.num_layers)
        if layers is not None and self.layer > layers:
            return f"expected a layer in 1..{layers}, got {self.layer}"
        return None


def _wrong_count(counts: SplitCounts, text: CorpusProvenance, seq_len: int) -> str | None:
    for name, expected, got in (
        ("sequences", text.sequences, counts.sequences),
        ("tokens", text.tokens, counts.tokens),
        ("tokens", counts.sequences * seq_len, counts.tokens),
    ):
        if expected != got:
            return f"expected {expected:,} {name}, got {got:,}"
    for name, most, got in (
        ("hard tokens", counts.tokens, counts.hard),
        ("response tokens", counts.tokens, counts.response),
        ("hard response tokens", min(counts.hard, counts.response), counts.hard_response),
    ):
        if got > most:
            return f"expected at most {most:,} {name}, got {got:,}"
    if abs(counts.hard / counts.tokens - counts.hard_ratio) > 1e-6:
        return f"expected a hard ratio of {counts.hard / counts.tokens}, got {counts.hard_ratio}"
    return None


# --- A dataset that is being collected -------------------------------------------------------


class RequestedStates(Part, frozen=True, kw_only=True):
    """Layer and dtype of the collected states."""

    layer: Count
    dtype: StatesDtype


class RequestedBatches(Part, frozen=True, kw_only=True):
    """Grouping of sequences into batches and shards."""

    batch_size: Count
    per_shard: Count


class RequestedSplit(Part, frozen=True, kw_only=True):
    """Text of a split, and a hash over its marks of records and response text."""

    corpus: str
    tokens: Count
    fingerprint: str
    marks: str


class CollectionRequest(Part, frozen=True, kw_only=True):
    """Everything that affects the bits of the stored states.

    The request is stored during collection. Only an equal request can resume it.
    """

    model: ModelProvenance
    states: RequestedStates
    batches: RequestedBatches
    train: RequestedSplit = field(name="train part")
    held_out: RequestedSplit = field(name="held-out part")
