"""Comparisons and sessions in the terminal."""

from __future__ import annotations

from rich.console import Console

from cascade.gate.records import ComparisonRecord, SessionRecord
from cascade.report.common.sections import print_sections
from cascade.report.gate.sections import comparison_report, session_summary


def print_comparison(record: ComparisonRecord, console: Console) -> None:
    """Print a comparison: the verdict, where the evidence points, the worst cells, the origin.

    Nothing depends on colour, and 80 columns are enough.

    Args:
        record: A record of kind `comparison`.
        console: Where to print; its width and encoding are respected.
    """
    print_sections(comparison_report(record), console)


def print_report(record: SessionRecord, console: Console) -> None:
    """Print a session in short: the verdict, every comparison and budget, missing baselines.

    Args:
        record: A record of kind `report`.
        console: Where to print; its width and encoding are respected.
    """
    print_sections(session_summary(record), console)
