"""Terminal output: headings, pairs, tables and lines."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cascade.core.printable import printable as spelled_out
from cascade.report.common.records import show

#: The least width of tables: seven statistics and the longest role fit. Narrower consoles wrap.
_TABLE_WIDTH = 80


#: The largest width of a bar chart; longer bars show no more and end far from their labels.
_CHART_WIDTH = 100


#: Only a highlight; the role is also written out.
ACTIVE_STYLE = "yellow"


#: On an ASCII stream, rich would use a box with edges, which is wider than 80 columns.
_ASCII_BOX = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


# --- For every report ------------------------------------------------------------------------


def print_heading(text: str, console: Console) -> None:
    """Print a heading with an empty line above it."""
    console.print()
    console.print(Text(printable(text, console), style="bold"))


def print_pairs(pairs: Iterable[tuple[str, str]], console: Console) -> None:
    """Print labels and texts in two columns, with wrapped texts indented.

    Args:
        pairs: Label and text; neither is parsed as markup.
        console: Where to print; its width is respected.
    """
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in pairs:
        grid.add_row(Text(printable(label, console), style="dim"), Text(printable(text, console)))
    print_lines(grid, console, console.width)


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    console: Console,
    *,
    gap: int = 0,
    text_columns: int = 0,
    active: Collection[str] = (),
    styles: Mapping[int, str] | None = None,
) -> None:
    """Print a table of right-aligned numbers, with the last `text_columns` left-aligned.

    Args:
        header: The column names.
        rows: Rows with as many cells as the header; no cell is parsed as markup.
        console: Where to print. A narrower console still gets the whole table.
        gap: Blanks between columns in addition to the one of the box; fewer if the table would not
            fit.
        text_columns: The number of columns at the end that hold text.
        active: First cells of the rows to highlight. This only sets the colour; write it out too.
        styles: Styles of other rows by row number, from 0, with the same limitation.
    """
    lines = [[printable(cell, console) for cell in row] for row in (header, *rows)]
    widths = sum(max(map(cell_len, column)) for column in zip(*lines, strict=True))
    available = max(console.width, _TABLE_WIDTH)
    while gap and widths + (len(header) - 1) * (gap + 1) > available:
        gap -= 1
    table = Table(
        box=_ASCII_BOX if console.options.ascii_only else box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, gap, 0, 0),
        pad_edge=False,
        header_style="bold",
    )
    for index, name in enumerate(lines[0]):
        is_text = index >= len(header) - text_columns
        table.add_column(Text(name), justify="left" if is_text else "right", no_wrap=True)
    for number, row in enumerate(lines[1:]):
        # Text, not str, so that rich does not parse markup in a cell.
        style = ACTIVE_STYLE if row[0] in active else (styles or {}).get(number, "")
        table.add_row(*(Text(cell, style=style) for cell in row))
    print_lines(table, console, max(available, widths + (len(header) - 1) * (gap + 1)))


def print_bars(bars: Sequence[tuple[str, float, str]], console: Console) -> None:
    """Print one line per similarity: name, number, bar from 0 towards 1 (or left of 0), and note.

    Args:
        bars: Name, similarity and note of each bar; bars with a note are highlighted.
        console: Where to print; its width and encoding are respected.
    """
    bars = [
        (printable(name, console), value, printable(note, console)) for name, value, note in bars
    ]
    values = [value for _, value, _ in bars]
    name_width = max(5, *(len(name) for name, _, _ in bars))
    note_width = max((len(note) + 3 for _, _, note in bars if note), default=0)
    # Two blanks and the number ("-0.1234") stand before the bar; the zero line takes one cell.
    cells = max(10, min(console.width, _CHART_WIDTH) - name_width - 9 - note_width)
    lowest = min(0.0, *values)
    scale = int((cells - 2) / (1 - lowest))
    left = math.ceil(-lowest * scale)
    for name, value, note in bars:
        bar = _bar(value, scale, left, ascii_only=console.options.ascii_only)
        line = f"{name:>{name_width}} {show(value):>7} {bar}"
        if note:
            line = f"{line:<{name_width + 9 + left + 1 + scale}} ({note})"
        console.print(Text(line, style=ACTIVE_STYLE if note else ""), soft_wrap=True)


def _bar(value: float, scale: int, left: int, *, ascii_only: bool) -> str:
    """Return one bar from the zero line, `scale` cells per unit, `left` cells kept for negatives.

    Bars to the right end in eighths of a cell, bars to the left in halves, because no other
    characters exist. Every value other than 0 is visible.
    """
    steps = 1 if ascii_only else 8 if value >= 0 else 2
    length = max(round(abs(value) * scale * steps), 1 if value else 0)
    whole, rest = divmod(length, steps)
    full, zero = ("#", "|") if ascii_only else ("█", "│")
    if value >= 0:
        return " " * left + zero + full * whole + " ▏▎▍▌▋▊▉"[rest].strip()
    return ("▐" * rest + full * whole).rjust(left) + zero


def printable(text: str, console: Console, *, keep: str = "") -> str:
    """Return a text that the console can show, without control characters.

    Args:
        text: Any text, including generated text.
        console: The console; characters that its encoding lacks are escaped.
        keep: Control characters to keep.
    """
    shown = spelled_out(text, keep=keep)
    return shown.encode(console.encoding, "backslashreplace").decode(console.encoding)


def print_lines(content: Table | Text, console: Console, width: int) -> None:
    """Print a table or text line by line, without rich's padding.

    Unlike `console.print`, this allows lines wider than the console, so that no number is cut.

    Args:
        content: What to print.
        console: Where to print.
        width: The layout width in columns, possibly larger than the console's.
    """
    for segments in console.render_lines(content, console.options.update_width(width), pad=False):
        line = Text.assemble(*((segment.text, segment.style or "") for segment in segments))
        line.rstrip()
        console.print(line, soft_wrap=True)
