"""Comparisons in the terminal: verdict first, then where it points to, and the worst cells."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cascade.report.common.records import Record
from cascade.report.common.terminal import (
    print_heading,
    print_lines,
    print_pairs,
    print_table,
    printable,
)
from cascade.report.gate.wording import (
    OVERRUN_HEADER,
    budget_line,
    cell_header,
    cell_row,
    check_comparison,
    check_report,
    glossary,
    leftovers,
    mismatch_pairs,
    overrun_commands,
    overrun_rows,
    overview,
    provenance_pairs,
    sentences,
    worst_cells,
    worst_title,
)

#: How many of the worst cells are shown: of one comparison, and of each in a session.
_WORST, _SESSION_WORST = 10, 3

#: Only an addition: every verdict is also said in words.
_STYLES = {
    "PASS": "green",
    "FAIL": "bold red",
    "INCONCLUSIVE": "yellow",
    "NOT COMPARABLE": "bold red",
}


def print_comparison(record: Record, console: Console) -> None:
    """Print a comparison: verdict, where the evidence points, the worst cells, where it was made.

    Nothing depends on colour, and 80 columns are enough.

    Args:
        record: A saved record of kind `comparison`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema, lacks a section, or holds NaN.
    """
    check_comparison(record)
    _print_verdict(record["verdict"], record["headline"], console)
    groups = mismatch_pairs(record), [*sentences(record), *provenance_pairs(record)]
    if any(groups):
        console.print()
    for pairs in groups:
        print_pairs(pairs, console)
    _print_worst(record, _WORST, console)
    cells = worst_cells(record)[:_WORST]
    if cells:
        console.print()
        print_lines(Text(glossary(record, cells), style="dim"), console, console.width)


def print_report(record: Record, console: Console) -> None:
    """Print a session in short: its verdict, every comparison and budget, and what is missing.

    Args:
        record: A saved record of kind `report`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema, a part is not whole, or it holds NaN.
    """
    check_report(record)
    _print_verdict(record["verdict"], overview(record), console)
    for comparison in record["comparisons"]:
        console.print()
        headline = f"{comparison['name']}: {comparison['headline']}"
        _print_verdict(comparison["verdict"], headline, console)
        print_pairs(mismatch_pairs(comparison), console)
        where = [("Baseline", str(comparison["path"]))]
        passed = comparison["verdict"] == "PASS"
        print_pairs([*sentences(comparison), *([] if passed else where)], console)
        _print_worst(comparison, _SESSION_WORST, console)
    for budget in record["budgets"]:
        console.print()
        _print_verdict(budget["verdict"], f"{budget['name']}: {budget_line(budget)}", console)
        if budget["overruns"]:
            print_table(OVERRUN_HEADER, overrun_rows(budget), console, gap=1, text_columns=1)
        print_pairs(
            (("Look closer", f"`{command}`") for command in overrun_commands(budget)), console
        )
    rest = leftovers(record)
    if rest:
        console.print()
        print_pairs(rest, console)


def _print_verdict(verdict: str, text: str, console: Console) -> None:
    line = Text.assemble((verdict, _STYLES.get(verdict, "")), f": {printable(text, console)}")
    print_lines(line, console, console.width)


def _print_worst(record: Record, most: int, console: Console) -> None:
    cells = worst_cells(record)
    shown = cells[:most]
    if not shown:
        return
    print_heading(worst_title(record, cells, len(shown)), console)
    rows = [cell_row(record, cell) for cell in shown]
    print_table(cell_header(record), rows, console, gap=1, text_columns=1)
