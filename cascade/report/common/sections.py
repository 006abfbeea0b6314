"""Reports in sections: written once, shown in the terminal, as HTML page or as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.text import Text

from cascade.core.printable import printable as spelled_out
from cascade.report.common.html import (
    escaped,
    html_document,
    html_figure,
    html_fragment,
    html_head,
    html_pairs,
    html_provenance,
    html_provenances,
    html_section,
    html_table,
    inline,
    own_ids,
)
from cascade.report.common.terminal import (
    ACTIVE_STYLE,
    print_bars,
    print_heading,
    print_lines,
    print_pairs,
    print_table,
    printable,
)


@dataclass(frozen=True)
class Lead:
    """The main message of a report or section.

    Attributes:
        text: Plain text.
        mark: "pass", "fail" or "open", which only sets the colour; the text must say it too.
        label: A verdict that is shown before the text.
    """

    text: str
    mark: str = ""
    label: str = ""

    def words(self) -> str:
        """Return label and text as one line."""
        return f"{self.label}: {self.text}" if self.label else self.text


@dataclass(frozen=True)
class Heading:
    """A heading within a section.

    Attributes:
        text: Plain text.
    """

    text: str


@dataclass(frozen=True)
class Provenances:
    """Two provenances side by side, which only an HTML page shows.

    Attributes:
        new: The provenance of the measured profile.
        old: The provenance of the baseline.
    """

    new: Mapping[str, Any]
    old: Mapping[str, Any]


@dataclass(frozen=True)
class Pairs:
    """Labels and texts.

    Attributes:
        pairs: Label and text, both plain text.
    """

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row.

    Attributes:
        caption: What the table shows.
        header: The column names.
        rows: Rows of plain text, each with as many cells as the header.
        text_columns: The number of columns at the end that hold text.
        active: First cells of the rows to highlight; this only sets the colour.
        gap: Additional blanks between columns in the terminal, if they fit.
        page_caption: Whether only a page shows the caption, because the terminal has a heading.
        styles: Row numbers, from 0, with "active" or "control" (muted); this only sets the colour.
        medium: "terminal" or "page" for a table made for one of them; "" for both.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 0
    active: tuple[str, ...] = ()
    gap: int = 1
    page_caption: bool = False
    styles: tuple[tuple[int, str], ...] = ()
    medium: str = ""


@dataclass(frozen=True)
class Bars:
    """A bar chart of similarities, which only the terminal shows; a page has a picture instead.

    Attributes:
        bars: Name, similarity and note of each bar; bars with a note are highlighted.
    """

    bars: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True)
class Picture:
    """A figure, which the terminal omits.

    Attributes:
        file: The name of its file next to the report, e.g. "explanation-classes.svg".
        svg: One `<svg>` element with a text label (see `as_svg`).
        caption: What the figure shows and how to read it.
    """

    file: str
    svg: str
    caption: str


#: The blocks that a page shows; a plain paragraph is a string.
PageBlock = str | Lead | Heading | Pairs | Table | Picture | Provenances
Block = PageBlock | Bars


@dataclass(frozen=True)
class Section:
    """A heading with its blocks.

    Attributes:
        heading: Plain text; "" for a section without a heading.
        blocks: The blocks in order; a section without blocks is omitted.
    """

    heading: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """A whole report, drawn from one record.

    Attributes:
        kicker: The kind of report, e.g. "CASCADE explanation".
        title: The verdict or the subject.
        about: How the record was measured.
        sections: The sections in order.
        provenance: The record's provenance; None if the sections show it.
        labels: Labels and texts that the terminal shows instead of title and about, if any.
        mark: "pass", "fail" or "open" if the title is a verdict; this only sets the colour.
    """

    kicker: str
    title: str
    about: str
    sections: tuple[Section, ...]
    provenance: Mapping[str, Any] | None
    labels: tuple[tuple[str, str], ...] = ()
    mark: str = ""

    def pictures(self) -> tuple[Picture, ...]:
        """Return every picture in order; each becomes a file of the run."""
        return tuple(
            block
            for section in self.sections
            for block in section.blocks
            if isinstance(block, Picture)
        )


def print_sections(report: Report, console: Console) -> None:
    """Print a report without its pictures.

    Args:
        report: The report.
        console: Where to print; its width and encoding are respected.
    """
    if report.labels:
        print_pairs(report.labels, console)
    elif report.mark:
        _print(Lead(report.about, report.mark, report.title), console)
    else:
        for line, style in ((report.title, "bold"), (report.about, "dim")):
            text = Text(printable(line, console), style=style)
            print_lines(text, console, console.width)
    for section in report.sections:
        blocks = [
            block
            for block in section.blocks
            if not isinstance(block, Picture | Provenances) and not _is_for(block, "page")
        ]
        if not blocks:
            continue
        if section.heading:
            print_heading(section.heading, console)
        else:
            console.print()
        for number, block in enumerate(blocks):
            if number and not _belongs(block, blocks[number - 1]):
                console.print()
            _print(block, console)


def _belongs(block: Block, before: Block) -> bool:
    """Return whether a block follows a verdict without an empty line."""
    return isinstance(before, Lead) and bool(before.label) and isinstance(block, Pairs)


def _is_for(block: Block, medium: str) -> bool:
    """Return whether a block is a table for the given medium only."""
    return isinstance(block, Table) and block.medium == medium


#: Colours of styles in the terminal.
_ROW_STYLES = {"active": ACTIVE_STYLE, "control": "dim"}

#: Colours of marks; every verdict is also written out.
_STYLES = {"pass": "green", "fail": "bold red", "open": "yellow"}


def _print(block: str | Lead | Heading | Pairs | Table | Bars, console: Console) -> None:
    if isinstance(block, Lead) and block.label:
        label = (printable(block.label, console), _STYLES.get(block.mark, ""))
        line = Text.assemble(label, f": {printable(block.text, console)}")
        print_lines(line, console, console.width)
    elif isinstance(block, Pairs):
        print_pairs(block.pairs, console)
    elif isinstance(block, Bars):
        print_bars(block.bars, console)
    elif isinstance(block, Table):
        if not block.page_caption:
            caption = Text(printable(block.caption, console), style="dim")
            print_lines(caption, console, console.width)
        print_table(
            block.header,
            block.rows,
            console,
            gap=block.gap,
            text_columns=block.text_columns,
            active=block.active,
            styles={number: _ROW_STYLES[style] for number, style in block.styles},
        )
    elif isinstance(block, Heading):
        print_lines(Text(printable(block.text, console), style="bold"), console, console.width)
    else:
        text = block.text if isinstance(block, Lead) else block
        print_lines(Text(printable(text, console)), console, console.width)


def html_page(report: Report) -> str:
    """Return a report as one self-contained HTML page, which loads nothing and runs no script."""
    return html_document(f"{report.kicker}: {report.title}", _parts(report))


def html_part(report: Report) -> str:
    """Return a report as HTML that can be part of another page, such as a notebook."""
    sections = tuple(
        replace(section, blocks=tuple(map(_with_own_ids, section.blocks)))
        for section in report.sections
    )
    return html_fragment(_parts(replace(report, sections=sections)))


def _with_own_ids(block: Block) -> Block:
    return replace(block, svg=own_ids(block.svg)) if isinstance(block, Picture) else block


def _parts(report: Report) -> list[str]:
    """Return what a page shows of a report, as HTML."""
    body = [html_head(report.kicker, report.title, report.about, mark=report.mark)]
    for section in report.sections:
        shown = _for_page(section)
        if shown:
            blocks = "".join(map(_as_html, shown))
            body.append(html_section(section.heading, blocks) if section.heading else blocks)
    if report.provenance is not None:
        body.append(html_provenance(report.provenance))
    return body


def _for_page(section: Section) -> list[PageBlock]:
    """Return the blocks that HTML and Markdown show: no bars, and no tables for the terminal."""
    return [
        block
        for block in section.blocks
        if not isinstance(block, Bars) and not _is_for(block, "terminal")
    ]


def _as_html(block: PageBlock) -> str:
    if isinstance(block, Pairs):
        return html_pairs(block.pairs)
    if isinstance(block, Table):
        return html_table(
            block.caption,
            block.header,
            block.rows,
            text_columns=block.text_columns,
            active=block.active,
            classes=dict(block.styles),
        )
    if isinstance(block, Picture):
        return html_figure(block.svg, block.caption)
    if isinstance(block, Provenances):
        return html_provenances(block.new, block.old)
    if isinstance(block, Heading):
        return f"<h3>{escaped(block.text)}</h3>\n"
    if isinstance(block, Lead):
        return f'<p class="lead {block.mark}">{inline(block.words())}</p>\n'
    return f"<p>{inline(block)}</p>\n"


def markdown(report: Report, *, level: int = 1, pictures: str = "") -> str:
    """Return a report as Markdown, without its provenance, to include in a longer page.

    Args:
        report: The report.
        level: The level of the report's heading; sections are one level below.
        pictures: The folder of the pictures relative to the page, "" for the same folder.
    """
    lines = [f"{'#' * level} {plain(report.title)}", "", f"*{plain(report.about)}*", ""]
    for section in report.sections:
        lines += markdown_lines(section, level=level + 1, pictures=pictures)
    return "\n".join(lines)


def markdown_lines(section: Section, *, level: int, pictures: str = "") -> list[str]:
    """Return a section as Markdown lines, an empty line after each block; [] for an empty section.

    Args:
        section: The section.
        level: The level of its heading.
        pictures: The folder of the pictures relative to the page, "" for the same folder.
    """
    shown = _for_page(section)
    if not shown:
        return []
    lines = [f"{'#' * level} {plain(section.heading)}", ""] if section.heading else []
    for block in shown:
        if isinstance(block, Heading):
            lines += [f"{'#' * (level + 1)} {plain(block.text)}", ""]
        elif not isinstance(block, Provenances):
            lines += [_as_markdown(block, pictures), ""]
    return lines


def _as_markdown(block: str | Lead | Pairs | Table | Picture, pictures: str) -> str:
    if isinstance(block, Pairs):
        return "\n".join(f"- **{plain(name)}**: {plain(text)}" for name, text in block.pairs)
    if isinstance(block, Table):
        first_text = len(block.header) - block.text_columns
        rule = ["---:" if index < first_text else ":---" for index in range(len(block.header))]
        rows = (tuple(map(_cell, block.header)), rule, *(map(_cell, row) for row in block.rows))
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"{plain(block.caption)}\n\n{table}"
    if isinstance(block, Picture):
        place = f"{pictures}/{block.file}" if pictures else block.file
        caption = plain(block.caption)
        return f"![{caption}]({place})\n\n*{caption}*"
    if isinstance(block, Lead):
        return f"**{plain(block.words())}**"
    return plain(block)


def _cell(text: str) -> str:
    return _inline(text, in_table=True) or " "


def plain(text: str) -> str:
    """Return a paragraph that Markdown shows as the given plain text."""
    text = _inline(text)
    # At the start of a line, this character would begin a heading or a list.
    return f"\\{text}" if text[:1] in ("#", "+", "-") else text


def _inline(text: str, *, in_table: bool = False) -> str:
    # Pairs of backticks mark commands. In them only control characters are escaped and, in a table,
    # the bar that would end the cell.
    text = spelled_out(text, keep="\n\t")
    parts = text.split("`")
    if len(parts) % 2:
        parts[::2] = map(_escaped, parts[::2])
        if in_table:
            parts[1::2] = [part.replace("|", "\\|") for part in parts[1::2]]
        return " ".join("`".join(parts).split())
    return " ".join(_escaped(text).split())


def _escaped(text: str) -> str:
    for character in "\\`*_[]|~":
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "&lt;").replace(">", "&gt;")


def table_of(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: int = 0,
    active: Sequence[str] = (),
) -> Table:
    """Return a table from any sequences of cells."""
    return Table(caption, tuple(header), tuple(map(tuple, rows)), text_columns, tuple(active))
