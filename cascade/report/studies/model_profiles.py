"""Sections of the report on models: profiles, dips, exit layers, changes on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cascade.report.common.records import is_normed, percent, show
from cascade.report.common.sections import Block, Picture, Table, table_of
from cascade.report.common.words import listed
from cascade.report.studies.model_figures import profiles_svg
from cascade.saturation.records import LayerRoles
from cascade.studies.comparisons.model_records import (
    LayerChange,
    ModelComparison,
    ModelMeasurement,
    PairedChanges,
)

_NONE = "none"


# --- Profiles --------------------------------------------------------------------------------


def profile_blocks(
    record: ModelComparison, measured: Sequence[ModelMeasurement]
) -> Iterator[Block]:
    """Yield the profiles of the measured models, drawn and in a table."""
    picture = profiles_svg(record)
    if picture is None:
        yield "No model was measured: there is no profile to draw."
        return
    caption = (
        "Mean similarity of each decoder layer, without the row after the final norm. Triangles "
        "are dips; dotted lines join matching ones and mark suggested exit layers."
    )
    if any(pair.paired for pair in record.pairs):
        caption += (
            " Below, for models with the same tokens and number of layers: the mean absolute "
            "change of a sequence's mean similarity. A ring marks the layer that changed most."
        )
    yield Picture("models-profiles.svg", picture, caption)
    yield _means_table(measured)
    if record.pairs:
        yield table_of(
            f"The distance of each profile from {record.pairs[0].against}'s.",
            ("", "degrees apart", "largest", "at depth"),
            [
                [
                    pair.model,
                    f"{pair.apart.degrees:.2f}",
                    f"{pair.apart.most_degrees:.2f}",
                    f"{pair.apart.most_depth:.3f}",
                ]
                for pair in record.pairs
            ],
        )


def _means_table(measured: Sequence[ModelMeasurement]) -> Table:
    """Return one row per layer of the deepest model; other models' layers are in the nearest."""
    deepest = max(entry.sizes.num_layers for entry in measured)
    several = any(entry.sizes.num_layers != deepest for entry in measured)
    lines: list[list[str]] = [[""] * len(measured) for _ in range(deepest + 1)]
    dips = set()
    for column, entry in enumerate(measured):
        depth = entry.sizes.num_layers
        for row in entry.layers:
            # The nearest row to layer / depth * deepest; no two layers share a row.
            line = deepest if is_normed(row) else _nearest(int(row.layer), depth, deepest) - 1
            # If models differ in depth, each cell names its layer.
            text = f"{row.layer}: {show(row.mean)}" if several else show(row.mean)
            lines[line][column] = text
            if row.layer in entry.structure.dips:
                dips.add(f"{(line + 1) / deepest:.3f}")
    names = [str(layer) for layer in range(1, deepest + 1)]
    rows = [
        [f"{int(name) / deepest:.3f}", *([] if several else [name]), *cells]
        for name, cells in zip(names, lines, strict=False)
    ]
    if any(lines[-1]):
        rows.append(["norm", *([] if several else [""]), *lines[-1]])
    caption = "Mean similarity of each layer"
    if several:
        caption += " (layer: mean), in the line of the relative depth that is nearest"
    return table_of(
        f"{caption}; norm: the last layer's output after the final norm.",
        ("depth", *([] if several else ["layer"]), *(entry.label for entry in measured)),
        rows,
        active=tuple(dips),
    )


def _nearest(layer: int, depth: int, deepest: int) -> int:
    return (2 * layer * deepest + depth) // (2 * depth)


# --- Dips ------------------------------------------------------------------------------------


def dip_blocks(record: ModelComparison, measured: Sequence[ModelMeasurement]) -> Iterator[Block]:
    """Yield the special layers of each model, and the dips that match."""
    if not measured:
        return
    yield table_of(
        "Found by the rule of `cascade analyze` in each profile.",
        ("", "input transform", "stable bands", "dips", "output transform"),
        [[entry.label, *_structure(entry.structure)] for entry in measured],
        text_columns=4,
    )
    rows = [
        [
            pair.model,
            *(
                _layer(layer, depth)
                for layer, depth in zip(match.layers, match.depths, strict=True)
            ),
            *map(show, match.means),
        ]
        for pair in record.pairs
        for match in pair.dips.matched
    ]
    first = record.pairs[0].against if record.pairs else ""
    if rows:
        yield table_of(
            f"Dips that match those of {first}, with relative depths.",
            ("", f"dip of {first}", "matches", f"mean in {first}", "mean"),
            rows,
        )
    yield from _unmatched(record)


def _structure(structure: LayerRoles) -> list[str]:
    if structure.cutoff is None:
        return ["too few layers", *[""] * 3]
    bands = [a if a == b else f"{a}-{b}" for a, b in structure.stable_bands]
    return [
        ", ".join(structure.input_transform) or _NONE,
        ", ".join(bands) or _NONE,
        ", ".join(structure.dips) or _NONE,
        ", ".join(structure.output_transform) or _NONE,
    ]


def _unmatched(record: ModelComparison) -> Iterator[str]:
    for pair in record.pairs:
        dips = pair.dips
        names = (pair.against, pair.model)
        if not dips.judged:
            yield f"{listed(names)}: too few layers to find dips."
            continue
        left = [
            f"{listed(layers)} of {name}"
            for name, layers in zip(names, dips.unmatched, strict=True)
            if layers
        ]
        if left:
            yield (
                f"Without a match between {names[0]} and {names[1]}: {'; '.join(left)} (tolerance "
                f"{dips.tolerance:.3f} of depth)."
            )


# --- Exit layers -----------------------------------------------------------------------------


def exit_blocks(record: ModelComparison, measured: Sequence[ModelMeasurement]) -> Iterator[Block]:
    """Yield the suggested exit layers and their thresholds."""
    if not measured:
        return
    ratios = [row.hard_ratio for row in measured[0].exit.by_hard_ratio]
    yield table_of(
        "The suggested exit layer, and its thresholds by hard ratio.",
        (
            "",
            "exit layer",
            "of",
            "depth",
            "can save",
            *(f"{100 * each:g}% hard" for each in ratios),
        ),
        [
            [
                entry.label,
                entry.exit.layer,
                str(entry.sizes.num_layers),
                f"{entry.exit.depth:.3f}",
                percent(entry.exit.spared, 1),
                *(f"{row.threshold:.4f}" for row in entry.exit.by_hard_ratio),
            ]
            for entry in measured
        ],
    )
    reached = [(pair, pair.thresholds) for pair in record.pairs if pair.thresholds is not None]
    if reached:
        pair, thresholds = reached[0]
        first, layer = pair.against, thresholds[0].layer
        yield table_of(
            f"Hard ratios of the other models with {first}'s thresholds at layer {layer}.",
            ("", *(f"{first}: {100 * each:g}%" for each in ratios)),
            [
                [pair.model, *(percent(row.reached, 1) for row in thresholds)]
                for pair, thresholds in reached
            ],
        )


# --- The same tokens -------------------------------------------------------------------------


def paired_blocks(record: ModelComparison) -> Iterator[Block]:
    """Yield the changes between models on the same tokens."""
    paired = [(pair, pair.paired) for pair in record.pairs if pair.paired is not None]
    if paired:
        pair, changes = paired[0]
        yield table_of(
            f"The changes from {pair.against} over {changes.sequences:,} sequences: the layer that "
            "changed most, and the sequence that changed most in it.",
            ("", "layer", "size", "mean change", "95% interval", "largest", "sequence"),
            [[pair.model, *_largest_mover(changes)] for pair, changes in paired],
        )
        normed = [
            [pair.model, *_change(changes.layers[-1])]
            for pair, changes in paired
            if is_normed(changes.layers[-1])
        ]
        if normed:
            yield table_of(
                "The same for the row after the final norm.",
                ("", "size", "mean change", "95% interval", "largest", "sequence"),
                normed,
            )
    for pair in record.pairs:
        if pair.unpaired is not None:
            yield (
                f"{pair.against} and {pair.model} are not compared sequence by sequence: "
                f"{pair.unpaired}."
            )


def _change(row: LayerChange) -> list[str]:
    interval = row.interval
    return [
        f"{row.mean_size:.2g}",
        f"{row.mean:+.2g}",
        "-" if interval is None else f"{interval[0]:+.2g} to {interval[1]:+.2g}",
        f"{row.largest:+.2g}",
        str(row.sequence),
    ]


def _largest_mover(changes: PairedChanges) -> list[str]:
    rows = {row.layer: row for row in changes.layers}
    most = rows[changes.largest_mover]
    if most.largest == 0:
        return ["none", "0", "0", "-", "0", "-"]
    return [most.layer, *_change(most)]


def _layer(layer: str, depth: float) -> str:
    return f"{layer} ({depth:.3f})"
