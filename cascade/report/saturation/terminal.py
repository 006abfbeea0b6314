"""A saturation profile in the terminal."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from cascade.report.common.sections import print_sections
from cascade.report.saturation.wording import profile_report
from cascade.saturation.records import ProfileRecord


def print_profile(record: ProfileRecord, console: Console) -> None:
    """Print a profile: headline, statistics, outliers, bar chart, special layers, thresholds.

    The text does not depend on colour and fits 80 columns.

    Args:
        record: The profile's record.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record has another schema or no layers.
    """
    report = profile_report(record)
    special, similarity, statistics, outliers, thresholds = report.sections
    # The findings come last, because a terminal shows the end of the output.
    sections = (statistics, outliers, similarity, special, thresholds)
    print_sections(replace(report, sections=sections), console)
