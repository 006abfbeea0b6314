"""Plans and shards by hand: from similarities that no model computed, split at any batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cascade.core.provenance import Provenance, library_versions, machine_of
from cascade.core.records import arrays_hash, packed, to_file
from cascade.core.schema import from_plain, to_plain
from cascade.corpora.blocks import TokenBlocks, ids_hash
from cascade.saturation.profile import SaturationProfile, statistics_of
from cascade.shards.plan import Plan
from cascade.shards.records import PlannedShard, PlanRecord, ShardRecord
from cascade.shards.shard_files import write_shard
from support.build_profiles import EDGES, LAYERS, Array, provenance

BATCH = 2


def ids_of(values: Array) -> Array:
    """Return token ids of as many sequences and tokens as the similarities `[L, S, T]` have."""
    _, sequences, length = values.shape
    return np.arange(sequences * length, dtype=np.int32).reshape(sequences, length)


def planned(folder: Path, values: Array, borders: list[int], batch_size: int = BATCH) -> Plan:
    """Write a plan of similarities `[L, S, T]` whose shards end at some sequences."""
    ids = ids_of(values)
    sequences, length = ids.shape
    about = to_plain(provenance(corpus__sequences=sequences, corpus__tokens=ids.size))
    about["corpus"]["seq_len"] = length
    about["versions"] = library_versions()
    state = {"edges": EDGES}
    ends = [*borders, sequences]
    record = PlanRecord(
        provenance=from_plain(about, Provenance),
        batch_size=batch_size,
        weights_hash="w",
        layers=LAYERS,
        shards=[
            PlannedShard(number=k, first=first, end=end, tokens_hash=ids_hash(ids[first:end]))
            for k, (first, end) in enumerate(zip([0, *borders], ends, strict=True))
        ],
        noise=None,
        arrays_hash=arrays_hash(state),
    )
    folder.mkdir(parents=True)
    (folder / "tokens.bin").write_bytes(ids.astype("<i4").tobytes())
    (folder / "plan.npz").write_bytes(packed(state))
    (folder / "plan.json").write_text(to_file(record), encoding="utf-8")
    return Plan.read(folder)


def write(plan: Plan, values: Array, number: int, **details: Any) -> bool:
    """Write a shard of similarities `[L, S, T]`, with other details in its record."""
    import torch
    from msgspec.structs import replace

    shard = plan.shard(number)
    some = values[:, shard.first : shard.end]
    numbers = np.arange(shard.first, shard.end)
    statistics = statistics_of(LAYERS, EDGES, [(some, numbers)])
    record = ShardRecord(
        plan_hash=plan.hash,
        number=number,
        first=shard.first,
        end=shard.end,
        device="cpu",
        attention="sdpa",
        machine=machine_of(torch.device("cpu")),
        versions=library_versions(),
        seconds=0.5,
        arrays_hash="",
    )
    ids = ids_of(values)[shard.first : shard.end]
    prints = TokenBlocks(ids, "", "", records=0).sequence_fingerprints()
    return write_shard(plan, replace(record, **details), statistics, statistics.rows.all(), prints)


def in_one_pass(values: Array, batch_size: int = BATCH) -> SaturationProfile:
    """Return the profile of one pass over similarities `[L, S, T]`."""
    count = values.shape[1]
    batches = [
        (values[:, start : start + batch_size], np.arange(start, min(start + batch_size, count)))
        for start in range(0, count, batch_size)
    ]
    prints = TokenBlocks(ids_of(values), "", "", records=0).sequence_fingerprints()
    return SaturationProfile(statistics_of(LAYERS, EDGES, batches), prints, provenance())


def compared(run: Path) -> dict[str, Any]:
    """Return what two runs of the same measurement have in common, to the byte."""
    record = json.loads((run / "profile.json").read_text(encoding="utf-8"))
    # The engine is the only difference, so it changes the hash of the record as well.
    del record["provenance"]["engine"], record["hash"]
    files = {name: (run / name).read_bytes() for name in ("profile.npz", "profile.parquet")}
    return {"profile.json": json.dumps(record)} | files
