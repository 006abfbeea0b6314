"""Perplexities, as far as a number can hold them."""

from __future__ import annotations

import math

#: The largest mean loss, or difference of two, whose exponential is stored: exp(709.8) is the
#: largest double, exp(-745) the smallest. Beyond it there are only the nats themselves.
MAX_NATS = 700.0


def perplexity(nats: float) -> float | None:
    """Return the perplexity of a mean loss per token, or the ratio of two from their difference.

    Args:
        nats: The mean loss, or the difference of two, in nats.

    Returns:
        The exponential; None where a number cannot hold it.

    Example:
        >>> perplexity(0.0), perplexity(1234.0)
        (1.0, None)
    """
    return math.exp(nats) if abs(nats) <= MAX_NATS else None


def as_ratio(nats: float) -> float:
    """Return a difference in nats as a ratio for comparisons: 0 or infinity beyond numbers."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def stored_nats(nats: float) -> float | None:
    """Return a number of nats as stored in records: None if it is infinite."""
    return float(nats) if math.isfinite(nats) else None
