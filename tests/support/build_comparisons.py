"""Comparisons and sessions to report: of profiles by hand, and of tiny models that were broken."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from cascade.core.schema import from_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.gate.baselines import StoredProfile, seal
from cascade.gate.drift import compare
from cascade.gate.quick_gate import run_gate
from cascade.gate.records import (
    Attribution,
    BudgetOutcome,
    CellRow,
    ComparisonRecord,
    MeanRow,
    MissingBaseline,
    NamedComparison,
    Overrun,
    SessionRecord,
    session_record,
)
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import analyze
from support.build_profiles import EDGES, LAYERS, a_profile, profile_of, provenance, similarities_of
from support.decoding_faults import CHANGES, wrong_cache
from support.tiny_models import tiny_model

Record = ComparisonRecord


# --- Of profiles by hand ---------------------------------------------------------------------


def clean() -> Record:
    return compare(a_profile(), a_profile()).record()


def moved(by: float = 0.01) -> Record:
    """Return the sixth sequence moved from layer 2 on."""
    values = similarities_of(12)
    values[1:, 5] += by
    return compare(profile_of(values), a_profile()).record()


def hidden_drift() -> Record:
    """Return a sequence that fails by a hundredth of what the table would notice."""
    values = similarities_of(12)
    values[1:, 5] += 1e-5
    return compare(profile_of(values), a_profile()).record()


def lacking() -> Record:
    """Return a profile without layer 3."""
    values = similarities_of(12)
    shorter = profile_of(values[[0, 1, 3]], layers=[*LAYERS[:2], LAYERS[3]], edges=EDGES[:3])
    return compare(shorter, a_profile()).record()


def other_text(sequences: int = 12, shift: float = 0.0, *, baseline: int = 400) -> Record:
    new = profile_of(
        similarities_of(sequences, seed=2, shift=shift),
        fingerprints=1000 + np.arange(sequences),
    )
    return compare(new, a_profile(baseline)).record()


def mixed() -> Record:
    """Return other text of which some cells fail, and some are undecided."""
    return other_text(10, shift=-0.095)


def foreign() -> Record:
    return compare(a_profile(about=provenance(model__dtype="bfloat16")), a_profile()).record()


def elsewhere() -> Record:
    return compare(a_profile(about=provenance(machine__processor="B")), a_profile()).record()


# --- Of tiny models --------------------------------------------------------------------------

_BLOCKS = TokenBlocks(
    np.random.default_rng(0).integers(2, 97, (40, 16)).astype(np.int32), "random", "random", 40
)


def _stack() -> DecoderStack:
    about = {"name": "tiny", "weights_hash": "w", "revision": None, "quantization": None}
    return DecoderStack(
        tiny_model("llama", num_layers=6), provenance=about | {"tokenizer_hash": "t"}
    )


@functools.cache
def _baseline() -> StoredProfile:
    profile = analyze(_stack(), _BLOCKS)
    return StoredProfile(seal(profile.record(), profile.arrays()), profile.arrays(), profile.rows)


def _gated(*, full: bool = False, broken: bool = False) -> Record:
    stack = _stack()
    if broken:
        with torch.no_grad():
            stack.layers[2].mlp.down_proj.weight.mul_(1.05)
    return run_gate(stack, _BLOCKS, _baseline(), tokens=128, full=full).record()


def _refused(keys: torch.Tensor, values: torch.Tensor) -> Any:
    raise RuntimeError("no page is left")


@functools.cache
def of_a_model(kind: str) -> Record:
    """Return what a gate found.

    Args:
        kind: "clean", "broken", "broken, whole", "decoding" (its KV cache is broken), "decoding
            raises" (an error in a cached step) or "other words".
    """
    if "decoding" in kind:
        change = _refused if "raises" in kind else CHANGES["zeroed value"]
        with wrong_cache(3, change)(_stack()):
            return _gated()
    if kind == "other words":
        ids = np.random.default_rng(1).integers(2, 97, (8, 16)).astype(np.int32)
        return run_gate(_stack(), replace(_BLOCKS, ids=ids), _baseline(), full=True).record()
    return _gated(full="whole" in kind, broken="broken" in kind)


KINDS: dict[str, Callable[[], Record]] = {
    "clean": clean,
    "moved": moved,
    "hidden drift": hidden_drift,
    "lacking": lacking,
    "other text": other_text,
    "mixed": mixed,
    "foreign": foreign,
    "elsewhere": elsewhere,
    **{
        f"model: {kind}": functools.partial(of_a_model, kind)
        for kind in (
            "clean",
            "broken",
            "broken, whole",
            "decoding",
            "decoding raises",
            "other words",
        )
    },
}


# --- Sessions --------------------------------------------------------------------------------

BUDGET = BudgetOutcome(
    name="tiny/texts",
    path="baselines/tiny/texts.budgets.json",
    verdict="FAIL",
    points=3,
    overruns=[
        Overrun(
            point="layer 3, cosine >= 0.95, logit_lens",
            figure=figure,
            limit=limit,
            measured="0.5000",
            command="cascade evaluate --point 3:cosine:0.95",
        )
        for figure, limit in (("agreement", "at least 0.897"), ("KL", "at most 0.100"))
    ],
    reason=None,
)
KEPT = changed(BUDGET, verdict="PASS", overruns=[])
REFUSED = changed(KEPT, verdict="NOT COMPARABLE", reason="other heads")


def named(record: Record, name: str = "tiny/words") -> NamedComparison:
    return NamedComparison.of(record, name=name, path=f"baselines/{name}.saturation.json")


def a_session(*records: Record, **parts: Any) -> SessionRecord:
    return session_record([named(record) for record in records], **parts)


def a_full_session() -> SessionRecord:
    command = "cascade analyze --output a | tee b"
    return a_session(
        clean(),
        foreign(),
        moved(),
        other_text(),
        budgets=[KEPT, BUDGET, REFUSED],
        missing=[MissingBaseline(path="baselines/a.json", command=command)],
        regenerated=["baselines/b.json"],
        unused=["baselines/c.json"],
    )


# --- Any record ------------------------------------------------------------------------------


def with_cell(record: Record, number: int, **changes: Any) -> Record:
    """Return a comparison with one of its cells changed."""
    cells = list(record.cells)
    cells[number] = changed(cells[number], **changes)
    return changed(record, cells=cells)


NUMBER = st.none() | st.floats(-1, 1)


@st.composite
def cells(draw: st.DrawFn, *, intervals: bool) -> CellRow:
    """Draw a cell as `Cell.row` returns it, consistent or not; its layer is "1"."""
    expected, obtained, limit = draw(NUMBER), draw(NUMBER), draw(st.floats(0, 1))
    difference = None if None in (expected, obtained) else (obtained or 0) - (expected or 0)
    standardized = None if difference is None or limit < 1e-300 else difference / limit
    plain = {
        "layer": "1",
        "statistic": draw(st.sampled_from(["mean", "share_p50", "max", "count", "novel"])),
        "expected": expected,
        "obtained": obtained,
        "difference": difference,
        "limit": limit,
        "standardized": standardized if math.isfinite(standardized or 0) else None,
        "interval": draw(st.none() | st.just([-0.1, 0.2])) if intervals else None,
        "sequence": draw(st.none() | st.integers(0, 9)),
        "needed": draw(st.none() | st.integers(1, 10**6)),
        "verdict": draw(st.sampled_from(["PASS", "FAIL", "INCONCLUSIVE"])),
    }
    return from_plain(plain, CellRow)


def of_layers(layers: int, drawn: Sequence[CellRow], *, intervals: bool) -> Record:
    """Return a comparison with these cells in every layer."""
    labels = [str(layer) for layer in range(1, layers)] + [f"{layers}+norm"]
    means = {"expected": drawn[0].expected, "obtained": drawn[0].obtained}
    return changed(
        moved(),
        method="other sequences" if intervals else "same sequences",
        verdict="INCONCLUSIVE" if intervals else "FAIL",
        cells=[changed(cell, layer=label) for label in labels for cell in drawn],
        profile=[MeanRow(layer=label, **means) for label in labels],
        attribution=Attribution(cause="layer", layer=labels[len(labels) // 2], text="here"),
    )


@st.composite
def comparisons(draw: st.DrawFn, most: int = 200) -> Record:
    intervals = draw(st.booleans())
    some = draw(st.lists(cells(intervals=intervals), min_size=1, max_size=8))
    return of_layers(draw(st.integers(1, most)), some, intervals=intervals)
