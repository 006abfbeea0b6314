"""Sums of float32 numbers are the same bits in any order and any grouping."""

from __future__ import annotations

import functools
import itertools
import math
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.stats import exact_sums
from cascade.stats.exact_sums import ExactSum

#: Numbers whose plain sum depends on the order: of every size, and of both signs.
NUMBERS = st.lists(
    st.floats(-1e9, 1e9, width=32) | st.floats(-1, 1, width=32) | st.sampled_from([1e9, -1e9, 0.1]),
    min_size=1,
    max_size=40,
)


def summed(numbers: list[float], columns: int = 1) -> ExactSum:
    found = ExactSum((columns,))
    for number in numbers:
        found.add(torch.tensor([number] * columns))
    return found


@given(NUMBERS, st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(numbers: list[float], random: object) -> None:
    mixed = list(numbers)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert torch.equal(summed(numbers).total(), summed(mixed).total())


@given(NUMBERS, st.lists(st.integers(0, 3), min_size=40, max_size=40), st.permutations(range(4)))
def test_any_grouping_gives_the_same_bits(
    numbers: list[float], groups: list[int], order: list[int]
) -> None:
    whole = ExactSum((1,))
    for group in order:
        whole.include(summed([n for n, own in zip(numbers, groups, strict=False) if own == group]))
    assert torch.equal(whole.total(), summed(numbers).total())


@given(NUMBERS)
def test_the_sum_is_that_of_the_numbers(numbers: list[float]) -> None:
    expected = math.fsum(torch.tensor(numbers).tolist())
    found = summed(numbers).total().item()
    # Each number is rounded once, and the total once in float64.
    limit = len(numbers) * 2.0**-35 + abs(expected) * 2.0**-52
    assert abs(found - expected) <= limit


def test_a_plain_sum_would_depend_on_the_order() -> None:
    """The numbers of the tests above are hard enough to tell the two apart."""
    numbers = torch.tensor([1e9, 0.1, -1e9, 0.3, 1e-5]).double().tolist()
    orders = list(itertools.permutations(numbers))
    assert len({functools.reduce(operator.add, order) for order in orders}) > 1
    assert len({summed(list(order)).total().item() for order in orders}) == 1


@pytest.mark.parametrize("at_a_time", [1, 3, 1 << 15])
def test_splitting_the_work_changes_nothing(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = 1e4 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    expected = ExactSum((7, 5))
    expected.add(values)
    monkeypatch.setattr(exact_sums, "_AT_A_TIME", at_a_time)
    found = ExactSum((7, 5))
    found.add(values[:, :2], slice(0, 2))
    found.add(values[:, 2:], slice(2, 5))
    assert torch.equal(found.coarse, expected.coarse)
    assert torch.equal(found.fine, expected.fine)
    assert (found.total() - values.double()).abs().max() <= 2.0**-35
    found.add(torch.empty(7, 0), slice(0, 0))
    assert torch.equal(found.total(), expected.total())
