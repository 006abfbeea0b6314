"""The cosine stays in [-1, 1], is 0 for zero vectors and keeps NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.stats.cosine import cosine, cosine_of, norm, widened


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_cosine_of_a_state_and_its_multiple_is_one(seed: int, scale: float) -> None:
    states = torch.randn((3, 8), generator=torch.Generator().manual_seed(seed))
    found = cosine(states, scale * states)
    assert found.max() <= 1.0
    torch.testing.assert_close(found, torch.ones(3))
    torch.testing.assert_close(cosine(states, -scale * states), -torch.ones(3))


def test_cosine_is_the_same_with_and_without_known_norms() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert float(cosine(a, b)) == pytest.approx(math.sqrt(0.5))
    assert torch.equal(cosine(a, b), cosine_of(a, norm(a), b, norm(b)))


def test_cosine_with_a_zero_vector_is_zero_and_nan_stays_nan() -> None:
    zero, state = torch.zeros(1, 4), torch.ones(1, 4)
    assert float(cosine(zero, state)) == 0.0
    assert torch.isnan(cosine(torch.full((1, 4), math.nan), state)).all()


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_states_are_widened_to_at_least_fp32(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert widened(torch.ones(2, dtype=dtype)).dtype is wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", [(1e-20, 1e-20), (1e-30, 1.0), (1e-38, 1e20), (1e19, 1e25)])
def test_the_norm_of_a_state_does_not_matter(
    scales: tuple[float, float], dtype: torch.dtype
) -> None:
    a, b = torch.randn((2, 5, 8), generator=torch.Generator().manual_seed(0), dtype=dtype)
    expected = torch.cosine_similarity(a.double(), b.double(), dim=-1).to(dtype)
    torch.testing.assert_close(cosine(a * scales[0], b * scales[1]), expected)


def test_a_short_state_changes_nothing_of_the_others() -> None:
    a, b = torch.randn((2, 6, 8), generator=torch.Generator().manual_seed(0))
    alone = cosine(a[:5], b[:5])
    a[5] *= 1e-25
    assert torch.equal(cosine(a, b)[:5], alone)


def test_states_that_are_broadcast_have_the_same_cosine() -> None:
    a = torch.randn((3, 8), generator=torch.Generator().manual_seed(0))
    a[1] *= 1e-25
    torch.testing.assert_close(cosine(a, a[:1]), cosine(a, a[:1].expand(3, 8).clone()))
