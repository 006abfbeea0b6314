"""Comparisons for the terminal and for Markdown: verdict first, then the worst cells."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cascade.report.reading import Record


def print_comparison(record: Record, console: Console) -> None:
    """Print a comparison.

    Args:
        record: A record of kind `comparison`.
        console: Where to print.
    """
    console.print(Text(f"{record['verdict']}: {record['headline']}"))
    if record["attribution"]:
        console.print(Text(f"{record['attribution']['cause']}: {record['attribution']['text']}"))
    for note in record["notes"]:
        console.print(Text(note))


def comparison_markdown(record: Record) -> str:
    """Return a comparison as Markdown."""
    return f"# {record['verdict']}: {record['headline']}\n"


def comparison_page(record: Record) -> str:
    """Return a comparison as a self-contained HTML page."""
    return f"<!doctype html><title>{record['verdict']}</title>"
