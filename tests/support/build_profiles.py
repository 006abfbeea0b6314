"""Profiles by hand: similarities drawn per token, their records sealed, and files of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade.core.provenance import Provenance
from cascade.core.records import packed, record_hash, to_json
from cascade.core.schema import from_plain, to_plain
from cascade.gate.baselines import StoredProfile, seal
from cascade.saturation.records import (
    LayerRoles,
    ModelParts,
    NoiseFloor,
    ProfileRecord,
    SuggestedThresholds,
)
from cascade.saturation.row_files import ROWS_HASH, RowWriter, hashes_of
from cascade.stats.similarity_statistics import SimilarityStatistics

LAYERS = ["1", "2", "3", "3+norm"]
TOKENS = 16

Array = npt.NDArray[Any]
Record = dict[str, Any]

#: Bin edges around what `similarities_of` draws.
EDGES = np.array([[1600, 1300, 900]] * len(LAYERS))


def similarities_of(sequences: int, *, seed: int = 0, shift: float = 0.0) -> Array:
    """Return similarities `[L, S, TOKENS]`: every sequence and layer has a level of its own."""
    draw = np.random.default_rng(seed)
    levels = 0.75 + 0.05 * draw.normal(size=(len(LAYERS), sequences, 1))
    return (
        np.clip(levels + 0.05 * draw.normal(size=(len(LAYERS), sequences, TOKENS)), -1, 1) + shift
    )


def provenance(**changes: Any) -> Provenance:
    """Return a provenance; a change names its place: `model__dtype="bfloat16"`."""
    made: Record = {
        "tokenizer_hash": "t",
        "model": {
            "name": "tiny",
            "weights_hash": "w",
            "revision": None,
            "quantization": None,
            "dtype": "float32",
            "device": "cpu",
        },
        "corpus": {
            "source": "words.jsonl",
            "name": "words",
            "fingerprint": "c",
            "records": 12,
            "tokens": 12 * TOKENS,
            "sequences": 12,
            "seq_len": TOKENS,
        },
        "machine": {"processor": "A", "capability": "AVX2", "blas": "mkl", "threads": 2},
        "versions": {"cascade-exit": "0.1.0", "torch": "2.13.0"},
        "command": "cascade analyze",
    }
    for path, value in changes.items():
        place = made
        *parents, last = path.split("__")
        for name in parents:
            place = place[name]
        place[last] = value
    return from_plain(made, Provenance)


#: A noise floor as quiet as fp32 is.
QUIET = NoiseFloor(repeat=1e-7, exact=1e-7, variants={}, sequences=4)


def floor(repeat: float, exact: float) -> NoiseFloor:
    return NoiseFloor(repeat=repeat, exact=exact, variants={}, sequences=4)


def profile_of(
    values: Array,
    *,
    fingerprints: Array | None = None,
    edges: Array = EDGES,
    layers: list[str] = LAYERS,
    noise: NoiseFloor | None = QUIET,
    about: Provenance | None = None,
) -> StoredProfile:
    """Return a sealed profile of similarities `[L, S, T]`."""
    statistics = SimilarityStatistics(layers, edges)
    statistics.update(values, np.arange(values.shape[1]))
    prints = np.arange(values.shape[1]) if fingerprints is None else fingerprints
    prints = prints.astype(np.uint64)
    own = {"sequence_fingerprint": prints, ROWS_HASH: hashes_of(statistics.rows, prints)}
    arrays = statistics.token_arrays() | own
    plain = {
        "schema": 3,
        "kind": "saturation",
        "provenance": to_plain(about or provenance()),
        "noise": to_plain(noise),
        "layers": to_plain(statistics.table()),
        "structure": to_plain(
            LayerRoles(
                rule="none",
                source="none",
                cutoff=None,
                input_transform=[],
                dips=[],
                output_transform=[],
                stable_bands=[],
            )
        ),
        "thresholds": to_plain(SuggestedThresholds(exit_layer="2", by_hard_ratio=[])),
        "parts": to_plain(ModelParts(tensors={}, settings={})),
    }
    return StoredProfile(seal(from_plain(plain, ProfileRecord), arrays), arrays, statistics.rows)


def a_profile(sequences: int = 12, *, seed: int = 0, **options: Any) -> StoredProfile:
    return profile_of(similarities_of(sequences, seed=seed), **options)


def plain_record(profile: StoredProfile) -> Record:
    """Return a profile's record as the JSON of its file has it."""
    record: Record = to_plain(profile.content)
    return record


def write_rows(path: Path, profile: StoredProfile) -> None:
    """Write a profile's rows, as they lie next to its `.json`."""
    rows = profile.rows.all()
    prints = profile.state.get("sequence_fingerprint", np.zeros(0, np.uint64))
    with RowWriter(path, [row.layer for row in profile.content.layers]) as writer:
        writer.add(rows, np.resize(prints, len(rows)))


def old_arrays(profile: StoredProfile) -> dict[str, Array]:
    """Return the arrays of a profile as releases before schema 3 stored them, rows included."""
    state = {name: values for name, values in profile.state.items() if name != ROWS_HASH}
    return state | profile.rows.all().arrays()


def save_run(folder: Path, profile: StoredProfile, record: Record | None = None) -> Path:
    """Write a profile as a run's folder holds it; its record as given, where one is."""
    folder.mkdir(parents=True)
    text = to_json(plain_record(profile) if record is None else record) + "\n"
    (folder / "profile.json").write_text(text, encoding="utf-8")
    (folder / "profile.npz").write_bytes(packed(profile.state))
    write_rows(folder / "profile.parquet", profile)
    return folder


def edited(profile: StoredProfile, edit: Callable[[Record], Any], *, sealed: bool) -> Record:
    """Return a profile's record that somebody edited, sealed again or not."""
    record = copy.deepcopy(plain_record(profile))
    edit(record)
    return record | {"hash": record_hash(record)} if sealed else record


def write_profile(path: Path, profile: StoredProfile) -> None:
    """Write a profile's `.json` and, next to it, its `.npz` and its `.parquet`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(plain_record(profile)), encoding="utf-8")
    path.with_suffix(".npz").write_bytes(packed(profile.state))
    write_rows(path.with_suffix(".parquet"), profile)
