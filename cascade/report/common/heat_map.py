"""Heat maps as SVG: signed distances in units of a limit, by layer and column."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from cascade.report.common.html import escaped
from cascade.report.common.svg import LIGHT

#: Pixels: width and height of a cell, the column of layer names, and the legend's scale.
_WIDTH, _HEIGHT, _NAMES, _SCALE = 30, 17, 74, 384
#: The scale of the map ends at this multiple of the limit, and is linear below its inverse.
_MOST = 100.0
_DECADES = 2 * math.log10(_MOST)
#: Opacities of a negligible difference, of one just within its limit, and of one just beyond. The
#: step between the last two makes the limit visible.
_LEAST_SHADE, _WITHIN, _BEYOND = 0.05, 0.3, 0.55


@dataclass(frozen=True)
class HeatCell:
    """One cell of a map.

    Attributes:
        layer: The name of its row.
        column: The name of its column.
        distance: The signed distance in units of the limit; None without a value.
        verdict: "PASS", "FAIL" or "INCONCLUSIVE".
        tooltip: Its numbers in words.
    """

    layer: str
    column: str
    distance: float | None
    verdict: str
    tooltip: str


@dataclass(frozen=True)
class HeatMap:
    """A map of layers by columns.

    The colour shows the side, its depth the logarithm of the distance in units of the limit. A cell
    beyond the limit has a frame and a sign, so nothing depends on colour alone. A cell without a
    value is hatched. Every cell shows its numbers in a tooltip.

    Attributes:
        name: The id of the element.
        label: What the map shows, for screen readers.
        cells: The cells. Of cells in the same place, the last one is drawn on top.
        layers: The names of the rows, from top to bottom.
        columns: The names of the columns, from left to right.
        marked: Layers with a mark.
        origin: What the distances are from, e.g. "the baseline".
        holes: Why a cell has no value.
    """

    name: str
    label: str
    cells: Sequence[HeatCell]
    layers: Sequence[str]
    columns: Sequence[str]
    marked: Collection[str]
    origin: str
    holes: str

    def svg(self) -> str:
        """Return the map as one `<svg>` element, which is identical for equal maps."""
        top = 14 + round(5.4 * max(map(len, self.columns)))
        width = max(_NAMES + _WIDTH * len(self.columns) + 56, _SCALE + 36)
        bottom = top + _HEIGHT * len(self.layers)
        has_holes = any(cell.distance is None for cell in self.cells)
        height = bottom + 74 + 24 * has_holes
        parts = [
            f'<svg id="{self.name}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escaped(self.label)}" '
            # Below this width the names are illegible, so the page scrolls instead.
            f'style="max-width: {width}px; min-width: {0.8 * width:g}px" font-size="11" '
            'xmlns="http://www.w3.org/2000/svg">\n',
            _hatch(self.name),
            *_column_names(self.columns, top),
            *_layer_names(self.layers, self.marked, top),
        ]
        rows = {layer: row for row, layer in enumerate(self.layers)}
        columns = {name: column for column, name in enumerate(self.columns)}
        for cell in self.cells:
            x, y = _NAMES + _WIDTH * columns[cell.column], top + _HEIGHT * rows[cell.layer]
            parts.append(_square(cell, x, y, self.name))
        parts += _legend(bottom + 30, self.name, self.origin)
        if has_holes:
            parts.append(_hole(bottom + 30, self.name, self.holes))
        return "".join([*parts, "\n</svg>\n"])


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


def _layer_names(layers: Sequence[str], marked: Collection[str], top: float) -> Iterator[str]:
    for row, layer in enumerate(layers):
        ink, weight, mark = LIGHT["muted"], 400, ""
        if layer in marked:
            ink, weight, mark = LIGHT["active"], 700, "▸ "
        yield (
            f'<text x="{_NAMES - 8}" y="{top + _HEIGHT * row + 12.5}" text-anchor="end" '
            f'fill="{ink}" font-weight="{weight}">{mark}{escaped(layer)}</text>\n'
        )


def _square(cell: HeatCell, x: float, y: float, name: str) -> str:
    found = cell.distance
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
        f"<title>{escaped(cell.tooltip)}</title></rect>"
    )
    if found is None or cell.verdict != "FAIL":
        return f"{square}\n"
    ink = LIGHT["paper" if opacity > 0.75 else "ink"]
    sign = "+" if found > 0 else "&#8722;"
    return (
        f'{square}<text x="{x + _WIDTH / 2}" y="{y + 12.5}" text-anchor="middle" font-weight="700" '
        f'fill="{ink}" pointer-events="none">{sign}</text>\n'
    )


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


def _legend(y: float, name: str, origin: str) -> Iterator[str]:
    """Draw the scale: below the origin to the left, above it to the right."""
    middle = 18 + _SCALE / 2
    muted = f'fill="{LIGHT["muted"]}" text-anchor="middle"'
    yield (
        f'<text x="{middle}" y="{y - 8}" {muted}>below {escaped(origin)}&#160;&#160;&#160;←'
        "&#160;&#160;within limits&#160;&#160;→&#160;&#160;&#160;above "
        f"{escaped(origin)}</text>\n"
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


def _hole(y: float, name: str, holes: str) -> str:
    """Draw what a hatched cell means."""
    return (
        f'\n<rect x="18" y="{y + 38}" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" '
        f'fill="url(#{name}-none)" stroke="{LIGHT["ink"]}" stroke-width="1.4"/>'
        f'<text x="{18 + _WIDTH + 4}" y="{y + 50}" fill="{LIGHT["muted"]}">{escaped(holes)}</text>'
    )
