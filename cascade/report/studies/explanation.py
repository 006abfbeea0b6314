"""Explanations in words: which cause carries, by which numbers, and which are not supported."""

from __future__ import annotations

from collections.abc import Sequence

from cascade.report.common.records import Record, check_record
from cascade.report.common.sections import Lead, Pairs, Picture, Report, Section, Table, table_of
from cascade.report.studies.explanation_figures import (
    ablations_svg,
    causes_svg,
    depth_svg,
    tokens_svg,
)

_SECTIONS = (
    "provenance",
    "settings",
    "missing",
    "layers",
    "entries",
    "sides",
    "gap",
    "causes",
    "classes",
    "positions",
    "ablations",
    "verdict",
)

#: The pictures that an explanation may have.
PICTURES = (
    "explanation-causes.svg",
    "explanation-depth.svg",
    "explanation-tokens.svg",
    "explanation-ablations.svg",
)

_CAUSES = {
    "attention": "what its attention adds",
    "mlp": "what its MLP adds",
    "first_token": "what it reads from the first token",
    "delimiters": "what it reads from delimiters",
    "common": "what it adds alike to every token",
    "update_size": "the size of its update",
    "update_direction": "the direction of its update",
    "stream_size": "a shorter stream before it",
}

_ABLATIONS = {
    "layer_skipped": "layer skipped",
    "attention_skipped": "attention skipped",
    "mlp_skipped": "MLP skipped",
    "update_halved": "update halved",
    "common_left_out": "common part left out",
    "first_token_hidden": "first token hidden",
    "delimiters_hidden": "delimiters hidden",
}


def explanation_report(record: Record) -> Report:
    """Return an explanation's report.

    Args:
        record: A saved record of kind `explanation`.

    Raises:
        ValueError: The record is of another kind or schema, or lacks a section.
    """
    check_record(record, "explanation", _SECTIONS)
    settings = record["settings"]
    layer, contrast = settings["layer"], settings["contrast"]
    model, corpus = record["provenance"]["model"], record["provenance"]["corpus"]
    return Report(
        kicker="CASCADE explanation",
        title=f"Layer {layer} of {model.get('name') or model['family']}, against layer {contrast}",
        about=(
            f"{corpus['name']}: {settings['sequences']:,} sequences x {corpus['seq_len']:,} tokens "
            f"measured, {settings['pilot_sequences']:,} others learned from; {model['dtype']} on "
            f"{model['device']}"
        ),
        sections=(
            Section("", (Lead(_verdict(record), _mark(record)), *_worth(record))),
            Section("Causes", _causes(record)),
            Section("What the layer adds", (_sides(record),)),
            Section("What it is worth", _ablations(record)),
            Section("By token", _tokens(record)),
            Section("The stream over depth", _depth(record)),
            Section("What could not be measured", tuple(map(_sentence, record["missing"]))),
        ),
        provenance=record["provenance"],
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _mark(record: Record) -> str:
    return "pass" if record["verdict"]["carried_by"] else "open"


def _whole(share: float) -> str:
    return f"{round(100 * share)}"  # an integer: 0, never -0


def _percent(share: float) -> str:
    return f"{_whole(share)} %"


def _listed(parts: Sequence[str]) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _numbers(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'s' if len(numbers) != 1 else ''} {_listed([str(n) for n in numbers])}"


def _cause_words(record: Record, row: Record) -> str:
    cause = row["cause"]
    target = record["sides"][0]
    if cause == "dimensions":
        found = [dim["dimension"] for dim in target["dimensions"]]
        return f"what it adds in {_numbers('dimension', found)}" if found else "few dimensions"
    if cause == "massive":
        dims = target["massive"]
        return f"the massive {_numbers('dimension', dims)}" if dims else "massive activations"
    if cause == "one_class":
        return f"{_class_words(row['class'])} alone" if "class" in row else "one class of tokens"
    if cause == "first_positions":
        return f"the first {row['positions']} positions"
    return _CAUSES[cause]


def _class_words(name: str) -> str:
    return {
        "start": "the first token",
        "special": "special tokens",
        "word start": "word starts",
        "continuation": "continuations",
    }.get(name, name)


def _verdict(record: Record) -> str:
    """Say which explanation carries, with the numbers that decide."""
    gap, (target, other) = record["gap"], record["sides"]
    turns = (
        f"Layer {target['layer']} turns the stream by {target['degrees']:.1f} degrees (similarity "
        f"{target['similarity']:.3f}), layer {other['layer']} by {other['degrees']:.1f} "
        f"({other['similarity']:.3f})."
    )
    if not gap["asks_for_a_cause"]:
        return (
            f"{turns} That is a gap of {gap['degrees']:.1f} degrees ({gap['interval'][0]:.1f} to "
            f"{gap['interval'][1]:.1f}): there is no dip to explain."
        )
    carried = [row for row in record["causes"] if row["cause"] in record["verdict"]["carried_by"]]
    if not carried:
        return (
            f"{turns} No single cause carries the gap of {gap['degrees']:.1f} degrees: taking away "
            f"any of them leaves more than {_percent(1 - record['settings']['carries'])} of it, or "
            "cannot be told from that."
        )
    carried.sort(key=lambda row: -row["closed"])
    named = _listed([f"{_cause_words(record, row)} ({_percent(row['closed'])})" for row in carried])
    return (
        f"{turns} The gap of {gap['degrees']:.1f} degrees goes with {named}: the share of it that "
        "is gone without each."
    )


def _worth(record: Record) -> tuple[str, ...]:
    """Say which causes are refused, and what the model makes of the parts."""
    lines = []
    if record["gap"]["asks_for_a_cause"]:
        for verdict, words in (
            ("does not carry", "Not supported by their ablation, and so no cause"),
            ("cannot tell", "Not to be told from half of the gap"),
        ):
            rows = [row for row in record["causes"] if row["verdict"] == verdict]
            rows = [row for row in rows if row.get("closed") is not None]
            if rows:
                named = [f"{_cause_words(record, row)} ({_percent(row['closed'])})" for row in rows]
                lines.append(f"{words}: {_listed(named)}.")
    layer, contrast = record["settings"]["layer"], record["settings"]["contrast"]
    found = {(row["layer"], row["ablation"]): row for row in record["ablations"]}
    skipped = [found.get((side, "layer_skipped")) for side in (layer, contrast)]
    common = found.get((layer, "common_left_out"))
    if skipped[0] and skipped[1]:
        text = (
            f"Skipping layer {layer} makes perplexity {skipped[0]['perplexity_ratio']:.2f} x, "
            f"skipping layer {contrast} {skipped[1]['perplexity_ratio']:.2f} x"
        )
        if common is not None:
            text += (
                f"; leaving out only what layer {layer} adds alike to every token makes it "
                f"{common['perplexity_ratio']:.2f} x"
            )
        lines.append(f"{text}.")
    return tuple(lines)


def _causes(record: Record) -> tuple[Table | Picture | str, ...]:
    layer, contrast = record["settings"]["layer"], record["settings"]["contrast"]
    tried = [row for row in record["causes"] if "degrees" in row]
    rows = [
        [
            f"{row['degrees']:.1f}",
            f"{row['contrast_degrees']:.1f}",
            f"{row['similarity']:.3f}",
            *_gone(row),
            _verdict_words(record, row),
            _cause_words(record, row),
        ]
        for row in tried
    ]
    blocks: list[Table | Picture | str] = [
        table_of(
            f"What is left without each: degrees that layer {layer} turns the stream, degrees that "
            f"layer {contrast} turns it, the similarity of layer {layer}; and which share of the "
            "gap between the two is gone, with its 95 % interval in percent.",
            (layer, contrast, "cosine", "gone", "95 %", "carries", "without"),
            rows,
            text_columns=2,
        )
    ]
    left_out = [row for row in record["causes"] if "degrees" not in row]
    if left_out:
        reasons = [f"{_cause_words(record, row)} ({row['reason']})" for row in left_out]
        blocks.append(f"Not tried: {_listed(reasons)}.")
    if any(row.get("closed") is not None for row in tried):
        picture = causes_svg(record, lambda row: _cause_words(record, row))
        blocks.append(
            Picture(
                "explanation-causes.svg",
                picture,
                f"Share of the gap between layer {layer} and layer {contrast} that goes with each "
                "cause; lines are 95 % intervals. What an update adds is subtracted, tokens are "
                "hidden from attention, dimensions are left out, and traits are made the "
                "neighbour's.",
            )
        )
    return tuple(blocks)


_ANSWERS = {"carries": "yes", "does not carry": "no", "cannot tell": "unclear"}


def _verdict_words(record: Record, row: Record) -> str:
    return _ANSWERS[row["verdict"]] if record["gap"]["asks_for_a_cause"] else "no gap"


def _gone(row: Record) -> tuple[str, str]:
    if row["closed"] is None:
        return "-", "-"
    low, high = row["interval"]
    return _percent(row["closed"]), f"{_whole(low)} to {_whole(high)}"


def _sides(record: Record) -> Table:
    layers = {row["layer"]: row for row in record["layers"]}
    sides = record["sides"]
    rows = [layers[side["layer"]] for side in sides]

    def line(name: str, values: Sequence[str]) -> list[str]:
        return [*values, name]

    table = [
        line("similarity", [f"{side['similarity']:.3f}" for side in sides]),
        line("degrees that it turns the stream", [f"{side['degrees']:.1f}" for side in sides]),
        line("share of the angle by attention", [_share(row["attention_share"]) for row in rows]),
        line("share of the angle by the MLP", [_share(row["mlp_share"]) for row in rows]),
        line("attention's norm over the stream's", [f"{r['attention_ratio']:.2f}" for r in rows]),
        line("MLP's norm over the stream's", [f"{r['mlp_ratio']:.2f}" for r in rows]),
        line("attention's angle to the stream", [f"{r['attention_angle']:.0f}" for r in rows]),
        line("MLP's angle to the stream", [f"{r['mlp_angle']:.0f}" for r in rows]),
        line("the update's angle to the stream", [f"{r['update_angle']:.0f}" for r in rows]),
        line("energy alike for every token", [_percent(side["common_share"]) for side in sides]),
        line(
            "dimensions with half of the energy",
            [f"{side['dimensions_for_half']:,}" for side in sides],
        ),
    ]
    for key, name in (
        ("first_token_attention", "attention to the first token"),
        ("delimiter_attention", "attention to delimiters"),
    ):
        if all(row.get(key) is not None for row in rows):
            table.append(line(name, [_percent(row[key]) for row in rows]))
    if all(row.get("heads") for row in rows):
        ranges = [f"{_percent(min(r['heads']))} to {_percent(max(r['heads']))}" for r in rows]
        table.append(line("the same, head by head", ranges))
    return table_of(
        "The update of each layer, in its parts. Angles are in degrees, norms the medians over "
        "tokens but the first; a part's share of the angle is what goes with it when it leaves "
        "first and when it leaves last, on average.",
        (*(f"layer {side['layer']}" for side in sides), ""),
        table,
        text_columns=1,
    )


def _share(value: float | None) -> str:
    return "-" if value is None else _percent(value)


def _ablation_words(row: Record) -> str:
    return _ABLATIONS[row["ablation"]]


def _ablations(record: Record) -> tuple[Table | Picture, ...]:
    rows = [
        [
            row["layer"],
            f"{row['perplexity']:.2f}",
            f"{row['perplexity_ratio']:.3f}",
            f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}",
            _ablation_words(row),
        ]
        for row in record["ablations"]
    ]
    full = record["ablations"][0]["full_perplexity"]
    return (
        table_of(
            f"Perplexity when a layer or a part of it is taken away; as it is: {full:.2f}.",
            ("layer", "perplexity", "ratio", "95 % interval", ""),
            rows,
            text_columns=1,
        ),
        Picture(
            "explanation-ablations.svg",
            ablations_svg(record, _ablation_words),
            "Perplexity without a layer or a part of it, relative to the model as it is.",
        ),
    )


def _tokens(record: Record) -> tuple[Table | Picture | str, ...]:
    layer, contrast = record["settings"]["layer"], record["settings"]["contrast"]
    rows = [
        [
            row["name"],
            f"{row['tokens']:,}",
            *(f"{row[side]['similarity']:.3f}" for side in ("layer", "contrast")),
            *(_ends(row[side]["interval"]) for side in ("layer", "contrast")),
        ]
        for part in ("classes", "positions")
        for row in record[part]
    ]
    return (
        table_of(
            "Similarity by token class, then by position in the sequence, with 95 % intervals.",
            ("", "tokens", f"layer {layer}", f"layer {contrast}", f"({layer})", f"({contrast})"),
            rows,
        ),
        Picture(
            "explanation-tokens.svg",
            tokens_svg(record),
            "Similarity by token class and by position; lines are 95 % intervals.",
        ),
    )


def _ends(interval: Sequence[float] | None) -> str:
    return "too few" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _depth(record: Record) -> tuple[Table | Picture | Pairs | str, ...]:
    rows = record["entries"]
    norms = {row["entry"]: row["norm"] for row in rows}
    blocks: list[Table | Picture | Pairs | str] = [
        Picture(
            "explanation-depth.svg",
            depth_svg(record),
            "The norm of the stream, what attention and MLP add to it, and the attention to the "
            "first token and to delimiters. Shaded: the layer and its neighbour.",
        )
    ]
    growth = (
        f"The median token's norm grows from {norms[1]:,.1f} behind layer 1 to "
        f"{norms[max(norms)]:,.1f} behind layer {max(norms)}."
    )
    massive = _massive_rows(rows)
    if not massive:
        return (f"{growth} No activation is massive anywhere.", *blocks)
    blocks.append(
        table_of(
            "Massive activations: magnitude above 100 and above 1,000 times the median of their "
            "sequence's hidden state (Sun et al. 2024).",
            ("dimension", "largest", "at the first token", "entries of the history", "tokens"),
            massive,
            text_columns=2,
        )
    )
    return (growth, *blocks)


def _massive_rows(entries: Sequence[Record]) -> list[list[str]]:
    """Return one row per dimension: where it is massive, how large, on which tokens."""
    by: dict[int, list[tuple[int, Record]]] = {}
    for entry in entries:
        for row in entry["massive"]:
            by.setdefault(row["dimension"], []).append((entry["entry"], row))
    rows = []
    for dim, found in sorted(by.items(), key=lambda pair: -max(r["largest"] for _, r in pair[1])):
        count = sum(row["activations"] for _, row in found)
        first = sum(row["at_first_token"] for _, row in found)
        tokens = max((row for _, row in found), key=lambda row: row["activations"])["tokens"]
        rows.append(
            [
                str(dim),
                f"{max(row['largest'] for _, row in found):,.0f}",
                f"{_percent(first / count)} of {count:,}",
                _runs([entry for entry, _ in found]),
                ", ".join(f"{token['text']!r} {token['count']}" for token in tokens),
            ]
        )
    return rows


def _runs(numbers: Sequence[int]) -> str:
    """Return numbers as runs: `3-29, 31`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
