"""Figures of an explanation: its causes, the stream over depth, tokens, and ablations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cascade.report.common.axes import angle, limit_angles
from cascade.report.common.records import Record
from cascade.report.common.svg import LIGHT, as_svg, plain_style, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LAYER, _CONTRAST = LIGHT["active"], LIGHT["mean"]
_VERDICTS = {
    "carries": LIGHT["active"],
    "does not carry": LIGHT["whisker"],
    "cannot tell": LIGHT["spread"],
}


def _figure(
    record: Record, subject: str, *, height: float, panels: int = 1
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=panels > 1, squeeze=False)[:, 0].tolist()
    axes[0].set_title(title_of(record, subject), loc="left", pad=14, fontsize=11, parse_math=False)
    return figure, axes


def _names(record: Record) -> tuple[str, str]:
    settings = record["settings"]
    return f"layer {settings['layer']}", f"layer {settings['contrast']}"


def causes_svg(record: Record, words: Callable[[Record], str]) -> str:
    """Draw which share of the gap goes with each cause, with its interval.

    Args:
        record: A saved record of kind `explanation`.
        words: What a cause is called.
    """
    rows = [row for row in record["causes"] if row.get("closed") is not None][::-1]
    layer, contrast = _names(record)
    with plain_style():
        figure, (axes,) = _figure(
            record, f"{layer} against {contrast}", height=1.6 + 0.34 * len(rows)
        )
        for place, row in enumerate(rows):
            colour = _VERDICTS[row["verdict"]]
            axes.barh(place, 100 * row["closed"], color=colour, height=0.6)
            axes.plot(
                [100 * end for end in row["interval"]], [place] * 2, color=LIGHT["ink"], linewidth=1
            )
        threshold = 100 * record["settings"]["carries"]
        axes.axvline(threshold, color=LIGHT["muted"], linestyle=(0, (4, 3)), linewidth=1)
        axes.axvline(0, color=LIGHT["muted"], linewidth=0.8)
        axes.set_yticks(range(len(rows)), [words(row) for row in rows], parse_math=False)
        axes.set_xlabel(f"share of the gap that goes with it, % (dashed: {threshold:g} % carries)")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        label = (
            f"Bar chart: share of the gap between {layer} and {contrast} that goes with each cause."
        )
        return as_svg(figure, "explanation-causes", label)


def depth_svg(record: Record) -> str:
    """Draw the stream over depth: its norm, what attention and MLP add, attention to sinks.

    Args:
        record: A saved record of kind `explanation`.
    """
    entries, layers = record["entries"], record["layers"]
    sinks = [row for row in layers if row.get("first_token_attention") is not None]
    with plain_style():
        figure, axes = _figure(
            record, "the stream over depth", height=8.4 if sinks else 5.8, panels=3 if sinks else 2
        )
        numbers = [entry["entry"] for entry in entries]
        _line(axes[0], numbers, [row["norm"] for row in entries], "median token", "mean")
        _line(axes[0], numbers, [row["first_norm"] for row in entries], "first token", "rule4")
        _line(axes[0], numbers, [row["largest"] for row in entries], "largest activation", "rule6")
        axes[0].set_yscale("log")
        axes[0].set_ylabel("norm of the stream")
        places = [int(row["layer"]) for row in layers]
        for name, label, colour in (
            ("attention_ratio", "attention's part", "active"),
            ("mlp_ratio", "MLP's part", "rule2"),
        ):
            _line(axes[1], places, [row[name] for row in layers], label, colour)
        axes[1].set_yscale("log")
        axes[1].set_ylabel("norm over the stream's")
        if sinks:
            places = [int(row["layer"]) for row in sinks]
            for name, label, colour in (
                ("first_token_attention", "to the first token", "rule4"),
                ("delimiter_attention", "to delimiters", "rule5"),
            ):
                _line(axes[2], places, [row[name] for row in sinks], label, colour)
            axes[2].set_ylim(0, 1)
            axes[2].set_ylabel("share of the attention")
        for panel in axes:
            _mark(panel, record)
            panel.grid(axis="y")
            panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes[-1].set_xlabel("decoder layer (0: the embeddings)")
        return as_svg(figure, "explanation-depth", "Line charts over depth: norms and attention.")


def _line(
    axes: Axes, places: Sequence[float], values: Sequence[float], label: str, colour: str
) -> None:
    axes.plot(
        places, values, color=LIGHT[colour], marker="o", markersize=2.8, linewidth=1.3, label=label
    )


def _mark(axes: Axes, record: Record) -> None:
    """Mark the layer that is explained and its neighbour."""
    for number, colour in (("layer", "active"), ("contrast", "mean")):
        place = int(record["settings"][number])
        axes.axvspan(place - 0.4, place + 0.4, color=LIGHT[colour], alpha=0.13, linewidth=0)


def tokens_svg(record: Record) -> str:
    """Draw the similarity of both layers by token class and by position.

    Args:
        record: A saved record of kind `explanation`; classes without a token are not in it.
    """
    from matplotlib.figure import Figure

    layer, contrast = _names(record)
    with plain_style():
        figure = Figure(figsize=(10, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        title = title_of(record, "by token class and position")
        left.set_title(title, loc="left", pad=14, fontsize=11, parse_math=False)
        angles = []
        for axes, rows in ((left, record["classes"]), (right, record["positions"])):
            for key, name, colour, shift in (
                ("contrast", contrast, _CONTRAST, -0.1),
                ("layer", layer, _LAYER, 0.1),
            ):
                places = [place + shift for place in range(len(rows))]
                values = [angle(row[key]["similarity"]) for row in rows]
                angles += values
                axes.plot(places, values, "o", color=colour, markersize=4.5, label=name)
                for place, row in zip(places, rows, strict=True):
                    between = row[key]["interval"]
                    if between is not None:
                        ends = [angle(end) for end in between]
                        angles += ends
                        axes.plot([place] * 2, ends, color=colour, linewidth=1.4)
            names = [f"{row['name']}\n{row['tokens']:,}" for row in rows]
            axes.set_xticks(
                range(len(rows)), names, rotation=40, ha="right", fontsize=8, parse_math=False
            )
            axes.grid(axis="y")
        limit_angles(left, min(angles), max(angles))
        left.set_ylabel("similarity (axis uniform in angle)")
        left.set_xlabel("token class, and its tokens")
        right.set_xlabel("position in the sequence, and its tokens")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        label = f"Dot plots: similarity of {layer} and {contrast} by token class and position."
        return as_svg(figure, "explanation-tokens", label)


def ablations_svg(record: Record, words: Callable[[Record], str]) -> str:
    """Draw the perplexity of every ablation of both layers.

    Args:
        record: A saved record of kind `explanation`.
        words: What an ablation is called.
    """
    layer, contrast = _names(record)
    names = list(dict.fromkeys(row["ablation"] for row in record["ablations"]))[::-1]
    by = {(row["layer"], row["ablation"]): row for row in record["ablations"]}
    with plain_style():
        figure, (axes,) = _figure(
            record, "perplexity without a part", height=1.9 + 0.42 * len(names)
        )
        for number, label, colour, shift in (
            ("layer", layer, _LAYER, 0.13),
            ("contrast", contrast, _CONTRAST, -0.13),
        ):
            labelled = False
            for place, name in enumerate(names):
                row = by.get((record["settings"][number], name))
                if row is None:
                    continue
                where = place + shift
                axes.plot(row["interval"], [where] * 2, color=colour, linewidth=1.6)
                axes.plot(
                    row["perplexity_ratio"],
                    where,
                    "o",
                    color=colour,
                    markersize=5,
                    label=None if labelled else label,
                )
                labelled = True
        axes.axvline(1, color=LIGHT["muted"], linewidth=0.8)
        axes.set_yticks(
            range(len(names)), [words({"ablation": name}) for name in names], parse_math=False
        )
        largest = max(row["perplexity_ratio"] for row in record["ablations"])
        if largest > 5:
            axes.set_xscale("log")
        axes.set_xlabel("perplexity, relative to the model as it is")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=2)
        label = f"Dot plot: perplexity ratio of each ablation of {layer} and {contrast}."
        return as_svg(figure, "explanation-ablations", label)
