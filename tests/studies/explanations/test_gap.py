"""Tests of the gap between two layers' angles and of the causes that close it."""

from __future__ import annotations

import numpy as np
import pytest

from cascade.stats.resampling import draws
from cascade.studies.explanations.gap import AngleGap


@pytest.mark.parametrize(
    ("left", "verdict"), [(2.0, "supported"), (5.0, "undecided"), (8.0, "not supported")]
)
def test_a_cause_is_supported_only_if_its_whole_interval_lies_above_half(
    left: float, verdict: str
) -> None:
    generator = np.random.default_rng(0)
    contrast = generator.normal(20.0, 0.1, 16)
    target = contrast + 10.0
    gap = AngleGap(draws(16, 0), target, contrast)
    without = contrast + left + generator.normal(0.0, 1.0, 16)
    found = gap.closed(without, contrast)
    assert found.verdict == verdict
    assert found.share is not None
    assert found.interval is not None
    low, high = found.interval
    assert low < found.share < high
    assert found.share == pytest.approx(1 - left / 10, abs=0.08)
    if verdict == "undecided":
        assert low < 0.5 < high


def test_without_a_gap_there_is_no_closed_share() -> None:
    degrees = np.full(16, 20.0)
    gap = AngleGap(draws(16, 0), degrees, degrees)
    found = gap.closed(degrees, degrees)
    assert (found.share, found.interval, found.verdict) == (None, None, "undecided")
    assert not gap.row().asks_for_a_cause
