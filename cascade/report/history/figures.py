"""A history as SVG: maps of layers by versions, and the cumulative change of the worst layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from cascade.gate.history.records import HistoryVersion, LayerChange, VersionSeries
from cascade.report.common.heat_map import HeatCell, HeatMap
from cascade.report.common.svg import LIGHT, as_svg, new_figure, plain_style
from cascade.report.history.wording import differences, number, units, version_name, why_not

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The number of layers that have a line of their own.
_LINES = 6
#: The largest change, in limits, that is drawn on a linear axis.
_LINEAR = 50.0
#: The largest number of version names below the chart.
_TICKS = 24

Against = Literal["first", "before"]


# --- Maps ------------------------------------------------------------------------------------


def history_map_svg(series: VersionSeries, against: Against, name: str) -> str | None:
    """Draw a map of layers by versions, with the signed change of each mean in units of its limit.

    Args:
        series: A series of a saved record of kind `history`.
        against: Whether changes are from the first comparable version or from the one before.
        name: The id of the element.

    Returns:
        One `<svg>` element; None where no version is comparable.
    """
    layers = list(
        dict.fromkeys(
            change.layer
            for version in series.versions
            for change in _changes(version, against).values()
        )
    )
    if not layers:
        return None
    columns = _column_names(series)
    cells = [
        _cell(series, place, layer, against, columns[place])
        for place in range(len(series.versions))
        for layer in layers
    ]
    slow = [drift.layer for drift in series.drifts if drift.slow]
    origin = {"first": "the first version", "before": "the version before"}[against]
    return HeatMap(
        name=name,
        label=f"Heat map: change of every layer in every version from {origin}, in units of its "
        "limit",
        cells=cells,
        layers=layers,
        columns=columns,
        marked=slow,
        origin=origin,
        holes="not comparable, not read, or nothing to compare with",
    ).svg()


def _changes(version: HistoryVersion, against: Against) -> dict[str, LayerChange]:
    found = version.first if against == "first" else version.before
    return {} if found is None else {change.layer: change for change in found.layers}


def _column_names(series: VersionSeries) -> list[str]:
    """Return names of versions that differ: the short hash, or the end of a long path."""
    names = [version.name for version in series.versions]
    short = [name if len(name) <= 16 else f"...{name[-13:]}" for name in names]
    if len(set(short)) < len(short):
        return [f"{place + 1}: {name}" for place, name in enumerate(short)]
    return short


def _cell(series: VersionSeries, place: int, layer: str, against: Against, column: str) -> HeatCell:
    version = series.versions[place]
    change = _changes(version, against).get(layer)
    where = f"layer {layer}, {version_name(version)}"
    if change is None:
        return HeatCell(layer, column, None, "PASS", f"{where}: {_no_value(version, against)}")
    found = version.first if against == "first" else version.before
    unit = "limits" if found is None else units(found)
    texts = [f"{where}: {number(change.standardized)} {unit} ({change.verdict})"]
    if change.change is not None:
        texts.append(f"the mean moved by {change.change:+.1e}")
    if change.verdict != "PASS":
        texts.append(f"worst statistic {change.statistic}")
    texts += differences(series, place)
    return HeatCell(layer, column, change.standardized, change.verdict, "; ".join(texts))


def _no_value(version: HistoryVersion, against: Against) -> str:
    if version.error is not None:
        return f"not read: {version.error}"
    found = version.first if against == "first" else version.before
    if found is None:
        return "the first of its kind" if against == "first" else "the first version"
    return f"not comparable: {why_not(found)}" if found.method is None else "no value"


# --- The chart -------------------------------------------------------------------------------


def cumulative_svg(series: VersionSeries, name: str) -> str | None:
    """Draw the cumulative change of the layers that moved most, over the versions.

    Args:
        series: A series of a saved record of kind `history`.
        name: The id of the element.

    Returns:
        One `<svg>` element; None where fewer than two versions can be drawn.
    """
    places = _drawn_places(series)
    if len(places) < 2 or not series.drifts:
        return None
    ranked = sorted(series.drifts, key=lambda drift: -abs(drift.standardized or 0.0))
    layers = [drift.layer for drift in ranked[:_LINES]]
    with plain_style():
        figure = new_figure((10, 4))
        axes = figure.subplots()
        axes.grid(axis="y", linewidth=0.8)
        axes.axhspan(-1, 1, color=LIGHT["stable"], linewidth=0, zorder=0, label="within the limit")
        axes.axhline(0, color=LIGHT["muted"], linewidth=0.8)
        for number_, layer in enumerate(layers, start=1):
            axes.plot(
                places,
                [_value(series, place, layer) for place in places],
                color=LIGHT[f"rule{number_}"],
                marker="os^Dv*"[number_ - 1],
                markersize=4,
                linewidth=1.4,
                label=f"layer {layer}",
            )
        _scale(axes, series, places, layers)
        _name_versions(axes, series, places)
        last = series.versions[places[-1]]
        unit = "limits" if last.first is None else units(last.first)
        axes.set_ylabel(f"change since the first version\n({unit})")
        figure.legend(loc="outside lower center", ncols=min(7, len(layers) + 1))
        return as_svg(
            figure,
            name,
            f"Line chart: cumulative change of {len(layers)} layers over {len(places)} versions.",
        )


def _drawn_places(series: VersionSeries) -> list[int]:
    """Return the versions that are compared with what the last one is compared with."""
    if series.last is None or series.versions[series.last].first is None:
        return []
    found = [] if series.first is None else [series.first]
    for place, version in enumerate(series.versions):
        first = version.first
        if first is not None and first.method is not None and first.version == series.first:
            found.append(place)
    return found


def _value(series: VersionSeries, place: int, layer: str) -> float:
    if place == series.first:
        return 0.0
    change = _changes(series.versions[place], "first").get(layer)
    return math.nan if change is None or change.standardized is None else change.standardized


def _scale(axes: Axes, series: VersionSeries, places: list[int], layers: list[str]) -> None:
    """Make the axis linear, or logarithmic beyond the limit if values differ by far."""
    values = [_value(series, place, layer) for place in places for layer in layers]
    known = [value for value in values if math.isfinite(value)]
    low, high = min([-1.1, *known]), max([1.1, *known])
    if max(high, -low) > _LINEAR:
        axes.set_yscale("symlog", linthresh=1)
        powers = range(math.ceil(math.log10(max(high, -low))) + 1)
        ticks = [sign * 10.0**power for power in powers for sign in (-1, 1)]
        shown = [0.0, *(tick for tick in ticks if 1.5 * low <= tick <= 1.5 * high)]
        axes.set_yticks(shown, [f"{tick:+,.0f}" if tick else "0" for tick in shown])
        axes.minorticks_off()
        axes.set_ylim(1.5 * low, 1.5 * high)
    else:
        axes.set_ylim(1.1 * low, 1.1 * high)


def _name_versions(axes: Axes, series: VersionSeries, places: list[int]) -> None:
    names = _column_names(series)
    step = math.ceil(len(places) / _TICKS)
    shown = places[::-1][::step][::-1]
    axes.set_xticks(shown, [names[place] for place in shown], rotation=55, ha="right", fontsize=8)
    axes.set_xlim(places[0] - 0.5, places[-1] + 0.5)
