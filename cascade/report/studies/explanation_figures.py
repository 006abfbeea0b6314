"""Figures of an explanation: its causes, the stream over depth, tokens, and ablations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cascade.core.formatting import HUGE_NATS
from cascade.core.schema import known
from cascade.report.common.axes import angle, limit_angles
from cascade.report.common.svg import LIGHT, as_svg, new_figure, plain_style, title_of
from cascade.report.studies.explanation_wording import (
    ablation_words,
    cause_words,
    closing_causes,
)
from cascade.studies.explanations.records import (
    AblationRow,
    GroupSimilarity,
    LayerExplanation,
    TokenGroup,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LAYER, _CONTRAST = LIGHT["active"], LIGHT["mean"]
_VERDICTS = {
    "supported": LIGHT["active"],
    "not supported": LIGHT["whisker"],
    "undecided": LIGHT["spread"],
}


def _figure(
    record: LayerExplanation, subject: str, *, height: float, panels: int = 1
) -> tuple[Figure, list[Axes]]:
    figure = new_figure((10, height))
    axes = figure.subplots(panels, 1, sharex=panels > 1, squeeze=False)[:, 0].tolist()
    axes[0].set_title(title_of(record, subject), loc="left", pad=14, fontsize=11, parse_math=False)
    return figure, axes


def _names(record: LayerExplanation) -> tuple[str, str]:
    return f"layer {record.settings.layer}", f"layer {record.settings.contrast}"


def causes_svg(record: LayerExplanation) -> str:
    """Draw the share of the gap that closes without each cause, with its interval.

    Args:
        record: The explanation.
    """
    causes = closing_causes(record)[::-1]
    layer, contrast = _names(record)
    with plain_style():
        figure, (axes,) = _figure(
            record, f"{layer} against {contrast}", height=1.6 + 0.34 * len(causes)
        )
        for place, cause in enumerate(causes):
            colour = _VERDICTS[cause.row.verdict]
            axes.barh(place, 100 * cause.closed, color=colour, height=0.6)
            ends = [100 * end for end in cause.interval]
            axes.plot(ends, [place] * 2, color=LIGHT["ink"], linewidth=1)
        threshold = 100 * record.settings.supported_share
        axes.axvline(threshold, color=LIGHT["muted"], linestyle=(0, (4, 3)), linewidth=1)
        axes.axvline(0, color=LIGHT["muted"], linewidth=0.8)
        names = [cause_words(record, cause.row) for cause in causes]
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.set_xlabel(
            f"share of the gap that closes without it, % (dashed: {threshold:g} %, supported)"
        )
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        label = f"Bar chart: share of the gap between {layer} and {contrast} that closes without "
        label += "each cause."
        return as_svg(figure, "explanation-causes", label)


def depth_svg(record: LayerExplanation) -> str:
    """Draw the stream over depth: its norm, what attention and MLP add, attention to sinks.

    Args:
        record: The explanation.
    """
    with_sinks = any(known(row.first_token_attention) is not None for row in record.layers)
    with plain_style():
        figure, axes = _figure(
            record,
            "the stream over depth",
            height=8.4 if with_sinks else 5.8,
            panels=3 if with_sinks else 2,
        )
        _draw_norms(axes[0], record)
        _draw_updates(axes[1], record)
        if with_sinks:
            _draw_sinks(axes[2], record)
        for panel in axes:
            _mark(panel, record)
            panel.grid(axis="y")
            panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes[-1].set_xlabel("decoder layer (0: the embeddings)")
        return as_svg(figure, "explanation-depth", "Line charts over depth: norms and attention.")


def _draw_norms(axes: Axes, record: LayerExplanation) -> None:
    entries = record.entries
    numbers = [entry.entry for entry in entries]
    _line(axes, numbers, [row.norm for row in entries], "median token", "mean")
    _line(axes, numbers, [row.first_norm for row in entries], "first token", "rule4")
    _line(axes, numbers, [row.largest for row in entries], "largest activation", "rule6")
    axes.set_yscale("log")
    axes.set_ylabel("norm of the stream")


def _draw_updates(axes: Axes, record: LayerExplanation) -> None:
    layers = record.layers
    places = [int(row.layer) for row in layers]
    _line(axes, places, [row.attention_ratio for row in layers], "attention output", "active")
    _line(axes, places, [row.mlp_ratio for row in layers], "MLP output", "rule2")
    axes.set_yscale("log")
    axes.set_ylabel("norm / stream norm")


def _draw_sinks(axes: Axes, record: LayerExplanation) -> None:
    sinks = [
        (int(row.layer), first, delimiters)
        for row in record.layers
        if (first := known(row.first_token_attention)) is not None
        and (delimiters := known(row.delimiter_attention)) is not None
    ]
    places = [place for place, _, _ in sinks]
    _line(axes, places, [first for _, first, _ in sinks], "to the first token", "rule4")
    _line(axes, places, [delimiters for _, _, delimiters in sinks], "to delimiters", "rule5")
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of the attention")


def _line(
    axes: Axes, places: Sequence[float], values: Sequence[float], label: str, colour: str
) -> None:
    axes.plot(
        places, values, color=LIGHT[colour], marker="o", markersize=2.8, linewidth=1.3, label=label
    )


def _mark(axes: Axes, record: LayerExplanation) -> None:
    """Mark the explained layer and its neighbour."""
    settings = record.settings
    for place, colour in ((int(settings.layer), "active"), (int(settings.contrast), "mean")):
        axes.axvspan(place - 0.4, place + 0.4, color=LIGHT[colour], alpha=0.13, linewidth=0)


def tokens_svg(record: LayerExplanation) -> str:
    """Draw the similarity of both layers by token class and by position.

    Args:
        record: The explanation; classes without a token are not in it.
    """
    layer, contrast = _names(record)
    with plain_style():
        figure = new_figure((10, 4.8))
        left, right = figure.subplots(1, 2, sharey=True)
        title = title_of(record, "by token class and position")
        left.set_title(title, loc="left", pad=14, fontsize=11, parse_math=False)
        angles: list[float] = []
        for axes, groups in ((left, record.classes), (right, record.positions)):
            for shift, colour, name, sides in (
                (-0.1, _CONTRAST, contrast, [group.contrast for group in groups]),
                (0.1, _LAYER, layer, [group.layer for group in groups]),
            ):
                angles += _draw_groups(axes, sides, shift, colour, name)
            _name_groups(axes, groups)
        limit_angles(left, min(angles), max(angles))
        left.set_ylabel("similarity (axis uniform in angle)")
        left.set_xlabel("token class, and its tokens")
        right.set_xlabel("position in the sequence, and its tokens")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        label = f"Dot plots: similarity of {layer} and {contrast} by token class and position."
        return as_svg(figure, "explanation-tokens", label)


def _draw_groups(
    axes: Axes, sides: Sequence[GroupSimilarity], shift: float, colour: str, name: str
) -> list[float]:
    """Draw one layer's similarity in each group and return the drawn angles."""
    places = [place + shift for place in range(len(sides))]
    angles = [angle(side.similarity) for side in sides]
    axes.plot(places, angles, "o", color=colour, markersize=4.5, label=name)
    drawn = list(angles)
    for place, side in zip(places, sides, strict=True):
        if side.interval is not None:
            ends = [angle(end) for end in side.interval]
            drawn += ends
            axes.plot([place] * 2, ends, color=colour, linewidth=1.4)
    return drawn


def _name_groups(axes: Axes, groups: Sequence[TokenGroup]) -> None:
    names = [f"{group.name}\n{group.tokens:,}" for group in groups]
    axes.set_xticks(
        range(len(groups)), names, rotation=40, ha="right", fontsize=8, parse_math=False
    )
    axes.grid(axis="y")


def _drawn(row: AblationRow, *, in_nats: bool) -> tuple[float, list[float]]:
    """Return an ablation's perplexity ratio and its interval, or both as nats per token."""
    ratio, ends = row.perplexity_ratio, row.interval
    if ratio is not None and ends is not None and not in_nats:
        return ratio, ends
    nats = known(row.nats_interval) or [math.log(end) for end in ends or ()]
    return row.added_nats, nats


def ablations_svg(record: LayerExplanation) -> str:
    """Draw the perplexity of every ablation of both layers.

    Args:
        record: The explanation.
    """
    layer, contrast = _names(record)
    words = {row.ablation: ablation_words(row) for row in record.ablations}
    names = list(words)[::-1]
    by = {(row.layer, row.ablation): row for row in record.ablations}
    most = max(row.added_nats for row in record.ablations)
    in_nats = max(abs(row.added_nats) for row in record.ablations) > HUGE_NATS
    with plain_style():
        figure, (axes,) = _figure(
            record, "perplexity under each ablation", height=1.9 + 0.42 * len(names)
        )
        for number, label, colour, shift in (
            (record.settings.layer, layer, _LAYER, 0.13),
            (record.settings.contrast, contrast, _CONTRAST, -0.13),
        ):
            rows = [
                (place + shift, row)
                for place, name in enumerate(names)
                if (row := by.get((number, name))) is not None
            ]
            for order, (place, row) in enumerate(rows):
                middle, ends = _drawn(row, in_nats=in_nats)
                axes.plot(ends, [place] * 2, color=colour, linewidth=1.6)
                axes.plot(
                    middle,
                    place,
                    "o",
                    color=colour,
                    markersize=5,
                    label=None if order else label,
                )
        axes.axvline(0 if in_nats else 1, color=LIGHT["muted"], linewidth=0.8)
        axes.set_yticks(range(len(names)), [words[name] for name in names], parse_math=False)
        if most > math.log(5) and not in_nats:
            axes.set_xscale("log")
        axes.set_xlabel(
            "loss minus the unchanged model's, nats per token"
            if in_nats
            else "perplexity / unchanged model's"
        )
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=2)
        label = f"Dot plot: perplexity ratio of each ablation of {layer} and {contrast}."
        return as_svg(figure, "explanation-ablations", label)
