"""Formatting numbers for sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence


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


#: Above this perplexity or ratio, or below its inverse, nats per token are shown as well.
_HUGE = 1e6
HUGE_NATS = math.log(_HUGE)


def perplexity_words(perplexity: float | None, nats: float | None) -> str:
    """Return a perplexity, with its nats per token if it is huge, or these alone.

    Args:
        perplexity: The perplexity; None if no number can hold it.
        nats: The mean loss in nats per token; None if it is unknown or infinite.

    Example:
        >>> perplexity_words(12.345, 2.51), perplexity_words(None, 1234.5)
        ('12.35', '1,234 nats per token')
        >>> perplexity_words(1.2e9, 20.9)
        '1.2e+09 (20.9 nats per token)'
    """
    if perplexity is None:
        return "infinite" if nats is None else f"{nats:,.0f} nats per token"
    if perplexity < _HUGE:
        return f"{perplexity:.2f}"
    return f"{perplexity:.1e} ({math.log(perplexity):.1f} nats per token)"


def ratio_words(ratio: float | None, nats: float | None, digits: int = 3) -> str:
    """Return a perplexity ratio, and the difference in nats per token if it is huge, or only that.

    Args:
        ratio: The ratio; None if no number can hold it.
        nats: The difference of the two losses in nats per token; None if it is unknown or infinite.
        digits: Digits after the decimal point.

    Example:
        >>> ratio_words(1.02, 0.0198), ratio_words(None, 1234.5), ratio_words(None, -1234.5)
        ('1.020 x', '+1,234 nats per token', '-1,234 nats per token')
        >>> ratio_words(1e300, 690.8)
        '1.0e+300 x (+690.8 nats per token)'
    """
    if ratio is None:
        return "infinite" if nats is None else f"{nats:+,.0f} nats per token"
    if 1e-3 <= ratio < 1000:
        return f"{ratio:.{digits}f} x"
    huge = abs(math.log(ratio)) > HUGE_NATS
    nats_too = f" ({math.log(ratio):+,.1f} nats per token)" if huge else ""
    return f"{ratio:.1e} x{nats_too}"


def ratio_interval_words(
    interval: Sequence[float] | None, nats: Sequence[float] | None, digits: int = 3
) -> str:
    """Return the interval of a perplexity ratio, or that of the difference in nats per token.

    Args:
        interval: The interval of the ratio; None if no numbers can hold it.
        nats: The interval of the difference in nats per token; None if it is unknown or infinite.
        digits: Digits after the decimal point.

    Example:
        >>> ratio_interval_words([1.01, 1.03], None), ratio_interval_words(None, [800.2, 900.4])
        ('1.010 to 1.030', '+800 to +900 nats per token')
    """
    if interval is None:
        return (
            "no interval" if nats is None else f"{nats[0]:+,.0f} to {nats[1]:+,.0f} nats per token"
        )
    low, high = (f"{end:.{digits}f}" if 1e-3 <= end < 1000 else f"{end:.1e}" for end in interval)
    return f"{low} to {high}"
