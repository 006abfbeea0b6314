"""Figures of a comparison of corpora: profiles, their differences, transferred thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cascade.report.common.axes import angle, label_layers, layer_positions, limit_angles
from cascade.report.common.records import is_normed
from cascade.report.common.svg import LIGHT, as_svg, new_figure, plain_style
from cascade.studies.comparisons.corpus_records import (
    ComparedCorpus,
    CorpusComparison,
    ThresholdTransfer,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colour and marker of each corpus, in order.
_STYLES = (
    ("rule1", "o"),
    ("rule3", "s"),
    ("rule5", "^"),
    ("rule4", "v"),
    ("rule2", "p"),
    ("rule6", "P"),
    ("ink", "X"),
    ("control", "h"),
)
#: The share of a layer's width that the markers of all corpora take.
_DODGE = 0.5
#: If a difference exceeds this multiple of the margin, the axis is logarithmic beyond the margin.
_FAR = 12.0
_MAX_NAME = 40
_PANELS_PER_ROW = 3


def styles_of(record: CorpusComparison) -> dict[str, tuple[str, str]]:
    """Return every corpus's colour and marker, by its label."""
    labels = [corpus.label for corpus in record.corpora]
    return {
        label: (LIGHT[colour], marker)
        for label, (colour, marker) in zip(labels, _STYLES, strict=False)
    }


def corpora_profiles_svg(record: CorpusComparison) -> str:
    """Draw the corpora's means per layer, and below them the differences to the first corpus.

    Args:
        record: The comparison.

    Returns:
        One `<svg>` element, the same bytes for the same record.
    """
    with plain_style():
        figure = new_figure((10, 8))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1))
        for axes in (upper, lower):
            axes.grid(axis="y", linewidth=0.8)
        _draw_means(upper, record)
        _draw_differences(lower, record)
        label_layers(lower, record.layers)
        upper.set_ylabel("mean similarity\n(axis uniform in angle)")
        lower.set_ylabel(f"difference to {record.corpora[0].label}")
        lower.set_xlabel("decoder layer")
        _draw_legend(figure, (upper, lower))
        label = (
            "Two charts: mean similarity per layer in "
            f"{', '.join(_named(corpus) for corpus in record.corpora)}, and the differences to "
            "the first."
        )
        return as_svg(figure, "corpora-profiles", label)


def _draw_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Add one legend entry per style, sorted by name."""
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = sorted(handles)
    legend = figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=2
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a name would start a formula


def _named(corpus: ComparedCorpus) -> str:
    """Return `A: name` in ASCII, which every font has."""
    name = str(corpus.name)
    short = name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 3]}..."
    return f"{corpus.label}: {short}".encode("ascii", "replace").decode()


def _offset(number: int, count: int, width: float = _DODGE) -> float:
    """Return the horizontal offset of a corpus from its layer, so that markers do not overlap."""
    return width * ((number + 0.5) / count - 0.5)


def _draw_means(axes: Axes, record: CorpusComparison) -> None:
    """Draw every corpus's means with intervals; the row after the final norm is set apart."""
    rows, styles = record.layers, styles_of(record)
    places = layer_positions(rows)
    drawn = []
    for number, corpus in enumerate(record.corpora):
        colour, marker = styles[corpus.label]
        # A tiny offset, because separated lines would look like different means.
        offset = _offset(number, len(styles), _DODGE / 3)
        means = [row.means[number] for row in rows]
        drawn += [end for mean in means for end in mean.interval]
        axes.vlines(
            [place + offset for place in places],
            [angle(mean.interval[1]) for mean in means],
            [angle(mean.interval[0]) for mean in means],
            color=colour,
            linewidth=1.4,
        )
        for normed in (False, True):
            some = [
                (place + offset, angle(mean.mean))
                for place, mean, row in zip(places, means, rows, strict=True)
                if is_normed(row) is normed
            ]
            axes.plot(
                [place for place, _ in some],
                [mean for _, mean in some],
                color=colour,
                linewidth=0.8,
                linestyle="none" if normed else "-",
                marker=marker,
                markersize=4,
                label="_" if normed else _named(corpus),
            )
    limit_angles(axes, angle(max(drawn)), angle(min(drawn)))


def _draw_differences(axes: Axes, record: CorpusComparison) -> None:
    """Draw every other corpus's differences to the first, filled where the layer moves."""
    margin, styles = record.settings.margin, styles_of(record)
    places = layer_positions(record.layers)
    axes.axhspan(
        -margin, margin, color=LIGHT["stable"], linewidth=0, zorder=0, label=f"margin: {margin:g}"
    )
    axes.axhline(0, color=LIGHT["muted"], linewidth=0.8)
    ends = [margin]
    for number, pair in enumerate(record.differences):
        colour, marker = styles[pair.corpus]
        offset = _offset(number, len(record.differences))
        for place, row in zip(places, pair.rows, strict=True):
            low, high = row.interval
            axes.vlines(place + offset, low, high, color=colour, linewidth=1.4)
            axes.plot(
                place + offset,
                row.difference,
                color=colour,
                marker=marker,
                markersize=5.5,
                markerfacecolor=colour if row.verdict == "moves" else LIGHT["paper"],
                linestyle="none",
            )
            ends += map(abs, row.interval)
    _scale_differences(axes, margin, max(ends))


def _scale_differences(axes: Axes, margin: float, most: float) -> None:
    """Make the axis linear, or linear only within the margin if differences are far beyond it."""
    if most <= _FAR * margin:
        return
    axes.set_yscale("symlog", linthresh=margin, linscale=1.0)
    axes.set_ylim(-1.3 * most, 1.3 * most)
    sizes = [margin]
    while sizes[-1] * 3 <= 1.3 * most:
        sizes.append(sizes[-1] * 3)
    ticks = [0.0, *(sign * size for size in sizes for sign in (-1, 1))]
    axes.set_yticks(ticks, [f"{tick:+.2g}" if tick else "0" for tick in ticks])
    axes.minorticks_off()


# --- Thresholds ------------------------------------------------------------------------------


def corpora_thresholds_svg(record: CorpusComparison) -> str:
    """Draw, for every corpus, the hard ratio that the others' thresholds realize on it.

    Args:
        record: The comparison.

    Returns:
        One `<svg>` element, the same bytes for the same record.
    """
    with plain_style():
        corpora = record.corpora
        columns = min(_PANELS_PER_ROW, len(corpora))
        lines = math.ceil(len(corpora) / columns)
        figure = new_figure((10, 1.0 + 3.2 * lines))
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, corpus in _panels(grid, corpora):
            _draw_transfers(axes, record, corpus)
        for line in grid:
            line[0].set_ylabel("realized - target, in percentage points")
        _draw_legend(figure, [axes for line in grid for axes in line])
        label = (
            "One chart per corpus: the hard ratio under the thresholds of the other corpora, minus "
            "the target."
        )
        return as_svg(figure, "corpora-thresholds", label)


def _panels(
    grid: Iterable[Iterable[Axes]], corpora: Sequence[ComparedCorpus]
) -> Iterator[tuple[Axes, ComparedCorpus]]:
    """Yield a panel for every corpus and remove unused panels."""
    flat = [axes for line in grid for axes in line]
    yield from zip(flat, corpora, strict=False)
    for axes in flat[len(corpora) :]:
        axes.remove()


def _draw_transfers(axes: Axes, record: CorpusComparison, corpus: ComparedCorpus) -> None:
    """Draw the errors of other corpora's thresholds on one corpus, filled if not transferring."""
    settings, styles = record.settings, styles_of(record)
    axes.set_title(f"on {_named(corpus)}", loc="left", fontsize=10, parse_math=False)
    axes.set_xlabel("target hard ratio")
    axes.grid(axis="y", linewidth=0.8)
    within = 100 * settings.tolerance
    label = f"tolerance: {within:g} percentage points"
    axes.axhspan(-within, within, color=LIGHT["stable"], linewidth=0, zorder=0, label=label)
    axes.axhline(0, color=LIGHT["muted"], linewidth=0.8)
    others = [other for other in record.corpora if other.label != corpus.label]
    for number, other in enumerate(others):
        colour, marker = styles[other.label]
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 5.5,
            "linestyle": "none",
        }
        label = f"thresholds of {_named(other)}"
        axes.plot([], [], markerfacecolor=LIGHT["paper"], label=label, **style)
        for place, row in enumerate(_rows_between(record, other, corpus)):
            x = place + _offset(number, len(others))
            low, high = (100 * end for end in row.off_interval)
            axes.vlines(x, low, high, color=colour, linewidth=1.4)
            axes.plot(
                x,
                100 * row.off,
                markerfacecolor=colour if row.verdict == "does not" else LIGHT["paper"],
                **style,
            )
    ratios = settings.hard_ratios
    axes.set_xticks(range(len(ratios)), [f"{100 * ratio:g} %" for ratio in ratios])
    axes.set_xlim(-0.6, len(ratios) - 0.4)


def _rows_between(
    record: CorpusComparison, one: ComparedCorpus, other: ComparedCorpus
) -> list[ThresholdTransfer]:
    """Return the transfers from one corpus to another, ordered by hard ratio."""
    return [
        row
        for row in record.thresholds.rows
        if (row.fitted_on, row.applied_to) == (one.label, other.label)
    ]
