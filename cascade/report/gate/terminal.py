"""Comparisons and sessions in the terminal."""

from __future__ import annotations

from rich.console import Console

from cascade.gate.records import ComparisonRecord, SessionRecord
from cascade.report.common.sections import print_sections
from cascade.report.gate.sections import comparison_report, session_summary


def print_comparison(record: ComparisonRecord, console: Console) -> None:
    """Print a comparison: verdict, likely cause, worst cells and provenance.

    The text does not depend on colour and fits 80 columns.

    Args:
        record: A record of kind `comparison`.
        console: Where to print; its width and encoding are respected.
    """
    print_sections(comparison_report(record), console)


def print_report(record: SessionRecord, console: Console) -> None:
    """Print the summary of a session: verdict, comparisons, budgets and missing baselines.

    Args:
        record: A record of kind `report`.
        console: Where to print; its width and encoding are respected.
    """
    print_sections(session_summary(record), console)
