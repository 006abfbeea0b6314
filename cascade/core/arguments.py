"""Arguments from callers: whole numbers, flags, numbers and seeds, checked and converted."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from cascade.core.errors import UsageError


def whole(value: Any) -> int | None:
    """Return a whole number, numpy's too, as Python's; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def flag(value: Any) -> bool | None:
    """Return True or False, numpy's too, as Python's; None for anything else."""
    return bool(value) if isinstance(value, bool | np.bool_) else None


def number(value: Any) -> float | None:
    """Return a number, numpy's too, as Python's, NaN and infinities included; else None."""
    try:
        return None if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # tensors raise the last
        return None


def read_threshold(threshold: Any) -> float:
    """Return a threshold as a Python number; whether it suits a rule is checked by the rule.

    Args:
        threshold: A number, NumPy's too; infinities and NaN are numbers.

    Raises:
        UsageError: It is no number.
    """
    read = number(threshold)
    if read is None:
        raise UsageError(
            f"expected a threshold as a number (inf where nothing is to leave), got {threshold!r}"
        )
    return read


def check_seed(seed: int) -> None:
    """Refuse a seed that not every generator takes.

    Raises:
        UsageError: It is no whole number, negative, or takes more than 63 bits.
    """
    read = whole(seed)
    if read is None or not 0 <= read < 2**63:
        raise UsageError(f"expected a seed in 0..{2**63 - 1}, got {seed!r}")
