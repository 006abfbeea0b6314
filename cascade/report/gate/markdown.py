"""A session as Markdown for a job summary: the worst verdict first, below 100 kB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from cascade.gate.records import SessionRecord
from cascade.report.common.sections import Block, Lead, Pairs, Section, Table, markdown_lines, plain
from cascade.report.gate.sections import session_report

#: The largest size of a summary. GitHub accepts 1 MiB per step, far more than anyone reads.
_MOST_BYTES = 90_000
#: The maximum number of characters of a text and of a cell, rows of a table, items of a list.
_MOST_TEXT, _MOST_CELL, _MOST_ROWS, _MOST_ITEMS = 600, 240, 40, 20
_WORST = 10


def report_markdown(record: SessionRecord) -> str:
    """Return a session as Markdown for a job summary, below 100 kB.

    Sections that do not fit are omitted, passed ones first, and a last line counts them.

    Args:
        record: A record of kind `report`.
    """
    report = session_report(record, worst=_WORST, drawn=False)
    head = f"# CASCADE: {report.title}\n\n{plain(report.about)}\n"
    return within(_MOST_BYTES, head, map(shortened, report.sections))


def within(
    most: int, head: str, sections: Iterable[Section], tail: str = "", *, level: int = 2
) -> str:
    """Return Markdown with the sections that fit, and the number of omitted ones.

    Args:
        most: The largest size in bytes, without the last line.
        head: What comes before the sections.
        sections: The sections, the most important first.
        tail: What comes after them.
        level: The level of the sections' headings.
    """
    kept, omitted, size = [head], 0, len((head + tail).encode())
    for section in sections:
        text = "\n".join(markdown_lines(section, level=level))
        more = len(text.encode()) + 1
        if size + more > most:
            omitted += 1
        elif text:
            kept.append(text)
            size += more
    if omitted:
        plural = "s" * (omitted > 1)
        kept.append(f"... and {omitted:,} more section{plural} in the HTML report.\n")
    kept += [tail] if tail else []
    return "\n".join(kept)


# --- Shortening ------------------------------------------------------------------------------


def shortened(section: Section) -> Section:
    """Return a section with its texts cut, its tables and lists shortened, and what is left out."""
    blocks = (part for block in section.blocks for part in _within_limits(block))
    return Section(_cut(section.heading, _MOST_TEXT), tuple(blocks))


def _within_limits(block: Block) -> Iterator[Block]:
    """Yield a block with its texts, rows and items cut, and the number of omitted ones."""
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
    """Return a text as one line of encodable characters, cut after `most` of them."""
    line = " ".join(text.encode(errors="replace").decode().split())
    return f"{line[:most]}..." if len(line) > most else line
