"""Check the arguments of callers and convert them to plain Python values."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from cascade.core.errors import UsageError


def as_int(value: Any) -> int | None:
    """Return an integer of Python or NumPy as `int`; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def as_bool(value: Any) -> bool | None:
    """Return a boolean of Python or NumPy as `bool`; None for anything else."""
    return bool(value) if isinstance(value, bool | np.bool_) else None


def as_float(value: Any) -> float | None:
    """Return a number of Python, NumPy or torch as `float`, also NaN; None for anything else."""
    try:
        return None if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # tensors raise RuntimeError
        return None


def read_threshold(threshold: Any) -> float:
    """Return a threshold as a `float`. The exit rule checks whether the value suits it.

    Args:
        threshold: A number of Python or NumPy; infinities and NaN are allowed.

    Raises:
        UsageError: It is not a number.
    """
    read = as_float(threshold)
    if read is None:
        raise UsageError(f"expected a number as threshold (inf: no token exits), got {threshold!r}")
    return read


def check_seed(seed: int) -> None:
    """Check that every random generator accepts a seed.

    Raises:
        UsageError: It is not an integer, is negative, or needs more than 63 bits.
    """
    read = as_int(seed)
    if read is None or not 0 <= read < 2**63:
        raise UsageError(f"expected a seed in 0..{2**63 - 1}, got {seed!r}")
