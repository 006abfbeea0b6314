"""Tables of an explained layer: its update, ablations, tokens, and the stream over depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cascade.core.formatting import perplexity_words, ratio_interval_words, ratio_words
from cascade.core.schema import known
from cascade.report.common.sections import Block, Picture, Table, table_of
from cascade.report.common.words import number_ranges, whole_percent
from cascade.report.studies.explanation_figures import ablations_svg, depth_svg, tokens_svg
from cascade.report.studies.explanation_wording import ablation_words
from cascade.studies.explanations.records import (
    LayerExplanation,
    LayerRow,
    MassiveDimension,
    StreamEntry,
)


def sides_table(record: LayerExplanation) -> Table:
    """Return the table of what the layer and its neighbour add to the stream."""
    layers = {row.layer: row for row in record.layers}
    sides = record.sides
    rows = [layers[side.layer] for side in sides]

    def line(name: str, show: Callable[[LayerRow], str]) -> list[str]:
        return [*map(show, rows), name]

    table = [
        [*(f"{side.similarity:.3f}" for side in sides), "similarity"],
        [*(f"{side.degrees:.1f}" for side in sides), "angle by which it turns the stream"],
        line("share of the angle due to attention", lambda row: whole_percent(row.attention_share)),
        line("share of the angle due to the MLP", lambda row: whole_percent(row.mlp_share)),
        line("norm of the attention output / stream", lambda row: f"{row.attention_ratio:.2f}"),
        line("norm of the MLP output / stream", lambda row: f"{row.mlp_ratio:.2f}"),
        line(
            "angle of the attention output to the stream", lambda row: f"{row.attention_angle:.0f}"
        ),
        line("angle of the MLP output to the stream", lambda row: f"{row.mlp_angle:.0f}"),
        line("angle of the update to the stream", lambda row: f"{row.update_angle:.0f}"),
        [
            *(whole_percent(side.common_share) for side in sides),
            "share of the energy in the common part",
        ],
        [
            *(f"{side.dimensions_for_half:,}" for side in sides),
            "dimensions that hold half of the energy",
        ],
        *_sink_lines(rows),
    ]
    return table_of(
        "The update of each layer and its sublayers. Angles are in degrees, norms are medians over "
        "all tokens but the first. A sublayer's share of the angle is the reduction when "
        "it is removed, averaged over both orders of removal.",
        (*(f"layer {side.layer}" for side in sides), ""),
        table,
        text_columns=1,
    )


def _sink_lines(rows: Sequence[LayerRow]) -> list[list[str]]:
    """Return the rows on attention to the first token and to delimiters, if measured."""
    lines = []
    for name, shares in (
        ("attention to the first token", [known(row.first_token_attention) for row in rows]),
        ("attention to delimiters", [known(row.delimiter_attention) for row in rows]),
    ):
        if all(share is not None for share in shares):
            lines.append([*map(whole_percent, shares), name])
    heads = [row.heads for row in rows if row.heads]
    if len(heads) == len(rows):
        ranges = [f"{whole_percent(min(each))} to {whole_percent(max(each))}" for each in heads]
        lines.append([*ranges, "attention to the first token, by head"])
    return lines


def ablation_blocks(record: LayerExplanation) -> tuple[Block, ...]:
    """Return the table and the picture of the ablations."""
    rows = [
        [
            row.layer,
            perplexity_words(row.perplexity, known(row.nats_per_token)),
            ratio_words(row.perplexity_ratio, known(row.nats_difference)).removesuffix(" x"),
            ratio_interval_words(row.interval, known(row.nats_interval)),
            ablation_words(row),
        ]
        for row in record.ablations
    ]
    first = record.ablations[0]
    full = perplexity_words(first.full_perplexity, known(first.full_nats_per_token))
    return (
        table_of(
            f"Perplexity under each ablation, and relative to the unchanged model ({full}).",
            ("layer", "perplexity", "ratio", "95 % interval", ""),
            rows,
            text_columns=1,
        ),
        Picture(
            "explanation-ablations.svg",
            ablations_svg(record),
            "Perplexity under each ablation, relative to the unchanged model; lines are 95 % "
            "intervals.",
        ),
    )


def token_blocks(record: LayerExplanation) -> tuple[Block, ...]:
    """Return the table and the picture of the similarity by token class and by position."""
    layer, contrast = record.settings.layer, record.settings.contrast
    names = (f"layer {layer}", f"layer {contrast}")
    rows = [
        [
            row.name,
            f"{row.tokens:,}",
            *(f"{side.similarity:.3f}" for side in (row.layer, row.contrast)),
            *(_ends(side.interval) for side in (row.layer, row.contrast)),
        ]
        for row in (*record.classes, *record.positions)
    ]
    return (
        table_of(
            "Mean similarity by token class, then by position in the sequence (0: the first "
            "token), with 95 % intervals.",
            ("", "tokens", *names, *(f"{name}, 95 %" for name in names)),
            rows,
        ),
        Picture(
            "explanation-tokens.svg",
            tokens_svg(record),
            "Mean similarity by token class and by position; lines are 95 % intervals.",
        ),
    )


def _ends(interval: Sequence[float] | None) -> str:
    return "too few" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def depth_blocks(record: LayerExplanation) -> tuple[Block, ...]:
    """Return the stream over depth: growth, picture and massive activations."""
    norms = {row.entry: row.norm for row in record.entries}
    picture = Picture(
        "explanation-depth.svg",
        depth_svg(record),
        "From above: the norm of the residual stream; the norms of the attention output and the "
        "MLP output relative to it; the attention to the first token and to delimiters, if "
        "measured. Shaded: the layer and its neighbour.",
    )
    growth = (
        f"The median norm of the stream grows from {norms[1]:,.1f} after layer 1 to "
        f"{norms[max(norms)]:,.1f} after layer {max(norms)}."
    )
    massive = _massive_rows(record.entries)
    if not massive:
        return (f"{growth} No activation is massive anywhere.", picture)
    table = table_of(
        "Massive activations: magnitudes above 100 and above 1,000 times the median of their "
        "sequence's hidden state (Sun et al. 2024). Tokens: the most frequent ones with such an "
        "activation, with their number, in the history entry that has most.",
        ("dimension", "largest", "at the first token", "history entries", "tokens"),
        massive,
        text_columns=2,
    )
    return (growth, picture, table)


def _massive_rows(entries: Sequence[StreamEntry]) -> list[list[str]]:
    """Return one row per massive dimension: layers, size and tokens."""
    found: dict[int, list[tuple[int, MassiveDimension]]] = {}
    for entry in entries:
        for row in entry.massive:
            found.setdefault(row.dimension, []).append((entry.entry, row))
    rows = []
    for dim, places in found.items():
        largest = max(row.largest for _, row in places)
        count = sum(row.activations for _, row in places)
        first = sum(row.at_first_token for _, row in places)
        tokens = max((row for _, row in places), key=lambda row: row.activations).tokens
        cells = [
            str(dim),
            f"{largest:,.0f}",
            f"{whole_percent(first / count)} of {count:,}",
            number_ranges([entry for entry, _ in places]),
            ", ".join(f"{token.text!r} {token.count}" for token in tokens),
        ]
        rows.append((largest, cells))
    return [cells for _, cells in sorted(rows, key=lambda pair: -pair[0])]
