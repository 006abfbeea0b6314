"""The exit decision is exact at every threshold, for arrays and tensors of every precision."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.stats.decision import least_fp32, reaches

CONFIDENCE = st.floats(-1, 1, width=32) | st.floats(0, 200, width=32)


@st.composite
def close_pairs(draw: st.DrawFn) -> tuple[float, float]:
    """Return an fp32 confidence and a threshold that is often next to it."""
    confidence = draw(CONFIDENCE)
    single = np.float32(confidence)
    near = (
        confidence,
        float(np.nextafter(single, np.float32(np.inf))),
        float(np.nextafter(single, np.float32(-np.inf))),
        math.nextafter(confidence, math.inf),
        math.nextafter(confidence, -math.inf),
    )
    return confidence, draw(st.sampled_from(near) | st.floats(-1, 200))


@given(close_pairs())
def test_reaches_is_exact_for_confidences_next_to_the_threshold(pair: tuple[float, float]) -> None:
    confidence, threshold = pair
    expected = Fraction(confidence) >= Fraction(threshold)
    single = np.array([confidence], dtype=np.float32)
    assert reaches(single, threshold).tolist() == [expected]
    assert reaches(torch.from_numpy(single), threshold).tolist() == [expected]
    assert reaches(single.astype(np.float64), threshold).tolist() == [expected]
    assert reaches(torch.from_numpy(single).double(), threshold).tolist() == [expected]


@given(st.floats(-1, 1, width=16), st.floats(-1e-3, 1e-3))
def test_half_precision_confidences_are_compared_exactly(confidence: float, offset: float) -> None:
    threshold = confidence + offset
    expected = [confidence >= threshold]
    assert reaches(np.array([confidence], dtype=np.float16), threshold).tolist() == expected
    assert reaches(torch.tensor([confidence], dtype=torch.float16), threshold).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_infinite_thresholds_let_all_or_no_tokens_exit(dtype: torch.dtype) -> None:
    confidence = torch.tensor([-1.0, 0.5, 100.0], dtype=dtype)
    assert reaches(confidence, -math.inf).all()
    assert not reaches(confidence, math.inf).any()
    assert not reaches(confidence, math.nan).any()


def test_reaches_returns_booleans_of_the_same_shape() -> None:
    confidence = np.zeros((2, 3), dtype=np.float32)
    found = reaches(confidence, 0.0)
    assert (found.shape, found.dtype) == ((2, 3), np.dtype(bool))
    of_torch = reaches(torch.zeros((2, 3)), 0.0)
    assert (of_torch.shape, of_torch.dtype) == ((2, 3), torch.bool)


@given(st.floats(-1e300, 1e300))
def test_least_fp32_is_the_smallest_number_at_or_above_the_threshold(
    threshold: float,
) -> None:
    least = least_fp32(threshold)
    assert least >= threshold
    with np.errstate(over="ignore"):
        below = np.nextafter(np.float32(least), np.float32(-np.inf))
    assert float(below) < threshold
    assert math.isinf(least) or float(np.float32(least)) == least
