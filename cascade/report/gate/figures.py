"""Comparisons as SVG: a map of every cell, and the new profile drawn over the baseline's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cascade.gate.records import CellRow, ComparisonRecord, MeanRow
from cascade.report.common.axes import angle, label_layers, layer_positions, limit_angles
from cascade.report.common.html import escaped
from cascade.report.common.records import is_normed
from cascade.report.common.svg import LIGHT, as_svg, new_figure, plain_style
from cascade.report.gate.wording import cell_name, cell_numbers, distance, has_intervals, meaning

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Pixels: width and height of a cell, the column of layer names, and the legend's scale.
_WIDTH, _HEIGHT, _NAMES, _SCALE = 30, 17, 74, 384
#: The scale of the map ends at this multiple of the limit, and is linear below its inverse.
_MOST = 100.0
_DECADES = 2 * math.log10(_MOST)
#: Opacities of a negligible difference, of one just within its limit, and of one just beyond. The
#: step between the last two makes the limit visible.
_LEAST_SHADE, _WITHIN, _BEYOND = 0.05, 0.3, 0.55


# --- The map ---------------------------------------------------------------------------------


def drift_map_svg(record: ComparisonRecord, name: str) -> str:
    """Draw a map of layers by statistics, with the signed distance of each cell from its baseline.

    The colour shows the side, its depth the logarithm of the distance in units of the limit. A cell
    beyond the limit has a frame and a sign, so nothing depends on colour alone. A cell without a
    value is hatched. Every cell shows its numbers in a tooltip.

    Args:
        record: A saved record of kind `comparison`, with cells.
        name: The id of the element.

    Returns:
        One `<svg>` element, which is identical for equal records.
    """
    # Of cells in the same place, the worst is drawn last.
    cells = sorted(record.cells, key=_badness)
    layers = list(dict.fromkeys(cell.layer for cell in record.cells))
    columns = list(dict.fromkeys(cell_name(record, cell) for cell in record.cells))
    top = 14 + round(5.4 * max(map(len, columns)))
    width = max(_NAMES + _WIDTH * len(columns) + 56, _SCALE + 36)
    bottom = top + _HEIGHT * len(layers)
    has_holes = any(distance(cell) is None for cell in cells)
    height = bottom + 74 + 24 * has_holes
    parts = [
        f'<svg id="{name}" viewBox="0 0 {width} {height}" role="img" aria-label="Heat map: '
        'difference of every layer and statistic, in units of its limit" '
        # Below this width the names are illegible, so the page scrolls instead.
        f'style="max-width: {width}px; min-width: {0.8 * width:g}px" font-size="11" '
        'xmlns="http://www.w3.org/2000/svg">\n',
        _hatch(name),
        *_column_names(columns, top),
        *_layer_names(record, layers, top),
    ]
    places = {layer: row for row, layer in enumerate(layers)}
    for cell in cells:
        x = _NAMES + _WIDTH * columns.index(cell_name(record, cell))
        parts.append(_square(record, cell, x, top + _HEIGHT * places[cell.layer], name))
    parts += _legend(bottom + 30, name, has_holes=has_holes)
    return "".join([*parts, "</svg>\n"])


def _badness(cell: CellRow) -> tuple[int, float]:
    found = distance(cell)
    rank = ("PASS", "INCONCLUSIVE", "FAIL").index(cell.verdict)
    return rank, math.inf if found is None else abs(found)


def _hatch(name: str) -> str:
    return (
        f'<defs><pattern id="{name}-none" width="5" height="5" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><rect width="5" height="5" fill="{LIGHT["paper"]}"/>'
        f'<line x1="0" y1="0" x2="0" y2="5" stroke="{LIGHT["ink"]}" stroke-width="1.6"/>'
        "</pattern></defs>\n"
    )


def _column_names(columns: Sequence[str], top: float) -> Iterator[str]:
    for column, text in enumerate(columns):
        x, y = _NAMES + _WIDTH * (column + 0.5) + 2, top - 6
        yield (
            f'<text x="{x}" y="{y}" fill="{LIGHT["muted"]}" transform="rotate(-55 {x} {y})">'
            f"{escaped(text)}</text>\n"
        )


def _layer_names(record: ComparisonRecord, layers: Sequence[str], top: float) -> Iterator[str]:
    named = _named(record)
    for row, layer in enumerate(layers):
        ink, weight, mark = LIGHT["muted"], 400, ""
        if layer == named:
            ink, weight, mark = LIGHT["active"], 700, "▸ "
        yield (
            f'<text x="{_NAMES - 8}" y="{top + _HEIGHT * row + 12.5}" text-anchor="end" '
            f'fill="{ink}" font-weight="{weight}">{mark}{escaped(layer)}</text>\n'
        )


def _named(record: ComparisonRecord) -> str | None:
    return None if record.attribution is None else record.attribution.layer


def _square(record: ComparisonRecord, cell: CellRow, x: float, y: float, name: str) -> str:
    found = distance(cell)
    fill, opacity = f"url(#{name}-none)", 1.0
    if found is not None:
        fill, opacity = LIGHT["active" if found > 0 else "mean"], shade(abs(found))
    frame, thick, dashes = {
        "FAIL": (LIGHT["ink"], 1.4, ""),
        "INCONCLUSIVE": (LIGHT["muted"], 1.0, ' stroke-dasharray="3 2"'),
    }.get(cell.verdict, (LIGHT["grid"], 1.0, ""))
    square = (
        f'<rect x="{x + 1}" y="{y + 1}" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" fill="{fill}" '
        f'fill-opacity="{opacity:.3f}" stroke="{frame}" stroke-width="{thick}"{dashes}>'
        f"<title>{escaped(_tooltip(record, cell))}</title></rect>"
    )
    if found is None or cell.verdict != "FAIL":
        return f"{square}\n"
    ink = LIGHT["paper" if opacity > 0.75 else "ink"]
    sign = "+" if found > 0 else "&#8722;"
    return (
        f'{square}<text x="{x + _WIDTH / 2}" y="{y + 12.5}" text-anchor="middle" font-weight="700" '
        f'fill="{ink}" pointer-events="none">{sign}</text>\n'
    )


def _tooltip(record: ComparisonRecord, cell: CellRow) -> str:
    found = distance(cell)
    kind = "margin" if has_intervals(record) else "tolerance"
    far = "no value on one side" if found is None else f"{found:+.3g} x its {kind}"
    texts = [f"{name} {text}" for name, text in cell_numbers(record, cell).items()]
    if cell.sequence is not None:
        texts.append(f"sequence {cell.sequence:,}")
    what = meaning(cell_name(record, cell))
    return f"layer {cell.layer}, {what}: {far} ({cell.verdict}); {', '.join(texts)}"


def shade(size: float) -> float:
    """Return the opacity of a cell by its distance in units of its limit, with a step at 1.

    Args:
        size: The distance, from 0 to infinity.
    """
    if size <= 1 / _MOST:
        return _LEAST_SHADE * size * _MOST
    along = min(1.0, abs(math.log10(min(size, _MOST))) / math.log10(_MOST))
    if size <= 1:
        return _WITHIN + (_LEAST_SHADE - _WITHIN) * along
    return _BEYOND + (1 - _BEYOND) * along


def _along(size: float) -> float:
    """Return the position of a signed distance on the legend's scale, from -1 to 1."""
    if not size:
        return 0.0
    return math.copysign(math.log10(abs(size) * _MOST) / _DECADES, size)


def _legend(y: float, name: str, *, has_holes: bool) -> Iterator[str]:
    """Draw the scale: below the baseline to the left, above it to the right."""
    middle = 18 + _SCALE / 2
    muted = f'fill="{LIGHT["muted"]}" text-anchor="middle"'
    yield (
        f'<text x="{middle}" y="{y - 8}" {muted}>below the baseline&#160;&#160;&#160;←&#160;&#160;'
        "within limits&#160;&#160;→&#160;&#160;&#160;above the baseline</text>\n"
    )
    steps = 2 * 24
    for step in range(-steps // 2, steps // 2):
        place = (step + 0.5) / (steps / 2)
        size = 10 ** (abs(place) * _DECADES) / _MOST
        fill = LIGHT["active" if place > 0 else "mean"]
        yield (
            f'<rect x="{middle + step * _SCALE / steps:g}" y="{y}" width="{_SCALE / steps:g}" '
            f'height="12" fill="{fill}" fill-opacity="{shade(size):.3f}"/>'
        )
    for size in (-100, -10, -1, -0.1, 0, 0.1, 1, 10, 100):
        x = middle + _along(size) * _SCALE / 2
        is_limit = abs(size) == 1
        ink = LIGHT["ink" if is_limit else "muted"]
        shown = f"{size:+g}" if size else "0"
        yield (
            f'\n<line x1="{x:g}" x2="{x:g}" y1="{y - 3 * is_limit}" y2="{y + 15}" stroke="{ink}" '
            f'stroke-width="{2 if is_limit else 1}"/><text x="{x:g}" y="{y + 27}" '
            f'text-anchor="middle" fill="{ink}" font-weight="{700 if is_limit else 400}">'
            f"{shown}{' limit' * is_limit}</text>"
        )
    if has_holes:
        yield (
            f'\n<rect x="18" y="{y + 38}" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" '
            f'fill="url(#{name}-none)" stroke="{LIGHT["ink"]}" stroke-width="1.4"/>'
            f'<text x="{18 + _WIDTH + 4}" y="{y + 50}" fill="{LIGHT["muted"]}">no value on one '
            "side (missing or NaN)</text>"
        )
    yield "\n"


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
