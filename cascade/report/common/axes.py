"""Shared axes of figures: similarities on a scale uniform in angle, and layer names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cascade.report.common.records import NORM_SUFFIX, OfLayer, is_normed

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def angle(similarity: float) -> float:
    """Return the angle of a similarity, in radians; the y axis is uniform in it."""
    return math.acos(min(1.0, max(-1.0, similarity)))


def layer_positions(rows: Sequence[OfLayer]) -> list[float]:
    """Return the x position of each row: layer l at l, the `+norm` row set apart."""
    # The `+norm` row is no decoder layer. Its gap grows with the axis, so that it stays visible.
    gap = max(0.5, len(rows) / 40)
    return [index + (gap if is_normed(row) else 0.0) for index, row in enumerate(rows, start=1)]


def limit_angles(axes: Axes, low: float, high: float) -> None:
    """Show the angles [low, high], similarity 1 at the top, with similarities as tick labels."""
    # 0.05 rad is 0.1% of similarity near 1. With it, equal values still get an axis.
    margin = max(0.02 * (high - low), 0.05 - (high - low), 0.0)
    low, high = max(0.0, low - margin), min(math.pi, high + margin)
    ticks = _similarity_ticks(low, high)
    axes.set_ylim(high, low - (0.015 * (high - low) if low == 0 else 0.0))
    axes.set_yticks([angle(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])


def _similarity_ticks(low: float, high: float) -> list[float]:
    """Return the roundest similarities that fit between two angles, in ascending order."""
    chosen: list[float] = []
    for per_unit in (1, 2, 10, 20, 100, 1000, 10_000):
        few = len(chosen) < 6
        for step in range(per_unit, -per_unit - 1, -1):
            tick = step / per_unit
            # Finer than a tenth only if the axis is short, or near 1, where most values are.
            wanted = per_unit <= 10 or few or (tick > 0.9 and per_unit <= 100)
            apart = (abs(angle(tick) - angle(other)) for other in chosen)
            fits = low <= angle(tick) <= high and all(gap > (high - low) / 18 for gap in apart)
            if wanted and fits:
                chosen.append(tick)
    return sorted(chosen)


def label_layers(axes: Axes, rows: Sequence[OfLayer]) -> None:
    """Put layer names below the x axis, skipping some if there are too many to read."""
    positions = layer_positions(rows)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10_000) if len(positions) <= 36 * step)
    ticks = [
        (position, row.layer.replace(NORM_SUFFIX, f"\n{NORM_SUFFIX}"))
        for index, (position, row) in enumerate(zip(positions, rows, strict=True), 1)
        if index % step == 0 or index == 1 or is_normed(row)
    ]
    axes.set_xticks([position for position, _ in ticks], [name for _, name in ticks], fontsize=8.5)
    axes.set_xlim(positions[0] - 0.75, positions[-1] + 0.75)
