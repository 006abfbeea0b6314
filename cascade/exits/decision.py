"""The exit decision: whether a confidence reaches a threshold."""

from __future__ import annotations

from typing import Any

import torch

from cascade.core.arguments import number
from cascade.core.errors import UsageError


def read_threshold(threshold: Any) -> float:
    """Return a threshold as a number, whatever a rule says of it.

    Raises:
        UsageError: It is none.
    """
    read = number(threshold)
    if read is None:
        raise UsageError(
            f"expected a threshold as a number (inf where nothing is to leave), got {threshold!r}"
        )
    return read


def least_fp32(threshold: float) -> float:
    """Return the least fp32 number that is not below a threshold.

    Confidences are fp32, thresholds are not: torch would round a threshold before comparing, and
    let a token leave that a calibration counted as hard.
    """
    rounded = torch.tensor(threshold, dtype=torch.float32)
    if rounded.item() < threshold:
        rounded = torch.nextafter(rounded, torch.tensor(torch.inf))
    return rounded.item()
