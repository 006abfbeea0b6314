"""A gate's session as Markdown for a job summary: verdict first, the worst first, below 100 kB."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from cascade.report.common.records import Record
from cascade.report.gate.wording import (
    OVERRUN_HEADER,
    budget_line,
    cell_header,
    cell_row,
    check_report,
    glossary,
    leftovers,
    mismatch_rows,
    overrun_commands,
    overrun_rows,
    overview,
    provenance_pairs,
    sentences,
    worst_cells,
    worst_first,
    worst_title,
)

#: GitHub takes 1 MiB per step; what is longer than this nobody reads.
_MOST_BYTES = 90_000
#: The most characters of one text, rows of one table, and items of one list.
_MOST_TEXT, _MOST_CELL, _MOST_ROWS, _MOST_ITEMS = 600, 240, 40, 20
_WORST = 10

#: What would be read as markup; "_" only at the ends of a word, for names are full of it.
_MARKUP = re.compile(r"([\\*<\[~|`]|(?<![^\W_])_|_(?![^\W_]))")


def report_markdown(record: Record) -> str:
    """Return a session as Markdown for a job summary: verdict first, below 100 kB.

    Whole sections are left out where they do not fit, what passed before the rest; it says so.

    Args:
        record: A saved record of kind `report`.

    Raises:
        ValueError: The record is of another kind or schema, a part is not whole, or it holds NaN.
    """
    check_report(record)
    parts = worst_first([*record["comparisons"], *record["budgets"]])
    head = [f"# CASCADE: {record['verdict']}", _escaped(overview(record))]
    if len(parts) > 1:
        head.append(_overview_table(parts))
    return _within(head, [*_leftovers(record), *map(_section, parts)])


def _section(part: Record) -> str:
    return _comparison_section(part) if "cells" in part else _budget_section(part)


def _leftovers(record: Record) -> Iterator[str]:
    rest = leftovers(record)
    if rest:
        yield f"## Baselines\n\n{_items(_bold(label, text) for label, text in rest)}"


def _within(head: Sequence[str], sections: Iterable[str]) -> str:
    """Join sections as far as they fit; say how many did not."""
    kept, left = list(head), 0
    size = sum(len(text.encode()) + 2 for text in head)
    for section in sections:
        more = len(section.encode()) + 2
        if size + more > _MOST_BYTES:
            left += 1
            continue
        kept.append(section)
        size += more
    if left:
        kept.append(f"... and {left:,} more section{'s' * (left > 1)}: see the HTML report.")
    return "\n\n".join(kept) + "\n"


def _overview_table(parts: Sequence[Record]) -> str:
    rows = [
        [part["verdict"], part["name"], part.get("headline") or budget_line(part)]
        for part in parts[:_MOST_ROWS]
    ]
    return _table(("verdict", "what", "outcome"), rows, len(parts))


def _comparison_section(record: Record) -> str:
    pairs = [
        *sentences(record),
        *provenance_pairs(record),
        ("Stored in", f"{record['path']}"),
    ]
    blocks = [
        f"## {record['verdict']}: {_escaped(record['name'])}",
        _escaped(record["headline"]),
        _items(_bold(label, text) for label, text in pairs),
    ]
    mismatches = mismatch_rows(record)
    if mismatches:
        header = ("differs", "expected", "obtained", "what to do")
        blocks.insert(2, _table(header, mismatches[:_MOST_ROWS], len(mismatches)))
    cells = worst_cells(record)
    if cells:
        shown = cells[:_WORST]
        rows = [cell_row(record, cell) for cell in shown]
        blocks += [
            f"{worst_title(record, cells, len(shown))}:",
            _table(cell_header(record), rows, len(rows), text_columns=1),
            _escaped(glossary(record, shown)),
        ]
    return "\n\n".join(block for block in blocks if block)


def _budget_section(budget: Record) -> str:
    blocks = [
        f"## {budget['verdict']}: budgets of {_escaped(budget['name'])}",
        _escaped(budget_line(budget)),
    ]
    rows = overrun_rows(budget)
    if rows:
        blocks.append(_table(OVERRUN_HEADER, rows[:_MOST_ROWS], len(rows), text_columns=1))
        commands = overrun_commands(budget)
        blocks.append(_items(_bold("Look closer", f"`{command}`") for command in commands))
    return "\n\n".join(blocks)


# --- Texts, lists and tables -----------------------------------------------------------------


def _bold(label: str, text: str) -> str:
    return f"**{_escaped(label)}**: {_escaped(text)}"


def _items(texts: Iterable[str]) -> str:
    lines = [f"- {text}" for text in texts]
    left = len(lines) - _MOST_ITEMS
    return "\n".join([*lines[:_MOST_ITEMS], *([f"- ... and {left:,} more"] if left > 0 else [])])


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], count: int, *, text_columns: int = 0
) -> str:
    """Return a table, and below it how many of its `count` rows were left out."""
    numbers = len(header) - text_columns if text_columns else 0
    rule = ["---:" if index < numbers else "---" for index in range(len(header))]
    lines = [_row(header), f"| {' | '.join(rule)} |", *map(_row, rows)]
    left = count - (len(lines) - 2)
    return "\n".join(lines) + (f"\n\n... and {left:,} more" if left > 0 else "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell, _MOST_CELL, in_table=True) for cell in cells)} |"


def _escaped(text: str, most: int = _MOST_TEXT, *, in_table: bool = False) -> str:
    """Return a text in one line that means itself, cut where it is longer than `most` characters.

    What stands between backticks is code, where nothing needs an escape; but in a table a bar ends
    the cell even there, so that such code is shown as text.
    """
    line = " ".join(str(text).encode(errors="replace").decode().split())
    if len(line) > most:
        line = f"{line[:most]}..."
    pieces = re.split(r"(`[^`]+`)", line)
    for place, piece in enumerate(pieces):
        is_code = place % 2 == 1
        if not is_code or (in_table and "|" in piece):
            pieces[place] = _MARKUP.sub(r"\\\1", piece)
    return "".join(pieces)
