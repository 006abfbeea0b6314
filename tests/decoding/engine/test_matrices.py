"""Every kernel computes the product; in half precision, bit for bit as for single rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.decoding.engine import matrices, packing
from cascade.decoding.engine.matrices import (
    KERNELS,
    MOST,
    PLAIN,
    PLAIN_EXACT,
    TIMED,
    Choice,
    Matrix,
    Shape,
    measure,
)

INPUTS, OUTPUTS = 40, (24, 8, 8)

#: Rounding of sums of 40 products below 10 in fp32.
CLOSE = 1e-4


def modules_of(dtype: torch.dtype, bias: str = "no") -> list[nn.Linear]:
    """Return projections of one input; with bias "some", only the first one has a bias."""
    torch.manual_seed(0)
    made = [
        nn.Linear(INPUTS, outputs, bias=bias == "all" or (bias == "some" and not place))
        for place, outputs in enumerate(OUTPUTS)
    ]
    for module in made:
        module.weight.data.normal_()
        if module.bias is not None:
            module.bias.data.normal_()
    return [module.to(dtype) for module in made]


def rows_of(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(count)).to(dtype)


def joined(modules: list[nn.Linear], rows: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(rows) for module in modules], dim=-1)


def forced(kernel: Any) -> Choice:
    return Choice((kernel,) * MOST)


@pytest.mark.parametrize("bias", ["no", "some", "all"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_linear(kernel: str, bias: str) -> None:
    modules = modules_of(torch.float32, bias)
    matrix = Matrix(modules, forced(kernel))
    for count in (1, 2, 7, MOST, MOST + 1, 40):
        rows = rows_of(count)
        assert (matrix(rows) - joined(modules, rows)).abs().max() <= CLOSE


@pytest.mark.parametrize("bias", ["no", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chosen_kernels_round_like_single_rows(dtype: torch.dtype, bias: str) -> None:
    modules = modules_of(dtype, bias)
    matrix = Matrix(modules, measure(Shape.of(modules)))
    weight = torch.cat([module.weight.detach() for module in modules])
    added = None if bias == "no" else torch.cat([bias_of(module) for module in modules])
    for count in range(1, 41):
        rows = rows_of(count, dtype)
        single = [functional.linear(row, weight, added) for row in rows.split(1)]
        assert torch.equal(matrix(rows), torch.cat(single)), count


def bias_of(module: nn.Linear) -> Tensor:
    if module.bias is None:
        return module.weight.new_zeros(module.out_features)
    return module.bias.detach()


def test_chosen_kernels_are_linear_in_fp32() -> None:
    modules = modules_of(torch.float32, "all")
    choice = measure(Shape.of(modules))
    assert len(choice.by_rows) == MOST
    assert {*choice.milliseconds} <= {*KERNELS}
    assert all(len(times) == len(TIMED) for times in choice.milliseconds.values())
    matrix = Matrix(modules, choice)
    for count in range(1, 41):
        rows = rows_of(count)
        assert (matrix(rows) - joined(modules, rows)).abs().max() <= CLOSE


def test_rows_by_themselves_are_never_ruled_out_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """They round right where no other kernel does, however fast a joint product is."""
    limits: list[float] = []

    def times(function: Any, shape: Any, given: Sequence[float]) -> tuple[float, ...]:
        limits.append(given[0])
        return (1.0,) * len(TIMED)

    monkeypatch.setattr(matrices, "_times", times)
    measure(Shape.of(modules_of(torch.bfloat16, "no")))
    by_name = dict(zip(KERNELS, limits, strict=False))
    assert by_name["linear"] == by_name["single"] == float("inf")
    assert by_name["packed"] < float("inf")


def packed_is_fastest() -> Callable[..., tuple[float, ...]]:
    """Return a replacement of the timing, which is called for each kernel in turn."""
    times = iter([0.1 if name == "packed" else 1.0 for name in KERNELS])
    return lambda *_: (next(times),) * len(TIMED)


def test_fastest_exact_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "pack", lambda weight: weight)
    monkeypatch.setattr(
        matrices,
        "multiply",
        lambda rows, packed, bias: torch.cat(
            [functional.linear(row, packed, bias) for row in rows.split(1)]
        ),
    )
    monkeypatch.setattr(matrices, "_times", packed_is_fastest())
    assert measure(Shape(8, INPUTS, "bfloat16", bias=True)).by_rows == ("packed",) * MOST


def test_kernel_that_rounds_otherwise_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rows: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(rows, packed, bias) * 1.01

    monkeypatch.setattr(matrices, "pack", lambda weight: weight)
    monkeypatch.setattr(matrices, "multiply", wrong)
    monkeypatch.setattr(matrices, "_times", packed_is_fastest())
    choice = measure(Shape(8, INPUTS, "bfloat16", bias=False))
    assert "packed" not in choice.by_rows
    assert choice.by_rows[0] in ("linear", "single")


@pytest.mark.parametrize("bias", [False, True])
def test_kernel_that_sums_in_another_order_is_not_chosen(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backwards(rows: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        made = rows.float().flip(1) @ packed.float().flip(1).t()
        return (made if bias is None else made + bias.float()).to(rows.dtype)

    monkeypatch.setattr(matrices, "pack", lambda weight: weight)
    monkeypatch.setattr(matrices, "multiply", backwards)
    monkeypatch.setattr(matrices, "_times", packed_is_fastest())
    choice = measure(Shape(64, 301, "bfloat16", bias))
    assert "packed" not in choice.by_rows


def test_fastest_kernel_is_chosen_for_each_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "linear": (1.0, 4.0, 9.0, 9.0, 9.0),
        "single": (2.0, 2.0, 9.0, 9.0, 9.0),
        "transposed": (3.0, 3.0, 3.0, 3.0, 8.0),
        "packed": (3.0, 3.0, 3.0, 3.5, 9.5),
    }
    names = iter(times)
    monkeypatch.setattr(matrices, "pack", lambda weight: weight)
    monkeypatch.setattr(matrices, "_times", lambda *_: times[next(names)])
    monkeypatch.setattr(matrices, "KERNELS", tuple(times))
    choice = measure(Shape(8, INPUTS, "float32", bias=False))
    assert choice.by_rows == ("linear", "single", *["transposed"] * 14)
    assert choice.copy == "transposed"


def test_hopeless_kernel_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(function: Any, shape: Shape, limits: Any) -> tuple[float, ...]:
        return (1.0,) * len(TIMED) if limits[0] == float("inf") else (float("inf"),) * len(TIMED)

    monkeypatch.setattr(matrices, "_times", slow)
    assert measure(Shape(8, INPUTS, "float32", bias=False)).by_rows == ("linear",) * MOST


@pytest.mark.parametrize(
    ("kernel", "joins", "copies"),
    [("linear", 1, 0), ("single", 1, 0), ("packed", 0, 1), ("transposed", 0, 1)],
)
def test_copies_are_counted(kernel: str, joins: int, copies: int) -> None:
    modules = modules_of(torch.float32)
    own = sum(module.weight.nbytes for module in modules)
    assert Matrix(modules, forced(kernel)).copied_bytes == own * (joins + copies)
    # The weight of a single projection is not joined, but the model's own.
    one = modules[:1]
    assert Matrix(one, forced(kernel)).copied_bytes == copies * one[0].weight.nbytes


def test_both_forms_of_a_weight_are_counted() -> None:
    modules = modules_of(torch.float32)
    own = sum(module.weight.nbytes for module in modules)
    choice = Choice(("linear", *["transposed"] * (MOST - 1)))
    assert Matrix(modules, choice).copied_bytes == 2 * own
    rows = rows_of(3)
    assert (Matrix(modules, choice)(rows) - joined(modules, rows)).abs().max() <= CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_cannot_be_packed_are_used_as_they_are(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "pack", lambda weight: None)
    modules = modules_of(dtype)
    matrix = Matrix(modules, forced("packed"))
    assert matrix.kernel == ("linear" if dtype == torch.float32 else "single")
    rows = rows_of(5, dtype)
    single = torch.cat([matrix(row) for row in rows.split(1)])
    assert (matrix(rows) - single).abs().max() <= (CLOSE if dtype == torch.float32 else 0)


def test_measuring_without_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "pack", lambda weight: None)
    choice = measure(Shape(8, INPUTS, "bfloat16", bias=True))
    assert "packed" not in choice.milliseconds
    assert choice.copy in (None, "transposed")


def test_plain_choices_need_no_copy() -> None:
    assert PLAIN.copy is None
    assert PLAIN_EXACT.copy is None


def test_shape_of_joined_projections() -> None:
    modules = modules_of(torch.bfloat16, "some")
    assert Shape.of(modules) == Shape(sum(OUTPUTS), INPUTS, "bfloat16", bias=True)
    assert not Shape.of(modules[1:]).bias


# --- Packing --------------------------------------------------------------------------------


class Missing:
    """An operator namespace that lacks or refuses what packing needs."""

    def __init__(self, error: Exception, at: str) -> None:
        self.error, self.at = error, at

    def __getattr__(self, name: str) -> Any:
        if name == self.at:
            raise self.error
        return getattr(torch._C._nn, name)


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("no such operator"),
        RuntimeError("mkldnn_bf16_device_check: not supported"),
        NotImplementedError("Could not run the operator with these arguments"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("name", ["_reorder_linear_weight", "multiply"])
def test_nothing_is_packed_where_the_operators_fail(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    if name == "multiply":
        monkeypatch.setattr(packing, "multiply", fails)
    else:
        monkeypatch.setattr(torch.ops, "mkldnn", Missing(error, name), raising=False)
    assert packing.pack(torch.randn(8, 8)) is None


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(8, 8, dtype=torch.float64),
        torch.randn(8, 8).half(),
        torch.empty(8, 8, device="meta"),
    ],
    ids=["float64", "float16", "another device"],
)
def test_other_weights_are_not_packed(weight: Tensor) -> None:
    assert packing.pack(weight) is None


@pytest.mark.parametrize("shape", [(8, 8), (3, 5), (1, 1), (97, 32), (32, 97)])
def test_packed_product_is_linear(shape: tuple[int, int]) -> None:
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    packed = packing.pack(weight)
    if packed is None:
        pytest.skip("this build of torch cannot pack weights")
    for count in (1, 3, 20):
        rows = torch.randn(count, shape[1])
        for added in (None, bias):
            made = packing.multiply(rows, packed, added)
            assert (made - functional.linear(rows, weight, added)).abs().max() <= CLOSE
