"""A saturation profile in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from cascade.report.common.records import (
    STATISTICS,
    Record,
    check_profile,
    exit_rule,
    findings,
    headline,
    outlier_rows,
    roles_of,
    show,
    statistics_rows,
    threshold_rows,
)
from cascade.report.common.terminal import (
    ACTIVE_STYLE,
    print_heading,
    print_lines,
    print_pairs,
    print_table,
)

#: The widest that the bar chart becomes: longer bars say no more and part from their labels.
_CHART_WIDTH = 100


# --- The profile -----------------------------------------------------------------------------


def print_profile(record: Record, console: Console) -> None:
    """Print a profile: headline, statistics, outliers, bar chart, special layers, thresholds.

    Nothing depends on colour, and 80 columns are enough.

    Args:
        record: A saved record of kind `saturation`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema, or lacks a section.
    """
    check_profile(record)
    print_pairs(headline(record), console)
    print_heading("Similarity of input and output, per layer", console)
    print_table(
        ("Layer", *STATISTICS, "role"),
        statistics_rows(record),
        console,
        text_columns=1,
        active=roles_of(record).keys(),
    )
    print_heading("Outliers: share of tokens", console)
    outliers = outlier_rows(record)
    if outliers:
        print_table(("Layer", "below 0", "below 0.5"), outliers, console, gap=2)
    else:
        console.print(Text("none"))
    print_heading("Mean similarity", console)
    for line in _bar_chart(record, min(console.width, _CHART_WIDTH), console.options.ascii_only):
        console.print(line, soft_wrap=True)
    print_heading("Special layers", console)
    print_pairs(findings(record), console)
    print_heading("Suggested thresholds", console)
    _print_thresholds(record, console)


def _print_thresholds(record: Record, console: Console) -> None:
    rows = threshold_rows(record)
    if not rows:
        console.print(Text("none"))
        return
    print_lines(Text(exit_rule(record)), console, console.width)
    console.print()
    print_table(("hard ratio", "threshold", "meaning"), rows, console, gap=2, text_columns=1)


def _bar_chart(record: Record, width: int, ascii_only: bool) -> Iterator[Text]:
    """Yield one line per layer: name, mean, bar from 0 towards 1 (or left of 0), and role."""
    roles = roles_of(record)
    means = [row["mean"] for row in record["layers"]]
    name_width = max(5, *(len(row["layer"]) for row in record["layers"]))
    role_width = max((len(role) + 3 for role in roles.values()), default=0)
    # Two blanks and the mean ("-0.1234") stand before the bar; the zero line takes one cell.
    cells = max(10, width - name_width - 9 - role_width)
    lowest = min(0.0, *means)
    scale = int((cells - 2) / (1 - lowest))
    left = math.ceil(-lowest * scale)
    for row in record["layers"]:
        bar = _bar(row["mean"], scale, left, ascii_only)
        role = roles.get(row["layer"])
        line = f"{row['layer']:>{name_width}} {show(row['mean']):>7} {bar}"
        if role:
            line = f"{line:<{name_width + 9 + left + 1 + scale}} ({role})"
        yield Text(line, style=ACTIVE_STYLE if role else "")


def _bar(mean: float, scale: int, left: int, ascii_only: bool) -> str:
    """Draw one bar from the zero line, `scale` cells per unit, `left` cells kept for negatives.

    Eighths of a cell to the right; to the left there is only a half block to be had. Whatever is
    not zero is seen.
    """
    steps = 1 if ascii_only else 8 if mean >= 0 else 2
    length = max(round(abs(mean) * scale * steps), 1 if mean else 0)
    whole, part = divmod(length, steps)
    full, zero = ("#", "|") if ascii_only else ("█", "│")
    if mean >= 0:
        return " " * left + zero + full * whole + " ▏▎▍▌▋▊▉"[part].strip()
    return ("▐" * part + full * whole).rjust(left) + zero
