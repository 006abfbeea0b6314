"""The roles of layers: input transform, dips, output transform and stable bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cascade.saturation.records import LayerRoles

#: A layer is active if the angle of its mean similarity exceeds the median layer's by more than
#: this many robust standard deviations (modified z-score, Iglewicz and Hoaglin 1993).
CUTOFF_SCORE = 3.5

#: Converts the median absolute deviation of a normal distribution to its standard deviation.
_MAD_TO_STD = 1.4826

#: The minimum standard deviation, in degrees. If all layers turn the stream by similar angles, the
#: deviation is near 0 and any small difference would count.
_SMALLEST_SPREAD = 0.5

#: With fewer layers there is no typical layer to compare with.
_MIN_LAYERS = 5

RULE = (
    f"a layer is active when the angle of its mean similarity exceeds the median layer's by more"
    f" than {CUTOFF_SCORE} robust standard deviations (1.4826 x median absolute deviation); active"
    " layers from the first on are the input transform, those up to the last the output transform,"
    " those between are dips; runs of the others are stable bands"
)
SOURCE = "modified z-score: Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993)"


def find_structure(labels: Sequence[str], means: Sequence[float]) -> LayerRoles:
    """Return which layers are active and which are stable.

    Args:
        labels: Row labels "1".."N", then "N+norm" if there is a final norm.
        means: The mean similarity of each row.

    Example:
        >>> roles = find_structure(["1", "2", "3", "4", "5"], [0.1, 0.95, 0.95, 0.95, 0.95])
        >>> roles.input_transform, roles.stable_bands
        (['1'], [['2', '5']])
    """
    residual = [row for row, label in enumerate(labels) if not label.endswith("+norm")]
    angles = np.degrees(np.arccos(np.clip([means[row] for row in residual], -1, 1)))
    cutoff = _cutoff(angles)
    rounded = None if cutoff is None else round(float(np.cos(np.radians(cutoff))), 6)
    opening: list[str] = []
    dips: list[str] = []
    closing: list[str] = []
    bands: list[list[str]] = []
    for first, last, active in [] if cutoff is None else _runs(angles > cutoff):
        names = [labels[row] for row in residual[first : last + 1]]
        if not active:
            bands.append([names[0], names[-1]])
        elif first == 0:
            opening = names
        elif last == len(residual) - 1:
            closing = names
        else:
            dips += names
    if rounded is not None and len(labels) > len(residual) and means[-1] < rounded:
        closing = [*closing, labels[-1]]
    return LayerRoles(
        rule=RULE,
        source=SOURCE,
        cutoff=rounded,
        input_transform=opening,
        dips=dips,
        output_transform=closing,
        stable_bands=bands,
    )


def _cutoff(angles: np.ndarray[Any, Any]) -> float | None:
    if len(angles) < _MIN_LAYERS:
        return None
    median = np.median(angles)
    spread = _MAD_TO_STD * np.median(np.abs(angles - median))
    return float(median + CUTOFF_SCORE * max(spread, _SMALLEST_SPREAD))


def _runs(active: Sequence[bool] | np.ndarray[Any, Any]) -> list[tuple[int, int, bool]]:
    """Return the maximal runs of equal flags as (first, last, flag)."""
    starts = [row for row in range(len(active)) if row == 0 or active[row] != active[row - 1]]
    ends = [start - 1 for start in starts[1:]] + [len(active) - 1]
    return [(a, b, bool(active[a])) for a, b in zip(starts, ends, strict=True)]


def suggested_exit_layer(structure: LayerRoles, num_layers: int) -> int:
    """Return the last layer of the last stable band; without a band, the second to last layer.

    A layer of the output transform turns every token, so its similarity hardly separates easy
    tokens from hard ones.

    Args:
        structure: The result of `find_structure`.
        num_layers: The number of decoder layers.
    """
    bands = structure.stable_bands
    return int(bands[-1][1]) if bands else max(1, num_layers - 1)
