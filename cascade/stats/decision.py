"""The exit decision: whether a confidence reaches a threshold.

All code that decides, counts or predicts exits calls `reaches`. Scoring, decoding, calibration
and evaluation therefore agree on every token, also where a confidence equals the threshold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np

from cascade.core.arrays import Array

if TYPE_CHECKING:
    from torch import Tensor


@overload
def reaches(confidence: Array, threshold: float) -> Array: ...


@overload
def reaches(confidence: Tensor, threshold: float) -> Tensor: ...


def reaches(confidence: Any, threshold: float) -> Any:
    """Return which tokens are easy, with a confidence at or above the threshold.

    The threshold is rounded up to fp32, the precision of confidences. No fp32 number lies between
    the two, so the comparison is exact. Confidences in double precision are compared with the
    unrounded threshold, which is exact as well.

    Args:
        confidence: Floating-point numbers of any shape, as a NumPy array or a torch tensor.
        threshold: Any number; no confidence reaches NaN.

    Returns:
        Booleans of the same shape and library.

    Example:
        >>> reaches(np.array([0.25, 0.5, 0.75], dtype=np.float32), 0.5)
        array([False,  True,  True])
    """
    if confidence.dtype.itemsize > np.dtype(np.float32).itemsize:
        return confidence >= threshold
    if isinstance(confidence, np.ndarray):
        return confidence.astype(np.float32, copy=False) >= np.float32(least_fp32(threshold))
    return confidence.float() >= least_fp32(threshold)


def least_fp32(threshold: float) -> float:
    """Return the smallest fp32 number that is not below a threshold.

    NumPy and torch round a Python number to the nearest fp32 number before they compare. A
    threshold rounded down would let a token exit whose confidence is below it.

    Args:
        threshold: Any number.

    Example:
        >>> least_fp32(0.1) >= 0.1 > float(np.nextafter(np.float32(least_fp32(0.1)), np.float32(0)))
        True
    """
    with np.errstate(over="ignore"):  # infinite beyond the range of fp32
        rounded = np.float32(threshold)
        if float(rounded) < threshold:
            rounded = np.nextafter(rounded, np.float32(np.inf))
    return float(rounded)
