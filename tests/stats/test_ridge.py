"""Ridge regression: sums merge in any order, and the solution is the textbook's."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.textbook_ridge import textbook_ridge
from torch import Tensor

from cascade.stats.ridge import STRENGTHS, NormalEquations, fit, rms_normalized

INPUTS, OUTPUTS = 6, 3


def some_data(
    count: int, *, inputs: int = INPUTS, outputs: int = OUTPUTS, noise: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return inputs of unequal size and a noisy affine map of them, `[n, inputs]`, `[n, outputs]`.

    The map is the same for every seed; the tokens are not.
    """
    rng, tokens = np.random.default_rng(99), np.random.default_rng(seed)
    weight = rng.normal(size=(inputs, outputs))
    bias = 5 * rng.normal(size=outputs)
    x = tokens.normal(size=(count, inputs)) * rng.uniform(0.3, 3, size=inputs) + 1
    y = x @ weight + bias + noise * tokens.normal(size=(count, outputs))
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()


def sums(x: Tensor, y: Tensor) -> NormalEquations:
    equations = NormalEquations(x.shape[1], y.shape[1])
    equations.update(x, y)
    return equations


def largest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return (a - b).abs().max().item()


def check_same(a: NormalEquations, b: NormalEquations, *, close: float) -> None:
    """Check that two sums differ by at most `close` times the largest entry."""
    assert a.count == b.count
    for one, other in ((a.xx, b.xx), (a.xy, b.xy), (a.yy, b.yy)):
        assert largest(one, other) <= close * other.abs().max().item()


# --- Sums ------------------------------------------------------------------------------------

#: A split changes the order of fp32 additions inside a batch, by up to 1e-6 of the largest sum.
SPLIT = 1e-6


@given(st.lists(st.integers(0, 3), min_size=30, max_size=30), st.permutations(range(4)))
def test_merging_any_split_in_any_order_equals_one_pass(parts: list[int], order: list[int]) -> None:
    x, y = some_data(30)
    merged = NormalEquations(INPUTS, OUTPUTS)
    for part in order:
        rows = torch.tensor(parts) == part
        merged = merged + sums(x[rows], y[rows])
    check_same(merged, sums(x, y), close=SPLIT)


@given(st.lists(st.integers(1, 29), unique=True, max_size=6))
def test_batches_of_any_size_equal_one_pass(cuts: list[int]) -> None:
    x, y = some_data(30)
    batched = NormalEquations(INPUTS, OUTPUTS)
    sizes = np.diff([0, *sorted(cuts), 30]).tolist()
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        batched.update(part_x, part_y)
    check_same(batched, sums(x, y), close=SPLIT)


def test_outputs_given_as_several_tensors_equal_one_tensor() -> None:
    x, y = some_data(200)
    parts = NormalEquations(INPUTS, OUTPUTS)
    parts.update(x, y[:, :1], y[:, 1:])
    # Products of other widths add up in another order, which changes up to 1e-6.
    check_same(parts, sums(x, y), close=1e-6)
    with pytest.raises(ValueError, match=r"got \[200, 6\] and \[200, 1\]"):
        NormalEquations(INPUTS, OUTPUTS).update(x, y[:, :1])
    with pytest.raises(ValueError, match=r"\[200, 1\] and \[3, 2\]"):
        NormalEquations(INPUTS, OUTPUTS).update(x, y[:, :1], y[:3, 1:])


def test_solving_some_outputs_equals_solving_all() -> None:
    equations = sums(*some_data(200))
    weight, bias = equations.solve(1e-3)
    columns = torch.tensor([True, False, True])
    some = equations.solve(1e-3, columns)
    assert largest(some[0], weight[:, columns]) < 1e-6
    assert largest(some[1], bias[columns]) < 1e-6


def test_merging_commutes_and_does_not_modify_its_operands() -> None:
    a, b = sums(*some_data(20)), sums(*some_data(30, seed=1))
    before = (a.xx.clone(), b.xy.clone())
    check_same(a + b, b + a, close=0.0)
    assert torch.equal(a.xx, before[0])
    assert torch.equal(b.xy, before[1])
    assert (a.count, b.count, (a + b).count) == (20, 30, 50)


def test_adding_no_data_changes_nothing() -> None:
    a = sums(*some_data(20))
    check_same(a + NormalEquations(INPUTS, OUTPUTS), a, close=0.0)
    again = sums(*some_data(20))
    again.update(torch.empty(0, INPUTS), torch.empty(0, OUTPUTS))
    check_same(again, a, close=0.0)


def test_many_batches_are_as_exact_as_one() -> None:
    # Summed in fp32, 2,000 batches of 100 ones would still be exact, but not 0.1.
    equations = NormalEquations(1, 1)
    x = torch.full((100, 1), 0.1)
    for _ in range(2000):
        equations.update(x, x)
    expected = 200_000 * float(x[0].double().square())
    # The product of one batch in fp32 is exact to 1e-6. Summing batches in fp32 would lose 3e-5.
    assert equations.yy.item() == pytest.approx(expected, rel=1e-6)
    assert equations.xx[0, 0].item() == pytest.approx(expected, rel=1e-6)
    assert equations.xx[1, 1].item() == 200_000


def test_memory_does_not_grow_with_tokens() -> None:
    equations = sums(*some_data(10))
    shapes = {"xx": (INPUTS + 1, INPUTS + 1), "xy": (INPUTS + 1, OUTPUTS), "yy": (OUTPUTS,)}
    for _ in range(2):
        assert vars(equations).keys() == {"count", "sums"}
        assert {name: part.fine.shape for name, part in equations.sums.items()} == shapes
        assert {name: part.coarse.shape for name, part in equations.sums.items()} == shapes
        equations.update(*some_data(5000))


def test_batches_in_any_order_and_grouping_give_the_same_bits() -> None:
    batches = [sums(*some_data(count, seed=count)) for count in (3, 50, 7, 20)]
    one = batches[0] + batches[1] + batches[2] + batches[3]
    other = (batches[3] + batches[1]) + (batches[2] + batches[0])
    check_same(one, other, close=0.0)
    in_turn = NormalEquations(INPUTS, OUTPUTS)
    for count in (20, 3, 7, 50):
        in_turn.update(*some_data(count, seed=count))
    check_same(in_turn, one, close=0.0)
    for a, b in zip(one.solve(1e-3), other.solve(1e-3), strict=True):
        assert torch.equal(a, b)


def test_update_does_not_modify_its_arguments() -> None:
    x, y = some_data(10)
    before = x.clone(), y.clone()
    sums(x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


# --- The solution ----------------------------------------------------------------------------


def test_fit_recovers_a_linear_map() -> None:
    x, _ = some_data(400)
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn((INPUTS, OUTPUTS), generator=rng)
    bias = 7 * torch.randn(OUTPUTS, generator=rng)
    found = sums(x, x @ weight + bias).solve(1e-7)
    assert largest(found[0], weight) < 1e-4
    assert largest(found[1], bias) < 1e-4


@pytest.mark.parametrize("strength", [*STRENGTHS, 3.0])
@pytest.mark.parametrize("count", [4, 50, 400])
def test_solution_is_textbook_ridge_with_unpenalized_intercept(strength: float, count: int) -> None:
    x, y = some_data(count)
    expected = textbook_ridge(x, y, strength)
    weight, bias = sums(x, y).solve(strength)
    # Products in fp32 have errors of 1e-7 of the largest sum. With fewer tokens than inputs,
    # solving magnifies them by 1 / strength.
    close = 1e-4 if count > INPUTS else 1e-4 + 2e-7 / strength
    assert largest(weight, expected[0]) < close * 5
    assert largest(bias, expected[1]) < close * 20


def test_solution_matches_scikit_learn() -> None:
    linear_model = pytest.importorskip(
        "sklearn.linear_model", reason="comes with mapie, which the tests' extra installs"
    )
    x, y = some_data(300)
    alpha = 0.1 * x.double().square().mean().item() * len(x)
    theirs = linear_model.Ridge(alpha=alpha).fit(x.double().numpy(), y.double().numpy())
    weight, bias = sums(x, y).solve(0.1)
    assert largest(weight, torch.from_numpy(theirs.coef_.T.astype(np.float32))) < 1e-5
    assert largest(bias, torch.from_numpy(theirs.intercept_.astype(np.float32))) < 1e-4


def test_without_an_intercept_the_map_goes_through_the_origin() -> None:
    x, y = some_data(200)
    weight, bias = sums(x, y).solve(1e-3, intercept=False)
    penalty = 1e-3 * x.double().square().sum(dim=0).mean()
    system = x.double().T @ x.double() + penalty * torch.eye(INPUTS, dtype=torch.float64)
    wanted = torch.linalg.solve(system, x.double().T @ y.double())
    assert largest(weight, wanted.float()) < 1e-4
    assert torch.equal(bias, torch.zeros(OUTPUTS))


def test_shifting_the_outputs_changes_only_the_intercept() -> None:
    x, y = some_data(100)
    weight, bias = sums(x, y).solve(10.0)
    shifted = sums(x, y + 1000).solve(10.0)
    # fp32 numbers near 1,000 are 6e-5 apart.
    assert largest(shifted[0], weight) < 1e-3
    assert largest(shifted[1], bias + 1000) < 1e-2


def test_larger_strength_gives_smaller_weights() -> None:
    equations = sums(*some_data(100))
    sizes = [equations.solve(strength)[0].norm().item() for strength in STRENGTHS]
    assert sizes == sorted(sizes, reverse=True)
    assert equations.solve(1e9)[0].norm().item() < 1e-6


def test_error_is_the_mean_square_error() -> None:
    x, y = some_data(100)
    weight, bias = some_solution = sums(*some_data(50, seed=1)).solve(1e-2)
    expected = (x @ weight + bias - y).double().square().mean(dim=0)
    error = sums(x, y).error(*some_solution)
    # The error is a difference of sums ten thousand times as large, whose products are fp32.
    assert error.tolist() == pytest.approx(expected.tolist(), rel=5e-3)


@pytest.mark.parametrize(
    ("inputs", "different", "count"), [(6, 1, 500), (64, 3, 1000), (64, 40, 4000), (32, 1, 1)]
)
def test_few_distinct_tokens_have_a_finite_solution(
    inputs: int, different: int, count: int
) -> None:
    x, y = some_data(different, inputs=inputs)
    rows = torch.arange(count) % different
    x, y = rms_normalized(x)[rows], y[rows]
    equations = sums(x, y)
    for strength in STRENGTHS:
        weight, bias = equations.solve(strength)
        error = largest(x @ weight + bias, y) / y.abs().max().item()
        assert error < max(1e-3, strength * different), "off by more than the penalty"
        # If rounding made the sums indefinite, weights in the thousands would fit them.
        assert weight.norm().item() < 100


def test_zero_inputs_predict_the_mean() -> None:
    _, y = some_data(50)
    weight, bias = sums(torch.zeros(50, INPUTS), y).solve(1e-3)
    assert not bool(weight.any())
    assert largest(bias, y.mean(dim=0)) < 1e-5


# --- Strengths -------------------------------------------------------------------------------


def noisy_groups(seed: int, count: int = 60) -> NormalEquations:
    """Return equations of one group of exact outputs and one group of noise."""
    x, exact = some_data(count, inputs=20, noise=0.0, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    return sums(x, torch.cat([exact, torch.randn((count, 4), generator=rng)], dim=1))


def test_each_group_has_its_own_strength() -> None:
    train, check = noisy_groups(1), noisy_groups(2)
    weight, bias, strengths = fit(train, check, [3, 4])
    assert strengths == [STRENGTHS[0], STRENGTHS[-1]]
    for columns, strength in ((slice(0, 3), strengths[0]), (slice(3, 7), strengths[1])):
        expected = (train + check).solve(strength)
        assert torch.equal(weight[:, columns], expected[0][:, columns])
        assert torch.equal(bias[columns], expected[1][columns])


def test_strength_has_the_smallest_error_on_held_out_tokens() -> None:
    for seed in range(5):
        train = sums(*some_data(12, noise=3.0, seed=seed))
        check = sums(*some_data(200, noise=3.0, seed=seed + 50))
        chosen = fit(train, check, [OUTPUTS])[2][0]
        errors = [check.error(*train.solve(value)).mean().item() for value in STRENGTHS]
        assert chosen == STRENGTHS[int(np.argmin(errors))]


def test_groups_are_fitted_independently() -> None:
    train, check = noisy_groups(1), noisy_groups(2)
    together = fit(train, check, [3, 4])
    x, y = some_data(60, inputs=20, noise=0.0, seed=1)
    other_x, other_y = some_data(60, inputs=20, noise=0.0, seed=2)
    alone = fit(sums(x, y), sums(other_x, other_y), [3])
    assert alone[2] == together[2][:1]
    # Products of other widths add up in another order.
    assert largest(alone[0], together[0][:, :3]) < 1e-4


def test_middle_strength_is_used_without_held_out_tokens() -> None:
    train, nothing = sums(*some_data(50)), NormalEquations(INPUTS, OUTPUTS)
    for pair in ((train, nothing), (nothing, train)):
        weight, bias, strengths = fit(*pair, [1, 2])
        assert strengths == [1e-3, 1e-3]
        expected = train.solve(1e-3)
        assert torch.equal(weight, expected[0])
        assert torch.equal(bias, expected[1])


# --- Errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ((5, INPUTS - 1), (5, OUTPUTS)),
        ((5, INPUTS), (5, OUTPUTS + 1)),
        ((5, INPUTS), (4, OUTPUTS)),
        ((5, INPUTS), (5,)),
        ((INPUTS,), (OUTPUTS,)),
        ((1, 5, INPUTS), (1, 5, OUTPUTS)),
    ],
)
def test_error_for_wrong_shapes_names_both(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    equations = NormalEquations(INPUTS, OUTPUTS)
    with pytest.raises(ValueError, match=r"^expected x \[n, 6\] and y \[n, 3\], got \["):
        equations.update(torch.ones(x), torch.ones(y))
    assert equations.count == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("where", ["x", "y"])
def test_non_finite_values_are_rejected_and_nothing_is_added(where: str, value: float) -> None:
    if (where, value) == ("y", 1e30):
        value = 3e38  # its products with the inputs overflow
    x, y = some_data(10)
    equations = sums(x, y)
    before = equations + NormalEquations(INPUTS, OUTPUTS)
    (x if where == "x" else y)[3, 1] = value
    if where == "x" and value == 1e30:
        y = torch.zeros_like(y)  # the products of the inputs overflow anyway
    with pytest.raises(ValueError, match="expected finite states, got NaN or infinite ones"):
        equations.update(x, y)
    check_same(equations, before, close=0.0)


def test_solving_without_tokens_is_an_error() -> None:
    empty = NormalEquations(INPUTS, OUTPUTS)
    with pytest.raises(ValueError, match=r"^expected at least one token to fit on, got none$"):
        empty.solve(1e-3)
    with pytest.raises(ValueError, match="expected at least one token"):
        fit(empty, empty, [OUTPUTS])


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_non_positive_strength_is_rejected(strength: float) -> None:
    with pytest.raises(ValueError, match=r"^expected a positive strength, got"):
        sums(*some_data(10)).solve(strength)


@pytest.mark.parametrize("groups", [[], [2], [2, 2], [4]])
def test_groups_that_do_not_cover_all_outputs_are_rejected(groups: list[int]) -> None:
    equations = sums(*some_data(10))
    with pytest.raises(ValueError, match=r"^expected groups of 3 outputs, got \["):
        fit(equations, equations, groups)


@pytest.mark.parametrize("widths", [(INPUTS + 1, OUTPUTS), (INPUTS, OUTPUTS + 1)])
def test_equations_of_other_widths_do_not_merge(widths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"^expected normal equations of the same widths$"):
        NormalEquations(INPUTS, OUTPUTS) + NormalEquations(*widths)


# --- Normalizing -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rms_normalized_states_have_rms_one_and_the_same_direction(
    dtype: torch.dtype, scale: float
) -> None:
    states = (scale * torch.randn((3, 5, 64), generator=torch.Generator().manual_seed(0))).to(dtype)
    normalized = rms_normalized(states)
    assert normalized.dtype == torch.float32
    sizes: npt.NDArray[Any] = normalized.square().mean(dim=-1).sqrt().numpy()
    assert np.abs(sizes - 1).max() < 1e-6
    cosine = torch.cosine_similarity(normalized, states.float(), dim=-1)
    assert cosine.min().item() > 1 - 1e-6


def test_rms_normalized_zero_state_stays_zero() -> None:
    assert not bool(rms_normalized(torch.zeros(2, 8)).any())
