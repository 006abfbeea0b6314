"""Shared by all reports: number formats, and texts about models, layers and rules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy.typing as npt

from cascade.core.provenance import ModelProvenance, Provenance
from cascade.core.schema import StoredRecord, UnsetType, known, to_plain
from cascade.report.common.words import counted

Arrays = Mapping[str, npt.NDArray[Any]]


ROLES = {
    "input_transform": "input transform",
    "dips": "dip",
    "output_transform": "output transform",
}
NORM_SUFFIX = "+norm"
#: Rule -> the name of its confidence, and what that confidence is.
RULE_WORDS = {
    "cosine": ("similarity", "the similarity of the layer's input and output"),
    "mean_cosine": ("mean similarity", "the mean similarity of the layer and the preceding one"),
    "top2_gap": ("gap", "the gap between the exit head's two largest probabilities"),
    "max_probability": ("probability", "the exit head's largest probability"),
    "entropy": ("certainty", "one minus the exit head's entropy relative to its maximum"),
    "patience": ("streak", "the number of preceding exit layers that predict the same token"),
}


def check_record(record: StoredRecord) -> None:
    """Raise if a record that was built in memory is invalid, before anything is shown.

    Raises:
        ValueError: The record has another kind or schema than its type, or contains NaN.
    """
    plain = to_plain(record)
    for key, expected in (("kind", record.KIND), ("schema", record.SCHEMA)):
        if plain[key] != expected:
            raise ValueError(f"expected {key} {expected!r}, got {plain[key]!r}")
    place = next(_nan_places(plain), None)
    if place is not None:
        raise ValueError(f"expected numbers, got nan at {place}; create the record again")


def _nan_places(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, float) and math.isnan(value):
        yield place
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nan_places(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _nan_places(item, f"{place}[{index}]")


class OfLayer(Protocol):
    """A row of a table of layers."""

    @property
    def layer(self) -> str:
        """The layer's number, or the last one's with `NORM_SUFFIX`."""


class HasProvenance(Protocol):
    """A record with a provenance."""

    @property
    def provenance(self) -> Provenance:
        """Model, corpus, machine, versions and command."""


def is_normed(row: OfLayer) -> bool:
    """Return whether a row is the one of the state after the final norm."""
    return row.layer.endswith(NORM_SUFFIX)


def show(value: float) -> str:
    """Format a similarity."""
    # "z": a mean of -0.00001 reads 0.0000, not -0.0000.
    return f"{value:z.4f}"


def percent(share: float, digits: int = 2) -> str:
    """Format a share so that 0.00% means none and 100.00% means all, never nearly."""
    smallest = 10.0**-digits
    if 0 < share < smallest / 200:
        return f"<{smallest:.{digits}f}%"
    if 1 - smallest / 200 <= share < 1:
        return f">{100 - smallest:.{digits}f}%"
    return f"{100 * share:.{digits}f}%"


def rule_sentence(layer: str, rule: str = "cosine") -> str:
    """Return what a rule compares in an exit layer, and what hard and easy mean."""
    value, what = "confidence", f", rule {rule}"
    if rule in RULE_WORDS:
        value, meaning = RULE_WORDS[rule]
        what = f": {meaning}"
    if rule in ("cosine", "mean_cosine"):
        last = int(layer) if layer.isdigit() else None
        pairs = [] if last is None else [last] if rule == "cosine" else [last - 1, last]
        # Written out, because the first study was off by one here.
        states = ", ".join(f"history[{after - 1}] against history[{after}]" for after in pairs)
        ends = "input and output" if rule == "cosine" else "inputs and outputs of two layers"
        what = f", {ends} ({states})" if pairs else ""
    return (
        f"Exit layer {layer}{what}. Hard: {value} < threshold, the token continues. "
        f"Easy: {value} >= threshold, the token exits."
    )


def bos_words(bos: str | UnsetType) -> str:
    """Return what follows the size of a corpus, where BOS was added or left out."""
    return {"yes": ", with BOS", "no": ", without BOS"}.get(known(bos) or "", "")


def headline(record: HasProvenance) -> list[tuple[str, str]]:
    """Return one line each for model, corpus and run, as (label, text), and what was not read."""
    model, corpus = record.provenance.model, record.provenance.corpus
    layers = f"{known(model.num_layers)} decoder layers"
    part = "text decoder of " if known(model.text_decoder) else ""
    traits = [f"{part}{known(model.family)}", layers, known(model.quantization)]
    unread = [
        f"{what} ({names})"
        for what, names in (
            ("other weight files", known(model.unread_files)),
            ("parts of the files", known(model.unused_parts)),
        )
        if names
    ]
    count = known(corpus.empty_records)
    empty = f"; {counted(count, 'empty record')}" if count else ""
    form = f"; read as {corpus.form}" if known(corpus.form) else ""
    return [
        ("Model", f"{known(model.name)} ({', '.join(trait for trait in traits if trait)})"),
        *([("Not used", "; ".join(unread))] if unread else []),
        (
            "Corpus",
            f"{corpus.name}, {corpus.tokens:,} tokens: "
            f"{counted(corpus.sequences, 'sequence')} x {corpus.seq_len:,}"
            f"{bos_words(corpus.bos)}{form}{empty}",
        ),
        ("Run", run_line(model)),
    ]


def run_line(model: ModelProvenance) -> str:
    """Return how a model was run: dtype, device, and a kernel that its config does not name."""
    run = f"{known(model.dtype)} on {known(model.device)}"
    named = known(model.attention_in_config)
    if not named:
        return run
    return (
        f"{run}, {known(model.attention)} attention"
        f" (config.json names {named}, which this machine lacks)"
    )
