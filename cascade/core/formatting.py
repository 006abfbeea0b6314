"""Formatting numbers for sentences."""

from __future__ import annotations


def percent(share: float, digits: int = 1) -> str:
    """Format a share as a percentage.

    Args:
        share: A fraction, e.g. 0.5 for 50 %.
        digits: Digits after the decimal point.

    Example:
        >>> percent(0.9512)
        '95.1 %'
    """
    return f"{100 * share:.{digits}f} %"
