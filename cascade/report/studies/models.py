"""The report of a comparison of models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cascade.core.schema import known, to_plain
from cascade.report.common.records import bos_words, percent
from cascade.report.common.sections import (
    Block,
    Lead,
    Pairs,
    Picture,
    Report,
    Section,
    Table,
    table_of,
)
from cascade.report.common.words import listed
from cascade.report.studies.model_figures import label_range, operations_svg
from cascade.report.studies.model_profiles import (
    dip_blocks,
    exit_blocks,
    paired_blocks,
    profile_blocks,
)
from cascade.studies.comparisons.model_records import ModelComparison, ModelMeasurement


def models_report(record: ModelComparison) -> Report:
    """Return the report of a comparison of models.

    Args:
        record: The comparison.
    """
    measured = record.measured()
    sections = (
        Section("", (Lead(_lead(record, measured)), _models_table(record))),
        Section("Profiles over relative depth", tuple(profile_blocks(record, measured))),
        Section("Special layers and matching dips", tuple(dip_blocks(record, measured))),
        Section("Suggested exit layers", tuple(exit_blocks(record, measured))),
        Section("Changes on the same tokens", tuple(paired_blocks(record))),
        Section("From configuration alone", tuple(_configured(record))),
        Section("How to read this", (Pairs(tuple(_rules(record))),)),
    )
    return Report(
        kicker="CASCADE comparison of models",
        title=(
            f"{len(record.models)} models "
            f"{'over relative depth' if measured else 'by their configurations'}"
        ),
        about=_about(measured),
        sections=sections,
        provenance=_provenance(record),
    )


def _about(measured: Sequence[ModelMeasurement]) -> str:
    if not measured:
        return "from configurations alone: nothing was measured"
    first = measured[0].provenance
    corpus, model = first.corpus, first.model
    return (
        f"{corpus.name}, {corpus.tokens:,} tokens of {measured[0].label}: "
        f"{corpus.sequences:,} sequences x {corpus.seq_len:,}{bos_words(corpus.bos)}; "
        f"{model.dtype} on {model.device}"
    )


def _provenance(record: ModelComparison) -> dict[str, Any]:
    """Return what all models share, and the provenance of each model."""
    models: dict[str, Any] = {}
    for entry in record.models:
        about: dict[str, Any] = {"configuration": entry.configuration}
        if entry.provenance is not None:
            about = {
                **to_plain(entry.provenance.model),
                "tokenizer_hash": entry.provenance.tokenizer_hash,
                "corpus_fingerprint": entry.provenance.corpus.fingerprint,
            }
        models[f"{entry.label}, {entry.name}"] = about
    return {**to_plain(record.provenance), **models}


# --- What was compared -----------------------------------------------------------------------


def _lead(record: ModelComparison, measured: Sequence[ModelMeasurement]) -> str:
    if not measured:
        heads = listed(
            [f"{percent(entry.sizes.lm_head_share, 1)} in {entry.label}" for entry in record.models]
        )
        return (
            f"Nothing was measured. The LM head's share of the operations is {heads}. The smaller "
            "it is, the more an early exit can save."
        )
    exits = {(entry.exit.layer, entry.sizes.num_layers) for entry in measured}
    depths = sorted(entry.exit.depth for entry in measured)
    if len(measured) == 1:
        only = measured[0]
        return f"One model was measured: {_exit_words(only)} is suggested for {only.label}."
    if len(exits) == 1:
        text = (
            "The suggested exit layer is the same for all measured models: "
            f"{_exit_words(measured[0])}."
        )
    else:
        text = (
            f"The suggested exit layers lie at relative depths from {depths[0]:.3f} to "
            f"{depths[-1]:.3f}."
        )
    return " ".join(filter(None, (text, _dip_words(record), _threshold_words(record))))


def _threshold_words(record: ModelComparison) -> str:
    """Return which model the first one's thresholds fit least, if they can be applied."""
    tried = [
        (abs(row.reached - row.hard_ratio), pair, row)
        for pair in record.pairs
        for row in pair.thresholds or ()
    ]
    if not tried:
        return ""
    _, pair, row = max(tried, key=lambda entry: entry[0])
    return (
        f"The largest error of {pair.against}'s thresholds is in {pair.model}, where "
        f"{percent(row.reached, 1)} of the tokens are hard instead of {100 * row.hard_ratio:g}%."
    )


def _exit_words(entry: ModelMeasurement) -> str:
    return (
        f"layer {entry.exit.layer} of {entry.sizes.num_layers}, "
        f"relative depth {entry.exit.depth:.3f}"
    )


def _dip_words(record: ModelComparison) -> str:
    judged = [pair.dips for pair in record.pairs if pair.dips.judged]
    if not judged:
        return "The models have too few layers to find dips."
    matched = sum(len(dips.matched) for dips in judged)
    left = sum(len(side) for dips in judged for side in dips.unmatched)
    if matched + left == 0:
        return "No model has a dip."
    if left == 0:
        return "The dips of all models match."
    return (
        f"Over all pairs {matched} {'dip matches' if matched == 1 else 'dips match'} and {left} "
        f"{'has' if left == 1 else 'have'} no match."
    )


def _models_table(record: ModelComparison) -> Table:
    return table_of(
        "The compared models.",
        ("", "layers", "width", "parameters", "tokens", "model"),
        [
            [
                entry.label,
                str(entry.sizes.num_layers),
                f"{entry.sizes.hidden_size:,}",
                f"{entry.sizes.parameters:,}",
                "-" if entry.provenance is None else f"{entry.provenance.corpus.tokens:,}",
                entry.name if entry.measured else f"{entry.name} (not measured)",
            ]
            for entry in record.models
        ],
        text_columns=1,
    )


# --- Configuration ---------------------------------------------------------------------------


def _configured(record: ModelComparison) -> Iterator[Block]:
    yield table_of(
        "Sizes, and shares of the operations per token.",
        ("", "layers", "width", "in layers", "operations", "one layer", "LM head"),
        [[label_range(labels), *row] for row, labels in _by_size(record).items()],
    )
    picture = operations_svg(record)
    if picture is None:
        yield "All models are of one size: their shares of operations are the same."
    else:
        yield Picture(
            "models-operations.svg",
            picture,
            "Shares of each model's operations per token. Where a model was measured, its decoder "
            "layers are split at the suggested exit layer.",
        )
    if record.by_depth:
        yield _by_depth(record)


def _by_size(record: ModelComparison) -> dict[tuple[str, ...], list[str]]:
    """Return the cost of each configuration, with the models that have it."""
    found: dict[tuple[str, ...], list[str]] = {}
    for entry in record.models:
        sizes = entry.sizes
        row = (
            str(sizes.num_layers),
            f"{sizes.hidden_size:,}",
            percent(sizes.layer_parameters / sizes.parameters, 1),
            f"{sizes.operations_per_token / 1e9:.3g}e9",
            percent(sizes.layer_share, 1),
            percent(sizes.lm_head_share, 1),
        )
        found.setdefault(row, []).append(entry.label)
    return found


def _by_depth(record: ModelComparison) -> Table:
    rows = []
    for entry in record.by_depth:
        origin = (
            f"exit of {label_range(entry.suggested_by)}" if entry.suggested_by else "for reference"
        )
        for place in entry.layers:
            rows.append(
                [
                    place.model,
                    f"{entry.depth:.3f}",
                    str(place.layer),
                    percent(place.spared, 1),
                    origin,
                ]
            )
    return table_of(
        "Models that were not measured: the layers at these relative depths. Measure them first; "
        "this is not a suggested exit layer.",
        ("", "depth", "layer", "can save", "why this depth"),
        sorted(rows, key=lambda row: row[0]),
        text_columns=1,
    )


def _rules(record: ModelComparison) -> Iterator[tuple[str, str]]:
    rules = record.rules
    yield "Depth", rules.depth
    if record.pairs:
        yield "Dips", rules.dips
        yield "Degrees apart", rules.apart
    if any(entry.measured for entry in record.models):
        yield "Exit layer", rules.exit
    yield "Can save", rules.spared
    if any(pair.paired for pair in record.pairs):
        yield "Change", rules.paired
    yield (
        "Operations",
        "floating-point operations per token; one layer, LM head: their shares of these; in "
        "layers: the share of the parameters that is in decoder layers",
    )
    for entry in record.models:
        altered = None if entry.provenance is None else known(entry.provenance.model.altered)
        if altered:
            yield entry.label, altered
