"""Comparisons as a page: the verdict, a map of every cell, the profiles, and the worst cells."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterator

from cascade.report.document import (
    html_document,
    html_figure,
    html_head,
    html_pairs,
    html_provenance,
    html_section,
    html_table,
)
from cascade.report.drawing import LIGHT, as_svg, plain_style
from cascade.report.drift import (
    STATISTICS,
    cell_rows,
    mismatch_pairs,
    sentences,
    worst_cells,
)
from cascade.report.reading import Record, check_record

_SECTIONS = ("verdict", "comparisons", "budgets", "missing", "regenerated", "unused")

#: Cells of the worst that the page lists.
_WORST = 50
#: Pixels: a cell of the map, and the column of layer names.
_CELL, _NAMES = 26, 74
#: Shades of the map: at which multiple of its limit a cell takes which opacity.
_SHADES = (
    (0.0, 0.0),
    (0.03, 0.12),
    (0.1, 0.22),
    (0.3, 0.34),
    (1.0, 0.5),
    (10.0, 0.72),
    (100.0, 1.0),
)


def report_page(record: Record) -> str:
    """Return a session as one self-contained HTML page.

    Args:
        record: A saved record of kind `report`.

    Raises:
        ValueError: The record is of another kind or schema, lacks a section, or holds NaN.
    """
    check_record(record, "report", _SECTIONS)
    sections = [
        html_head(
            "CASCADE gate",
            record["verdict"],
            f"{len(record['comparisons'])} compared, {len(record['budgets'])} held to budgets",
        )
    ]
    for number, comparison in enumerate(record["comparisons"]):
        sections += _comparison(comparison, number)
    sections += [_budgets(budget) for budget in record["budgets"]]
    sections += _leftovers(record)
    return html_document(f"CASCADE gate: {record['verdict']}", sections)


def _comparison(record: Record, number: int) -> Iterator[str]:
    pairs = [*mismatch_pairs(record), *sentences(record)]
    lead = (
        f'<p class="lead">{html.escape(record["verdict"])}: {html.escape(record["headline"])}</p>\n'
    )
    yield html_section(record["name"], lead + html_pairs(pairs))
    cells = worst_cells(record)
    if cells:
        header, rows = cell_rows(cells[:_WORST])
        shown = len(rows)
        caption = (
            f"The cells beyond their limits, the worst first: {shown:,} of {len(cells):,}"
            if shown < len(cells)
            else f"All {len(cells):,} cells beyond their limits, the worst first"
        )
        yield html_section("Worst cells", html_table(caption, header, rows, text_columns=2))
    if record["cells"]:
        yield html_section("Every cell", html_figure(_map(record), _map_caption(record)))
    if record["profile"]:
        figure = html_figure(_profiles(record, f"profiles-{number}"), _profile_caption(record))
        yield html_section("Profiles", figure)
    if record["provenance"]:
        yield html_provenance(record["provenance"])


# --- The map ---------------------------------------------------------------------------------


def _map(record: Record) -> str:
    """Draw layers by statistics; a cell's colour is its side, its depth how near to its limit."""
    cells = record["cells"]
    layers = list(dict.fromkeys(cell["layer"] for cell in cells))
    statistics = list(dict.fromkeys(cell["statistic"] for cell in cells))
    width = max(_NAMES + _CELL * len(statistics) + 10, 440)
    top = 104
    height = top + 16 * len(layers) + 64
    found = record["attribution"] or {"layer": None}
    parts = [
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="Standardized difference of every layer and statistic" '
        f'font-size="11" xmlns="http://www.w3.org/2000/svg">',
        "<defs><pattern id='none' width='5' height='5' patternUnits='userSpaceOnUse' "
        f"patternTransform='rotate(45)'><rect width='5' height='5' fill='{LIGHT['paper']}'/>"
        f"<line x1='0' y1='0' x2='0' y2='5' stroke='{LIGHT['ink']}' stroke-width='1.6'/>"
        "</pattern></defs>",
    ]
    for column, statistic in enumerate(statistics):
        x = _NAMES + _CELL * column + _CELL / 2 + 4
        parts.append(
            f'<text x="{x}" y="{top - 6}" fill="{LIGHT["muted"]}" '
            f'transform="rotate(-55 {x} {top - 6})">{html.escape(statistic)}</text>'
        )
    for row, layer in enumerate(layers):
        named = layer == found["layer"]
        ink, weight = (LIGHT["active"], 700) if named else (LIGHT["muted"], 400)
        parts.append(
            f'<text x="{_NAMES - 8}" y="{top + 16 * row + 12}" text-anchor="end" fill="{ink}" '
            f'font-weight="{weight}">{"▸ " * named}{html.escape(layer)}</text>'
        )
    for cell in cells:
        x = _NAMES + _CELL * statistics.index(cell["statistic"])
        parts.append(_cell(cell, x, top + 16 * layers.index(cell["layer"])))
    parts += _legend(top + 16 * len(layers) + 24)
    parts.append("</svg>\n")
    return "".join(parts)


def _cell(cell: Record, x: float, y: float) -> str:
    size = cell["standardized"]
    what = STATISTICS.get(cell["statistic"], cell["statistic"])
    title = f"layer {cell['layer']}, {what}: "
    if size is None:
        fill, opacity = "url(#none)", 1.0
        title += "missing, NaN or infinitely far"
    else:
        fill = LIGHT["active"] if size > 0 else LIGHT["mean"]
        opacity = shade(abs(size))
        title += f"{size:+.3g} x its limit ({cell['verdict'].lower()})"
    # A frame marks what is beyond its limit, so that no colour has to be told from another.
    frame = LIGHT["ink"] if cell["verdict"] != "PASS" else LIGHT["grid"]
    thick = 1.6 if cell["verdict"] == "FAIL" else 0.8
    return (
        f'<rect x="{x + 1}" y="{y + 1}" width="{_CELL - 2}" height="14" fill="{fill}" '
        f'fill-opacity="{opacity:.3f}" stroke="{frame}" stroke-width="{thick}">'
        f"<title>{html.escape(title)}</title></rect>"
    )


def shade(size: float) -> float:
    """Return the opacity of a cell so many times its limit away: logarithmic between steps.

    Args:
        size: At least 0; infinity is as deep as it gets.
    """
    for (low, first), (high, last) in itertools.pairwise(_SHADES):
        if size < high:
            if not low:
                return first + (last - first) * size / high
            return first + (last - first) * math.log(size / low) / math.log(high / low)
    return _SHADES[-1][1]


def _legend(y: float) -> Iterator[str]:
    muted = f'fill="{LIGHT["muted"]}"'
    yield f'<text x="8" y="{y - 6}" {muted}>difference, in units of the limit</text>'
    for place, size in enumerate((-100, -10, -1, -0.1, 0, 0.1, 1, 10, 100)):
        x = 8 + 44 * place
        fill = LIGHT["active"] if size > 0 else LIGHT["mean"]
        frame = LIGHT["ink"] if abs(size) > 1 else LIGHT["grid"]
        shown = f"{size:+g}" if size else "0"
        yield (
            f'<rect x="{x}" y="{y}" width="42" height="12" fill="{fill}" '
            f'fill-opacity="{shade(abs(size)):.3f}" stroke="{frame}" stroke-width="0.8"/>'
            f'<text x="{x + 21}" y="{y + 25}" text-anchor="middle" {muted}>{shown}</text>'
        )


def _map_caption(record: Record) -> str:
    lacking = [cell for cell in record["cells"] if cell["standardized"] is None]
    text = (
        "Every layer and statistic: orange above, blue below the baseline, deeper the nearer to the"
        " limit; a dark frame is beyond it. "
    )
    if lacking:
        names = list(dict.fromkeys(f"{c['layer']} {c['statistic']}" for c in lacking))
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        text += f"Hatched: no number on one side ({', '.join(names[:5])}{more}). "
    if record["attribution"] and record["attribution"]["layer"]:
        text += f"The arrow marks layer {record['attribution']['layer']}, where it starts."
    return text


# --- The profiles ----------------------------------------------------------------------------


def _profiles(record: Record, name: str) -> str:
    from matplotlib.figure import Figure

    rows = record["profile"]
    places = range(len(rows))
    with plain_style():
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for key, colour, style, label in (
            ("expected", "control", "-", "baseline"),
            ("obtained", "mean", "--", "new"),
        ):
            values = [math.nan if row[key] is None else row[key] for row in rows]
            width = 3.2 if key == "expected" else 1.4
            upper.plot(places, values, style, color=LIGHT[colour], linewidth=width, label=label)
        moved = [
            math.nan if None in (row["expected"], row["obtained"]) else abs(_moved(row))
            for row in rows
        ]
        lower.bar(places, moved, color=LIGHT["active"], width=0.7)
        lower.set_yscale("symlog", linthresh=1e-6)
        most = max((size for size in moved if size == size), default=0.0)  # NaN is not itself
        lower.set_ylim(0, max(1e-5, 3 * most))
        lower.set_yticks(
            [0, *(10.0**power for power in (-6, -4, -2, 0) if 10.0**power <= 3 * most)]
        )
        upper.set_ylabel("mean similarity")
        lower.set_ylabel("moved by")
        lower.set_xlabel("decoder layer")
        step = max(1, math.ceil(len(rows) / 16))
        lower.set_xticks(places[::step], [rows[place]["layer"] for place in places[::step]])
        for axes in (upper, lower):
            axes.grid(axis="y")
        upper.legend(loc="lower center", ncols=2)
        return as_svg(figure, name, "Mean similarity per layer: baseline and new")


def _moved(row: Record) -> float:
    difference: float = row["obtained"] - row["expected"]
    return difference


def _profile_caption(record: Record) -> str:
    return (
        "Mean similarity per layer over what was compared, the new profile on top of the "
        f"baseline's; below, how far each layer moved ({record['tokens']:,} tokens)."
    )


# --- Budgets and the rest --------------------------------------------------------------------


def _budgets(budget: Record) -> str:
    lead = f'<p class="lead">{html.escape(budget["verdict"])}</p>\n'
    if budget["reason"]:
        lead += f"<p>{html.escape(budget['reason'])}</p>\n"
    if not budget["overruns"]:
        return html_section(f"Budgets of {budget['name']}", lead)
    header = ("figure", "budget", "measured", "point", "look closer")
    rows = [
        [o["figure"], str(o["limit"]), str(o["measured"]), o["point"], o["command"]]
        for o in budget["overruns"]
    ]
    table = html_table("Budgets that were not kept", header, rows, text_columns=2)
    return html_section(f"Budgets of {budget['name']}", lead + table)


def _leftovers(record: Record) -> Iterator[str]:
    pairs = [
        *(("Missing", f"{m['path']}: make it with `{m['command']}`") for m in record["missing"]),
        *(("Regenerated", path) for path in record["regenerated"]),
        *(("Not used", path) for path in record["unused"]),
    ]
    if pairs:
        yield html_section("Baselines", html_pairs(pairs))
