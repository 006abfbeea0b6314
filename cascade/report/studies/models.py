"""What a comparison of models says, in words, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cascade.report.common.records import Record, check_record, is_normed, percent, show
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
from cascade.report.studies.model_figures import listed, operations_svg, profiles_svg

_SECTIONS = ("provenance", "rules", "models", "pairs", "by_depth")
_NONE = "none"


def models_report(record: Record) -> Report:
    """Write the report of a comparison of models.

    Args:
        record: Of kind "model-comparison".

    Raises:
        ValueError: The record is of another kind or schema, lacks a section, or holds NaN.
    """
    check_record(record, "model-comparison", _SECTIONS)
    measured = [entry for entry in record["models"] if entry["measured"]]
    sections = (
        Section("", (Lead(_lead(record, measured)), _models_table(record))),
        Section("Profiles over relative depth", tuple(_profiles(record, measured))),
        Section("Special layers, and dips matched", tuple(_dips(record, measured))),
        Section("Suggested exit layers", tuple(_exits(record, measured))),
        Section("The same tokens, sequence by sequence", tuple(_paired(record))),
        Section("From configuration alone", tuple(_configured(record))),
        Section("How to read this", (Pairs(tuple(_rules(record))),)),
    )
    return Report(
        kicker="CASCADE comparison of models",
        title=(
            f"{len(record['models'])} models "
            f"{'over relative depth' if measured else 'by their configurations'}"
        ),
        about=_about(measured),
        sections=sections,
        provenance=_provenance(record),
    )


def _about(measured: Sequence[Record]) -> str:
    if not measured:
        return "from configurations alone: nothing was measured"
    first = measured[0]["provenance"]
    corpus, model = first["corpus"], first["model"]
    return (
        f"{corpus['name']}, {corpus['tokens']:,} tokens of {measured[0]['label']}: "
        f"{corpus['sequences']:,} sequences x {corpus['seq_len']:,}; "
        f"{model['dtype']} on {model['device']}"
    )


def _provenance(record: Record) -> Record:
    models = {
        f"{entry['label']}, {entry['name']}": (
            {
                **entry["provenance"]["model"],
                "tokenizer_hash": entry["provenance"]["tokenizer_hash"],
                "corpus_fingerprint": entry["provenance"]["corpus"]["fingerprint"],
            }
            if entry["measured"]
            else {"configuration": entry["configuration"]}
        )
        for entry in record["models"]
    }
    return {**record["provenance"], **models}


def _joined(parts: Sequence[str]) -> str:
    if len(parts) < 2:
        return "".join(parts) or _NONE
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _layer(layer: str, depth: float | None) -> str:
    return layer if depth is None else f"{layer} ({depth:.3f})"


# --- What was compared -----------------------------------------------------------------------


def _lead(record: Record, measured: Sequence[Record]) -> str:
    if not measured:
        heads = _joined(
            [
                f"{percent(entry['sizes']['lm_head_share'], 1)} in {entry['label']}"
                for entry in record["models"]
            ]
        )
        return (
            f"Nothing was measured. Of the operations the LM head has {heads}: the smaller its "
            "share, the more an early exit can spare."
        )
    exits = {(entry["exit"]["layer"], entry["sizes"]["num_layers"]) for entry in measured}
    depths = sorted(entry["exit"]["depth"] for entry in measured)
    if len(measured) == 1:
        only = measured[0]
        return f"One model was measured: {_exit_words(only)} is suggested for {only['label']}."
    if len(exits) == 1:
        text = (
            f"One exit layer is suggested for all that were measured: {_exit_words(measured[0])}."
        )
    else:
        text = (
            f"The suggested exit layers lie at relative depths from {depths[0]:.3f} to "
            f"{depths[-1]:.3f}."
        )
    return " ".join(filter(None, (text, _dip_words(record), _threshold_words(record))))


def _threshold_words(record: Record) -> str:
    """Say which model the first one's thresholds suit least, where they can be tried."""
    tried = [
        (abs(row["reached"] - row["hard_ratio"]), pair, row)
        for pair in record["pairs"]
        for row in pair["thresholds"] or ()
    ]
    if not tried:
        return ""
    _, pair, row = max(tried, key=lambda entry: entry[0])
    return (
        f"{pair['against']}'s threshold for {100 * row['hard_ratio']:g}% hard tokens makes "
        f"{percent(row['reached'], 1)} hard in {pair['model']}; no other is further off."
    )


def _exit_words(entry: Record) -> str:
    return (
        f"layer {entry['exit']['layer']} of {entry['sizes']['num_layers']}, "
        f"relative depth {entry['exit']['depth']:.3f}"
    )


def _dip_words(record: Record) -> str:
    judged = [pair["dips"] for pair in record["pairs"] if pair["dips"]["judged"]]
    if not judged:
        return "There are too few layers to tell dips."
    matched = sum(len(dips["matched"]) for dips in judged)
    left = sum(len(side) for dips in judged for side in dips["unmatched"])
    if matched + left == 0:
        return "No model has a dip."
    if left == 0:
        return "Every dip has its match in the first model, and every one of its in the others."
    return (
        f"Over all pairs {matched} {'dip matches' if matched == 1 else 'dips match'} and {left} "
        f"{'has' if left == 1 else 'have'} no match."
    )


def _models_table(record: Record) -> Table:
    return table_of(
        "What was compared.",
        ("", "layers", "width", "parameters", "tokens", "model"),
        [
            [
                entry["label"],
                str(entry["sizes"]["num_layers"]),
                f"{entry['sizes']['hidden_size']:,}",
                f"{entry['sizes']['parameters']:,}",
                f"{entry['provenance']['corpus']['tokens']:,}" if entry["measured"] else "-",
                entry["name"] if entry["measured"] else f"{entry['name']} (not measured)",
            ]
            for entry in record["models"]
        ],
        text_columns=1,
    )


# --- Profiles --------------------------------------------------------------------------------


def _profiles(record: Record, measured: Sequence[Record]) -> Iterator[Block]:
    picture = profiles_svg(record)
    if picture is None:
        yield "No model was measured: there is no profile to draw."
        return
    caption = (
        "Mean similarity of each decoder layer's input and output; the state behind the final norm "
        "is left out. Triangles are dips, joined by dots where they match; dotted lines are "
        "suggested exit layers."
    )
    if any(pair["paired"] for pair in record["pairs"]):
        caption += (
            " Below, where models read the same tokens through as many layers: how far a "
            "sequence's mean similarity moved, the mean of its size; the ring is the layer that "
            "moved most."
        )
    yield Picture("models-profiles.svg", picture, caption)
    yield _means_table(measured)
    if record["pairs"]:
        yield table_of(
            "How far each profile lies from the first one's.",
            ("", "degrees apart", "most", "at depth"),
            [
                [
                    pair["model"],
                    f"{pair['apart']['degrees']:.2f}",
                    f"{pair['apart']['most_degrees']:.2f}",
                    f"{pair['apart']['most_depth']:.3f}",
                ]
                for pair in record["pairs"]
            ],
        )


def _means_table(measured: Sequence[Record]) -> Table:
    """Return one row per layer of the deepest model; each layer of another in the nearest row."""
    deepest = max(entry["sizes"]["num_layers"] for entry in measured)
    several = any(entry["sizes"]["num_layers"] != deepest for entry in measured)
    lines: list[list[str]] = [[""] * len(measured) for _ in range(deepest + 1)]
    dips = set()
    for column, entry in enumerate(measured):
        depth = entry["sizes"]["num_layers"]
        for row in entry["layers"]:
            # layer / depth * deepest, to the nearest: no two layers share a line.
            line = deepest if is_normed(row) else _nearest(int(row["layer"]), depth, deepest) - 1
            # Of models that differ in depth, each cell says which layer it is.
            text = f"{row['layer']}: {show(row['mean'])}" if several else show(row["mean"])
            lines[line][column] = text
            if row["layer"] in entry["structure"]["dips"]:
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
        f"{caption}; norm: of the state behind the final norm.",
        ("depth", *([] if several else ["layer"]), *(entry["label"] for entry in measured)),
        rows,
        active=tuple(dips),
    )


def _nearest(layer: int, depth: int, deepest: int) -> int:
    return (2 * layer * deepest + depth) // (2 * depth)


# --- Dips ------------------------------------------------------------------------------------


def _dips(record: Record, measured: Sequence[Record]) -> Iterator[Block]:
    if not measured:
        return
    yield table_of(
        "What the rule of `cascade analyze` finds in each profile.",
        ("", "input transform", "stable bands", "dips", "output transform"),
        [[entry["label"], *_structure(entry["structure"])] for entry in measured],
        text_columns=4,
    )
    rows = [
        [
            pair["model"],
            *(
                _layer(layer, depth)
                for layer, depth in zip(match["layers"], match["depths"], strict=True)
            ),
            *map(show, match["means"]),
        ]
        for pair in record["pairs"]
        for match in pair["dips"]["matched"]
    ]
    first = record["pairs"][0]["against"] if record["pairs"] else ""
    if rows:
        yield table_of(
            f"Dips that match {first}'s, with relative depth.",
            ("", f"dip of {first}", "its own", f"mean in {first}", "its own"),
            rows,
        )
    yield from _unmatched(record)


def _structure(structure: Record) -> list[str]:
    if structure["cutoff"] is None:
        return ["too few layers", *[""] * 3]
    bands = [a if a == b else f"{a}-{b}" for a, b in structure["stable_bands"]]
    return [
        ", ".join(structure["input_transform"]) or _NONE,
        ", ".join(bands) or _NONE,
        ", ".join(structure["dips"]) or _NONE,
        ", ".join(structure["output_transform"]) or _NONE,
    ]


def _unmatched(record: Record) -> Iterator[str]:
    for pair in record["pairs"]:
        dips = pair["dips"]
        names = (pair["against"], pair["model"])
        if not dips["judged"]:
            yield f"{_joined(names)}: too few layers to tell dips from other layers."
            continue
        left = [
            f"{_joined(layers)} of {name}"
            for name, layers in zip(names, dips["unmatched"], strict=True)
            if layers
        ]
        if left:
            yield (
                f"Without a match between {names[0]} and {names[1]}: {'; '.join(left)} (tolerance "
                f"{dips['tolerance']:.3f} of depth)."
            )


# --- Exit layers -----------------------------------------------------------------------------


def _exits(record: Record, measured: Sequence[Record]) -> Iterator[Block]:
    if not measured:
        return
    ratios = [row["hard_ratio"] for row in measured[0]["exit"]["by_hard_ratio"]]
    yield table_of(
        "The layer suggested for each, and its thresholds by the share of hard tokens.",
        (
            "",
            "exit layer",
            "of",
            "depth",
            "can spare",
            *(f"{100 * each:g}% hard" for each in ratios),
        ),
        [
            [
                entry["label"],
                entry["exit"]["layer"],
                str(entry["sizes"]["num_layers"]),
                f"{entry['exit']['depth']:.3f}",
                percent(entry["exit"]["spared"], 1),
                *(f"{row['threshold']:.4f}" for row in entry["exit"]["by_hard_ratio"]),
            ]
            for entry in measured
        ],
    )
    kept = [pair for pair in record["pairs"] if pair["thresholds"] is not None]
    if kept:
        first = kept[0]["against"]
        layer = kept[0]["thresholds"][0]["layer"]
        yield table_of(
            f"Tokens that {first}'s thresholds at layer {layer} make hard in the others.",
            ("", *(f"{first}: {100 * each:g}%" for each in ratios)),
            [
                [pair["model"], *(percent(row["reached"], 1) for row in pair["thresholds"])]
                for pair in kept
            ],
        )


# --- The same tokens -------------------------------------------------------------------------


def _paired(record: Record) -> Iterator[Block]:
    paired = [pair for pair in record["pairs"] if pair["paired"] is not None]
    if paired:
        yield table_of(
            f"What moved most from {paired[0]['against']}: the layer whose mean similarity changed "
            f"most over {paired[0]['paired']['sequences']:,} sequences, and the sequence that "
            "changed most there.",
            ("", "layer", "size", "mean change", "95% interval", "largest", "sequence"),
            [_mover(pair) for pair in paired],
        )
        normed = [[pair["model"], *_norm_move(pair)] for pair in paired if _norm_move(pair)]
        if normed:
            yield table_of(
                "The same for the state behind the final norm.",
                ("", "size", "mean change", "95% interval", "largest", "sequence"),
                normed,
            )
    for pair in record["pairs"]:
        if pair["unpaired"] is not None:
            yield (
                f"{pair['against']} and {pair['model']} are not compared sequence by sequence: "
                f"{pair['unpaired']}."
            )


def _change(row: Record) -> list[str]:
    interval = row["interval"]
    return [
        f"{row['mean_size']:.2g}",
        f"{row['mean']:+.2g}",
        "-" if interval is None else f"{interval[0]:+.2g} to {interval[1]:+.2g}",
        f"{row['largest']:+.2g}",
        str(row["sequence"]),
    ]


def _mover(pair: Record) -> list[str]:
    rows = {row["layer"]: row for row in pair["paired"]["layers"]}
    most = rows[pair["paired"]["largest_mover"]]
    if most["largest"] == 0:
        return [pair["model"], "none", "0", "0", "-", "0", "-"]
    return [pair["model"], most["layer"], *_change(most)]


def _norm_move(pair: Record) -> list[str]:
    row = pair["paired"]["layers"][-1]
    return _change(row) if is_normed(row) else []


# --- Configuration ---------------------------------------------------------------------------


def _configured(record: Record) -> Iterator[Block]:
    yield table_of(
        "What follows from each configuration.",
        ("", "layers", "width", "in layers", "operations", "one layer", "LM head"),
        [[listed(labels), *row] for row, labels in _by_size(record).items()],
    )
    picture = operations_svg(record)
    if picture is None:
        yield "All models are of one size: their shares of operations are the same."
    else:
        yield Picture(
            "models-operations.svg",
            picture,
            "Shares of each model's operations per token. Where a model was measured, its decoder "
            "layers are parted at the suggested exit layer.",
        )
    if record["by_depth"]:
        yield _by_depth(record)


def _by_size(record: Record) -> dict[tuple[str, ...], list[str]]:
    """Return what each size comes to, with the models that have it."""
    found: dict[tuple[str, ...], list[str]] = {}
    for entry in record["models"]:
        sizes = entry["sizes"]
        row = (
            str(sizes["num_layers"]),
            f"{sizes['hidden_size']:,}",
            percent(sizes["layer_parameters"] / sizes["parameters"], 1),
            f"{sizes['operations_per_token'] / 1e9:.3g}e9",
            percent(sizes["layer_share"], 1),
            percent(sizes["lm_head_share"], 1),
        )
        found.setdefault(row, []).append(entry["label"])
    return found


def _by_depth(record: Record) -> Table:
    rows = []
    for entry in record["by_depth"]:
        origin = f"exit of {listed(entry['from'])}" if entry["from"] else "for reference"
        for place in entry["layers"]:
            rows.append(
                [
                    place["model"],
                    f"{entry['depth']:.3f}",
                    str(place["layer"]),
                    percent(place["spared"], 1),
                    origin,
                ]
            )
    return table_of(
        "Layers of models that were not measured, by depth alone: where to look first. No exit "
        "layer was found there.",
        ("", "depth", "layer", "can spare", "why this depth"),
        sorted(rows, key=lambda row: row[0]),
        text_columns=1,
    )


def _rules(record: Record) -> Iterator[tuple[str, str]]:
    rules = record["rules"]
    yield "Depth", rules["depth"]
    if record["pairs"]:
        yield "Dips", rules["dips"]
        yield "Degrees apart", rules["apart"]
    if any(entry["measured"] for entry in record["models"]):
        yield "Exit layer", rules["exit"]
    yield "Can spare", rules["spared"]
    if any(pair["paired"] for pair in record["pairs"]):
        yield "Change", rules["paired"]
    yield (
        "Operations",
        "per token; in layers: the share of the parameters that is in decoder layers",
    )
    for entry in record["models"]:
        altered = (entry["provenance"] or {}).get("model", {}).get("altered")
        if altered:
            yield entry["label"], altered
