"""Options of a collection, and its plan: the text, the states and the shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from msgspec import structs

from cascade.core.arguments import as_float
from cascade.core.errors import UsageError
from cascade.core.provenance import SPLITS, Split
from cascade.core.schema import to_plain
from cascade.exits.history import exit_entries
from cascade.exits.rules import find_rule
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.records import (
    CollectionRequest,
    HardTokensRecord,
    RequestedBatches,
    RequestedSplit,
    RequestedStates,
    RequestedThreshold,
    StatesDtype,
)
from cascade.stages.hard_tokens.shards import STATE_DTYPES, features_of, row_bytes
from cascade.stages.hard_tokens.splits import MarkedText, expected_bytes

if TYPE_CHECKING:
    import datasets

#: Bytes per shard. An interruption loses at most one shard: about 20 s of work for SmolLM2-135M on
#: two cores.
SHARD_BYTES = 16e6

#: Keeps the number of shards below the limit of open files per process.
MOST_SHARDS = 256


@dataclass(frozen=True)
class CollectingConfig:
    """Options for collecting hard tokens.

    Attributes:
        layer: Exit layer, 1..N, whose similarity decides which tokens are hard (default: second to
            last).
        threshold: A token with a similarity below this value is hard. It takes precedence over
            `hard_ratio`.
        hard_ratio: Share of hard tokens, in (0, 1). Without a threshold, the threshold is fitted to
            this ratio on the training split.
        dtype: Storage dtype of states: "float16" or "bfloat16".
        batch_size: Sequences per forward pass.
        command: Command that the user ran, for the record.

    Example:
        >>> CollectingConfig(layer=29, hard_ratio=0.5).check()
    """

    layer: int | None = None
    threshold: float | None = None
    hard_ratio: float | None = None
    dtype: StatesDtype = "float16"
    batch_size: int = 32
    command: str | None = None

    def check(self) -> None:
        """Check threshold, hard ratio and dtype. No model is needed.

        Raises:
            UsageError: Threshold and hard ratio are both missing, one of them is out of range, or
                the dtype does not exist.
        """
        if self.dtype not in STATE_DTYPES:
            raise UsageError(f"expected states in {' or '.join(STATE_DTYPES)}, got {self.dtype!r}")
        if self.threshold is None and self.hard_ratio is None:
            raise UsageError(
                "expected a threshold or a hard ratio, got neither; give --threshold or "
                "--hard-ratio"
            )
        if self.threshold is not None:
            find_rule("cosine").check(self.threshold, infinite=False)
        if self.hard_ratio is not None and not 0 < (as_float(self.hard_ratio) or 0) < 1:
            raise UsageError(f"expected a hard ratio between 0 and 1, got {self.hard_ratio}")

    def layer_of(self, stack: DecoderStack) -> int:
        """Return the exit layer for a model.

        Raises:
            UsageError: The model does not have this layer.
        """
        layer = max(1, stack.num_layers - 1) if self.layer is None else self.layer
        exit_entries(layer, stack.num_layers)
        return layer

    def requested(self) -> RequestedThreshold:
        """Return the threshold and the hard ratio as stored in a record."""
        return RequestedThreshold(threshold=self.threshold, hard_ratio=self.hard_ratio)


@dataclass(frozen=True)
class Shard:
    """Consecutive sequences of a split that are stored in one file.

    Attributes:
        split: The split.
        name: Path of the file inside the dataset.
        sequences: Indices of the sequences.
    """

    split: Split
    name: str
    sequences: range


@dataclass(frozen=True)
class CollectionPlan:
    """Everything that determines the stored states and their shards.

    Attributes:
        stack: The model.
        texts: Text of each split.
        config: Options of the collection.
        layer: Exit layer, 1..N.
        shard_bytes: Minimum size of a shard, in bytes.
        most_shards: Maximum number of shards.
    """

    stack: DecoderStack
    texts: Mapping[Split, MarkedText]
    config: CollectingConfig
    layer: int
    shard_bytes: float = field(default_factory=lambda: SHARD_BYTES)
    most_shards: int = field(default_factory=lambda: MOST_SHARDS)

    @cached_property
    def request(self) -> CollectionRequest:
        """Everything that affects the bits of a stored state."""
        train, held_out = (self._requested_split(self.texts[split]) for split in SPLITS)
        return CollectionRequest(
            model=structs.replace(self.stack.provenance, weights_hash=self.stack.weights_hash()),
            states=RequestedStates(layer=self.layer, dtype=self.config.dtype),
            batches=RequestedBatches(
                batch_size=self.config.batch_size, per_shard=self._batches_per_shard
            ),
            train=train,
            held_out=held_out,
        )

    @staticmethod
    def _requested_split(text: MarkedText) -> RequestedSplit:
        return RequestedSplit(
            corpus=text.blocks.name,
            tokens=text.blocks.tokens,
            fingerprint=text.blocks.fingerprint(),
            marks=text.marks_hash(),
        )

    @cached_property
    def request_hash(self) -> str:
        """SHA-256 over the request."""
        text = json.dumps(to_plain(self.request), sort_keys=True, allow_nan=False)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def is_met_by(self, record: HardTokensRecord) -> bool:
        """Return whether a dataset matches this plan, its threshold and its hard ratio."""
        return record.request == self.request_hash and record.requested == self.config.requested()

    @property
    def seq_len(self) -> int:
        """Tokens per sequence."""
        return int(self.texts["train"].blocks.ids.shape[1])

    @property
    def expected_bytes(self) -> int:
        """Estimated size of the dataset, in bytes."""
        blocks = {split: text.blocks for split, text in self.texts.items()}
        return expected_bytes(self.stack, blocks)

    @property
    def features(self) -> datasets.Features:
        """The columns of a shard."""
        return features_of(self.seq_len, self.stack.hidden_size, self.config.dtype)

    @property
    def _batches_per_shard(self) -> int:
        size = max(self.shard_bytes, self.expected_bytes / self.most_shards)
        row = row_bytes(self.seq_len, self.stack.hidden_size)
        return max(1, round(size / (row * self.config.batch_size)))

    @cached_property
    def shards(self) -> list[Shard]:
        """All shards, those of the training split first."""
        rows = self._batches_per_shard * self.config.batch_size
        found = []
        for split in SPLITS:
            total = len(self.texts[split].blocks.ids)
            count = -(-total // rows)
            found += [
                Shard(
                    split,
                    f"{split}/data-{number:05d}-of-{count:05d}.arrow",
                    range(number * rows, min(total, (number + 1) * rows)),
                )
                for number in range(count)
            ]
        return found

    def shards_of(self, split: Split) -> list[Shard]:
        """Return the shards of one split, in order."""
        return [shard for shard in self.shards if shard.split == split]
