"""A session as Markdown for a job summary: verdict first, the worst first, below 100 kB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from cascade.gate.records import SessionRecord
from cascade.report.common.sections import Block, Lead, Pairs, Section, Table, markdown_lines, plain
from cascade.report.gate.sections import session_report

#: GitHub takes 1 MiB per step; nobody reads more than this.
_MOST_BYTES = 90_000
#: The most characters of one text and of one cell, rows of one table, and items of one list.
_MOST_TEXT, _MOST_CELL, _MOST_ROWS, _MOST_ITEMS = 600, 240, 40, 20
_WORST = 10


def report_markdown(record: SessionRecord) -> str:
    """Return a session as Markdown for a job summary: verdict first, below 100 kB.

    Whole sections are left out where they do not fit, the passed ones first; a line at the end
    says how many.

    Args:
        record: A record of kind `report`.
    """
    report = session_report(record, worst=_WORST, drawn=False)
    head = f"# CASCADE: {report.title}\n\n{plain(report.about)}\n"
    return _within(head, map(_shortened, report.sections))


def _within(head: str, sections: Iterable[Section]) -> str:
    """Join sections as far as they fit, and say how many did not."""
    kept, left, size = [head], 0, len(head.encode())
    for section in sections:
        text = "\n".join(markdown_lines(section, level=2))
        more = len(text.encode()) + 1
        if size + more > _MOST_BYTES:
            left += 1
        elif text:
            kept.append(text)
            size += more
    if left:
        kept.append(f"... and {left:,} more section{'s' * (left > 1)}: see the HTML report.\n")
    return "\n".join(kept)


# --- Shortening ------------------------------------------------------------------------------


def _shortened(section: Section) -> Section:
    blocks = (part for block in section.blocks for part in _within_limits(block))
    return Section(_cut(section.heading, _MOST_TEXT), tuple(blocks))


def _within_limits(block: Block) -> Iterator[Block]:
    """Yield a block with its texts, rows and items cut, and how many were left out."""
    left = 0
    if isinstance(block, Table):
        left = len(block.rows) - _MOST_ROWS
        rows = (tuple(_cut(cell, _MOST_CELL) for cell in row) for row in block.rows[:_MOST_ROWS])
        yield replace(block, rows=tuple(rows))
    elif isinstance(block, Pairs):
        left = len(block.pairs) - _MOST_ITEMS
        pairs = ((name, _cut(text, _MOST_TEXT)) for name, text in block.pairs[:_MOST_ITEMS])
        yield Pairs(tuple(pairs))
    elif isinstance(block, Lead):
        yield replace(block, text=_cut(block.text, _MOST_TEXT))
    elif isinstance(block, str):
        yield _cut(block, _MOST_TEXT)
    else:
        yield block
    if left > 0:
        yield f"... and {left:,} more"


def _cut(text: str, most: int) -> str:
    """Return a text in one line that can be encoded, cut after so many characters."""
    line = " ".join(text.encode(errors="replace").decode().split())
    return f"{line[:most]}..." if len(line) > most else line
