"""Comparisons as SVG: a map of every cell, and the new profile drawn over the baseline's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cascade.gate.records import CellRow, ComparisonRecord, MeanRow
from cascade.report.common.axes import angle, label_layers, layer_positions, limit_angles
from cascade.report.common.heat_map import HeatCell, HeatMap
from cascade.report.common.records import is_normed
from cascade.report.common.svg import LIGHT, as_svg, new_figure, plain_style
from cascade.report.gate.wording import cell_name, cell_numbers, distance, has_intervals, meaning

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# --- The map ---------------------------------------------------------------------------------


def drift_map_svg(record: ComparisonRecord, name: str) -> str:
    """Draw a map of layers by statistics, with the signed distance of each cell from its baseline.

    Args:
        record: A saved record of kind `comparison`, with cells.
        name: The id of the element.

    Returns:
        One `<svg>` element, which is identical for equal records.
    """
    # Of cells in the same place, the worst is drawn last.
    cells = sorted(record.cells, key=_badness)
    named = _named(record)
    return HeatMap(
        name=name,
        label="Heat map: difference of every layer and statistic, in units of its limit",
        cells=[
            HeatCell(
                cell.layer,
                cell_name(record, cell),
                distance(cell),
                cell.verdict,
                _tooltip(record, cell),
            )
            for cell in cells
        ],
        layers=list(dict.fromkeys(cell.layer for cell in record.cells)),
        columns=list(dict.fromkeys(cell_name(record, cell) for cell in record.cells)),
        marked=[] if named is None else [named],
        origin="the baseline",
        holes="no value on one side (missing or NaN)",
    ).svg()


def _badness(cell: CellRow) -> tuple[int, float]:
    found = distance(cell)
    rank = ("PASS", "INCONCLUSIVE", "FAIL").index(cell.verdict)
    return rank, math.inf if found is None else abs(found)


def _named(record: ComparisonRecord) -> str | None:
    return None if record.attribution is None else record.attribution.layer


def _tooltip(record: ComparisonRecord, cell: CellRow) -> str:
    found = distance(cell)
    kind = "margin" if has_intervals(record) else "tolerance"
    far = "no value on one side" if found is None else f"{found:+.3g} x its {kind}"
    texts = [f"{name} {text}" for name, text in cell_numbers(record, cell).items()]
    if cell.sequence is not None:
        texts.append(f"sequence {cell.sequence:,}")
    what = meaning(cell_name(record, cell))
    return f"layer {cell.layer}, {what}: {far} ({cell.verdict}); {', '.join(texts)}"


# --- The profiles ----------------------------------------------------------------------------


def profiles_svg(record: ComparisonRecord, name: str) -> str:
    """Draw the baseline's and the new mean similarities, and below them the differences and limits.

    Args:
        record: A saved record of kind `comparison`, with a profile.
        name: The id of the element.

    Returns:
        One `<svg>` element, which is identical for equal records.
    """
    with plain_style():
        rows = record.profile
        figure = new_figure((10, 6))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for axes in (upper, lower):
            axes.grid(axis="y", linewidth=0.8)
            _mark_layer(axes, record)
            _mark_holes(axes, rows)
        _draw_means(upper, rows)
        _draw_differences(lower, record)
        label_layers(lower, rows)
        upper.set_ylabel("mean similarity\n(axis uniform in angle)")
        limit = "margin" if has_intervals(record) else "tolerance"
        lower.set_ylabel(f"difference and {limit}")
        lower.set_xlabel("decoder layer")
        handles = {
            label: handle
            for axes in (upper, lower)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
        label = (
            "Two charts: mean similarity per layer of the baseline and the new profile, and their "
        )
        label += "difference."
        return as_svg(figure, name, label)


def _mark_layer(axes: Axes, record: ComparisonRecord) -> None:
    named = _named(record)
    for place, row in zip(layer_positions(record.profile), record.profile, strict=True):
        if row.layer == named:
            axes.axvspan(
                place - 0.5,
                place + 0.5,
                color=LIGHT["tint"],
                linewidth=0,
                zorder=0,
                label=f"layer {named}, the likely cause",
            )


def _mark_holes(axes: Axes, rows: Sequence[MeanRow]) -> None:
    for place, row in zip(layer_positions(rows), rows, strict=True):
        if row.expected is None or row.obtained is None:
            axes.axvspan(
                place - 0.5,
                place + 0.5,
                facecolor="none",
                edgecolor=LIGHT["muted"],
                hatch="////",
                linewidth=0,
                label="no value on one side",
            )


def _draw_means(axes: Axes, rows: Sequence[MeanRow]) -> None:
    """Draw both profiles; the row after the final norm is not joined to the lines."""
    places = layer_positions(rows)
    expected, obtained = [row.expected for row in rows], [row.obtained for row in rows]
    for means, colour, label, width, size in (
        (expected, "control", "baseline", 4.0, 7.0),
        (obtained, "mean", "new", 1.3, 3.5),
    ):
        angles = [math.nan if mean is None else angle(mean) for mean in means]
        for normed in (False, True):
            drawn = [
                (place, value)
                for place, value, row in zip(places, angles, rows, strict=True)
                if is_normed(row) is normed
            ]
            axes.plot(
                [place for place, _ in drawn],
                [value for _, value in drawn],
                color=LIGHT[colour],
                linewidth=width,
                linestyle="none" if normed else "-",
                marker="D" if normed else "o",
                markersize=size,
                label="_" if normed else label,
            )
    known = [angle(mean) for mean in (*expected, *obtained) if mean is not None]
    limit_angles(axes, min(known, default=0.0), max(known, default=math.pi))


def _draw_differences(axes: Axes, record: ComparisonRecord) -> None:
    """Draw each layer's difference of the mean, its limit, and its interval, if any."""
    cells = {
        cell.layer: (cell, cell.difference)
        for cell in record.cells
        if cell_name(record, cell) == "mean" and cell.difference is not None
    }
    found = [
        (place, *cells[row.layer])
        for place, row in zip(layer_positions(record.profile), record.profile, strict=True)
        if row.layer in cells
    ]
    kind = "margin" if has_intervals(record) else "tolerance"
    for index, (place, cell, difference) in enumerate(found):
        axes.bar(
            place,
            2 * cell.limit,
            bottom=-cell.limit,
            width=1.02,  # neighbours overlap, so that no seam is visible
            color=LIGHT["stable"],
            zorder=0.5,
            label="_" if index else f"within the {kind}",
        )
        colour = LIGHT["active" if difference > 0 else "mean"]
        if cell.interval is not None:
            low, high = cell.interval
            axes.vlines(place, low, high, color=colour, linewidth=1.6)
            axes.plot(place, difference, color=colour, marker="o", markersize=4)
        else:
            axes.bar(place, difference, width=0.6, color=colour)
    axes.axhline(0, color=LIGHT["muted"], linewidth=0.8)
    if found and kind == "tolerance":
        limits = [cell.limit for _, cell, _ in found]
        _scale_differences(axes, limits, [difference for _, _, difference in found])


def _scale_differences(axes: Axes, limits: Sequence[float], differences: Sequence[float]) -> None:
    """Make the axis linear within the tolerance and logarithmic beyond it."""
    least = min(limits) or 1e-9
    most = max(10 * least, *map(abs, differences))
    axes.set_yscale("symlog", linthresh=least)
    axes.set_ylim(-3 * most, 3 * most)
    low, high = math.ceil(math.log10(least)), math.floor(math.log10(3 * most))
    powers = range(low, high + 1, max(1, math.ceil((high - low + 1) / 3)))
    sizes = [least, *(10.0**power for power in powers if 10.0**power > 3 * least)]
    ticks = [0.0, *(sign * size for size in sizes for sign in (-1, 1))]
    axes.set_yticks(ticks, [f"{tick:+.0e}" if tick else "0" for tick in ticks])
    axes.minorticks_off()
