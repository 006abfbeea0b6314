"""Terminal output: headings, pairs, tables and lines."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cascade.report.common.records import show

#: Seven statistics and the longest role fit into this; narrower consoles break the lines.
_TABLE_WIDTH = 80


#: The largest width of a bar chart: longer bars say no more and stand far from their labels.
_CHART_WIDTH = 100


#: Only an addition: the role is also said in words.
ACTIVE_STYLE = "yellow"


#: rich replaces box characters on an ASCII stream by a box with edges, which is wider than 80.
_ASCII_BOX = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


# --- For every report ------------------------------------------------------------------------


def print_heading(text: str, console: Console) -> None:
    """Print a heading with an empty line above it."""
    console.print()
    console.print(Text(text, style="bold"))


def print_pairs(pairs: Iterable[tuple[str, str]], console: Console) -> None:
    """Print labels and texts in two columns, the texts wrapped with a hanging indent.

    Args:
        pairs: Label and text; neither is read as markup.
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
    """Print numbers right-aligned and the last `text_columns` left-aligned.

    Args:
        header: The columns' names.
        rows: As many cells each as the header has; none is read as markup.
        console: Where to print. The table is whole on a narrower one, too.
        gap: Blanks between columns beside the one that the box itself leaves; fewer where the
            table would not fit.
        text_columns: How many columns, counted from the last, hold text.
        active: First cells of the rows to stand out, by colour alone: say it in words as well.
        styles: Styles of other rows by their number, from 0; the same holds for them.
    """
    lines = [[printable(cell, console) for cell in row] for row in (header, *rows)]
    widths = sum(max(map(cell_len, column)) for column in zip(*lines, strict=True))
    room = max(console.width, _TABLE_WIDTH)
    while gap and widths + (len(header) - 1) * (gap + 1) > room:
        gap -= 1
    table = Table(
        box=_ASCII_BOX if console.options.ascii_only else box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, gap, 0, 0),
        pad_edge=False,
        header_style="bold",
    )
    for index, name in enumerate(header):
        is_text = index >= len(header) - text_columns
        table.add_column(Text(name), justify="left" if is_text else "right", no_wrap=True)
    for number, row in enumerate(lines[1:]):
        # Text, not str: a cell is never read as rich markup.
        style = ACTIVE_STYLE if row[0] in active else (styles or {}).get(number, "")
        table.add_row(*(Text(cell, style=style) for cell in row))
    print_lines(table, console, max(room, widths + (len(header) - 1) * (gap + 1)))


def print_bars(bars: Sequence[tuple[str, float, str]], console: Console) -> None:
    """Print one line per similarity: name, number, bar from 0 towards 1 (or left of 0), and note.

    Args:
        bars: Name, similarity and note of each; lines with a note stand out.
        console: Where to print; its width and encoding are respected.
    """
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

    Bars to the right end in eighths of a cell, bars to the left in halves: no other characters
    exist. Any value other than 0 is visible.
    """
    steps = 1 if ascii_only else 8 if value >= 0 else 2
    length = max(round(abs(value) * scale * steps), 1 if value else 0)
    whole, rest = divmod(length, steps)
    full, zero = ("#", "|") if ascii_only else ("█", "│")
    if value >= 0:
        return " " * left + zero + full * whole + " ▏▎▍▌▋▊▉"[rest].strip()
    return ("▐" * rest + full * whole).rjust(left) + zero


def printable(text: str, console: Console, *, keep: str = "") -> str:
    """Return a text that the console can show and that cannot steer it.

    Args:
        text: Anything, also what a model wrote.
        console: Where it goes; what its encoding lacks is spelled as an escape.
        keep: Control characters to leave as they are.
    """
    shown = "".join(
        character
        if character in keep or unicodedata.category(character) not in ("Cc", "Cs")
        # repr: "\x1b" is seen, and does nothing.
        else repr(character)[1:-1]
        for character in text
    )
    return shown.encode(console.encoding, "backslashreplace").decode(console.encoding)


def print_lines(content: Table | Text, console: Console, width: int) -> None:
    """Print a table or text line by line, without the blanks that rich pads lines with.

    Unlike `console.print`, this lets a line be wider than the console: it cuts no number short.

    Args:
        content: What to print.
        console: Where to print.
        width: Columns to lay the content out in; may be more than the console has.
    """
    for segments in console.render_lines(content, console.options.update_width(width), pad=False):
        line = Text.assemble(*((segment.text, segment.style or "") for segment in segments))
        line.rstrip()
        console.print(line, soft_wrap=True)
