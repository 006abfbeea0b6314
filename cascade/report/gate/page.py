"""One self-contained HTML page of a session: a map of every cell, the profiles, the worst cells."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator

from cascade.report.common.html import (
    html_document,
    html_figure,
    html_head,
    html_pairs,
    html_provenances,
    html_section,
    html_table,
)
from cascade.report.common.records import Record
from cascade.report.gate.figures import drift_map_svg, profiles_svg
from cascade.report.gate.wording import (
    OVERRUN_HEADER,
    budget_line,
    cell_header,
    cell_row,
    check_report,
    glossary,
    has_intervals,
    holes,
    leftovers,
    mismatch_pairs,
    overrun_commands,
    overrun_rows,
    overview,
    provenance_pairs,
    sentences,
    worst_cells,
    worst_first,
    worst_title,
)

#: How many of the worst cells are listed; the map has them all.
_WORST = 25

#: CSS classes; the verdict is said in words as well.
_MARKS = {"PASS": "pass", "FAIL": "fail", "NOT COMPARABLE": "fail", "INCONCLUSIVE": "open"}


def report_page(record: Record) -> str:
    """Return a session as one self-contained HTML page: nothing is loaded, no script runs.

    Args:
        record: A saved record of kind `report`.

    Raises:
        ValueError: The record is of another kind or schema, a part is not whole, or it holds NaN.
    """
    check_report(record)
    verdict = record["verdict"]
    parts = [*record["comparisons"], *record["budgets"]]
    sections = [html_head("CASCADE gate", verdict, overview(record), mark=_MARKS.get(verdict, ""))]
    if len(parts) > 1:
        rows = [
            [part["verdict"], part["name"], part.get("headline") or budget_line(part)]
            for part in worst_first(parts)
        ]
        table = html_table("The worst first.", ("verdict", "what", "outcome"), rows, text_columns=3)
        sections.append(html_section("Overview", table))
    rest = leftovers(record)
    if rest:
        sections.append(html_section("Baselines", html_pairs(rest)))
    sections += [
        html_section(comparison["name"], "".join(_comparison(comparison, number)))
        for number, comparison in enumerate(worst_first(record["comparisons"]), start=1)
    ]
    sections += [
        html_section(f"Budgets of {budget['name']}", "".join(_budget(budget)))
        for budget in worst_first(record["budgets"])
    ]
    return html_document(f"CASCADE gate: {verdict}", sections)


def _comparison(record: Record, number: int) -> Iterator[str]:
    yield _lead(record["verdict"], record["headline"])
    yield html_pairs(
        [
            *mismatch_pairs(record),
            *sentences(record),
            *provenance_pairs(record),
            ("Stored in", str(record["path"])),
        ]
    )
    if record["cells"]:
        figure = html_figure(drift_map_svg(record, f"map-{number}"), _map_caption(record))
        yield _part("Every layer and statistic", figure)
    if record["profile"]:
        figure = html_figure(profiles_svg(record, f"profiles-{number}"), _profile_caption(record))
        yield _part("Profiles", figure)
    cells = worst_cells(record)
    if cells:
        yield _part("Worst cells", _worst(record, cells))
    if record["provenance"] and record["baseline"]:
        yield html_provenances(record["provenance"], record["baseline"])


def _lead(verdict: str, text: str) -> str:
    mark = f" {_MARKS[verdict]}" if verdict in _MARKS else ""
    return f'<p class="lead{mark}">{html.escape(verdict)}: {html.escape(text)}</p>\n'


def _part(heading: str, body: str) -> str:
    return f"<h3>{html.escape(heading)}</h3>\n{body}"


def _worst(record: Record, cells: list[Record]) -> str:
    shown = cells[:_WORST]
    table = html_table(
        f"{worst_title(record, cells, len(shown))}.",
        cell_header(record),
        [cell_row(record, cell) for cell in shown],
        text_columns=1,
        active=_layers(record),
    )
    return f"{table}<p>{html.escape(glossary(record, shown))}.</p>\n"


def _layers(record: Record) -> set[str]:
    """Return the layer that the evidence points to, if it points to one."""
    layer = (record["attribution"] or {}).get("layer")
    return set() if layer is None else {str(layer)}


def _map_caption(record: Record) -> str:
    kind = "margin" if has_intervals(record) else "tolerance"
    texts = [
        f"Each row is a layer, each column a statistic: orange lies above the baseline, blue below "
        f"it, the deeper the farther. The depth steps up at the {kind}; a cell beyond it is framed "
        "and has a sign."
    ]
    if any(cell["verdict"] == "INCONCLUSIVE" for cell in record["cells"]):
        texts.append("A dashed frame is undecided.")
    if holes(record):
        texts.append(f"Hatched, for want of a number on one side: {holes(record)}.")
    texts += [f"The arrow marks layer {layer}, which it points to." for layer in _layers(record)]
    return " ".join(texts)


def _profile_caption(record: Record) -> str:
    what = (
        "the means' difference with its interval, and the margin"
        if has_intervals(record)
        else "how far the sequence that moved most has moved, and the tolerance, beyond which the "
        "axis is logarithmic"
    )
    return (
        f"Above: the mean similarity of each layer over the {record['tokens']:,} tokens that were "
        f"compared, the new profile drawn over the baseline's. Below: {what}."
    )


def _budget(budget: Record) -> Iterator[str]:
    yield _lead(budget["verdict"], budget_line(budget))
    rows = overrun_rows(budget)
    if rows:
        yield html_table("Budgets that were not kept.", OVERRUN_HEADER, rows, text_columns=1)
    pairs: Iterable[tuple[str, str]] = [
        *(("Look closer", command) for command in overrun_commands(budget)),
        ("Stored in", str(budget["path"])),
    ]
    yield html_pairs(pairs)
