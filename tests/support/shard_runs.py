"""Profiles in shards: plans of tiny models, and what of a profile has to be the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cascade import TokenBlocks, load
from cascade.models.stack import DecoderStack
from cascade.shards.measuring import measure_shard
from cascade.shards.merging import merge
from cascade.shards.plan import Plan
from cascade.shards.planning import plan
from support.tiny_models import VOCABULARY, save_checkpoint

BATCH, SEQ_LEN = 2, 16

#: Enough for 64 shards, and a last batch that is not full.
SEQUENCES = 131


def random_text(sequences: int = SEQUENCES, *, special: int | None = None) -> TokenBlocks:
    """Return random sequences.

    Args:
        sequences: Their number.
        special: A token that only the last third of them has.
    """
    ids = np.random.default_rng(0).integers(2, VOCABULARY - 1, (sequences, SEQ_LEN), dtype=np.int32)
    if special is not None:
        ids[2 * sequences // 3 :, 5] = special
    return TokenBlocks(ids, "random", "random", sequences)


def saved_model(folder: Path, family: str = "llama") -> DecoderStack:
    """Save a tiny model, and load it."""
    return load(save_checkpoint(folder / family, family))


def planned(stack: DecoderStack, folder: Path, shards: int) -> Plan:
    """Plan the random sequences."""
    return plan(stack, random_text(), folder, shards=shards, batch_size=BATCH, long_context=0)


def measured_here(made: Plan, stack: DecoderStack, order: Iterable[int] | None = None) -> Plan:
    """Measure the shards of a plan in this process."""
    for number in range(len(made.record.shards)) if order is None else order:
        measure_shard(made, number, model=stack)
    return made


def merged_files(made: Plan, folder: Path) -> tuple[bytes, dict[str, bytes]]:
    """Merge a plan, and return what does not depend on who measured: record and other files."""
    merge(made, folder, command="the same")
    return comparable(folder)


def comparable(folder: Path) -> tuple[bytes, dict[str, bytes]]:
    """Return the record of a run without the engine, and the bytes of its other files."""
    record = json.loads((folder / "profile.json").read_bytes())
    engine = record["provenance"].pop("engine")
    del record["hash"]
    assert engine["shards"] >= 1
    rest = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name in ("profile.npz", "profile.parquet")
    }
    assert len(rest) == 2
    return json.dumps(record).encode(), rest
