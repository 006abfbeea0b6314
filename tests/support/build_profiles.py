"""Profiles by hand: similarities drawn per token, their records sealed, and files of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade.core.records import packed, to_json
from cascade.gate.baselines import StoredProfile, seal
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


def provenance(**changes: Any) -> Record:
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
        "corpus": {"name": "words", "fingerprint": "c", "seq_len": TOKENS},
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
    return made


def profile_of(
    values: Array,
    *,
    fingerprints: Array | None = None,
    edges: Array = EDGES,
    layers: list[str] = LAYERS,
    noise: Record | None = None,
    about: Record | None = None,
) -> StoredProfile:
    """Return a sealed profile of similarities `[L, S, T]`."""
    statistics = SimilarityStatistics(layers, edges)
    statistics.update(values, np.arange(values.shape[1]))
    prints = np.arange(values.shape[1]) if fingerprints is None else fingerprints
    arrays = statistics.arrays() | {"sequence_fingerprint": prints.astype(np.uint64)}
    record = {
        "schema": 2,
        "kind": "saturation",
        "provenance": about or provenance(),
        "noise": noise or {"repeat": 1e-7, "exact": 1e-7, "ways": {}, "sequences": 4},
        "layers": statistics.table(),
        "structure": {},
        "thresholds": {},
    }
    return StoredProfile(seal(record, arrays), arrays)


def a_profile(sequences: int = 12, *, seed: int = 0, **options: Any) -> StoredProfile:
    return profile_of(similarities_of(sequences, seed=seed), **options)


def save_run(folder: Path, profile: StoredProfile) -> Path:
    """Write a profile as a run's folder holds it."""
    folder.mkdir(parents=True)
    (folder / "profile.json").write_text(to_json(profile.content) + "\n", encoding="utf-8")
    (folder / "profile.npz").write_bytes(packed(profile.state))
    return folder


def edited(profile: StoredProfile, edit: Callable[[Record], Any], *, sealed: bool) -> StoredProfile:
    """Return a profile whose record somebody edited, sealed again or not."""
    record = copy.deepcopy(profile.content)
    edit(record)
    return StoredProfile(seal(record, profile.state) if sealed else record, profile.state)
