"""Products of a few rows with fixed weights, by the kernel that is fastest on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.decoding.engine.packing import multiply, pack

#: The most rows for which a kernel is chosen; more rows are computed in parts.
MOST = 16

#: Numbers of rows for which kernels are timed. In between, the next larger one counts.
TIMED = (1, 2, 4, 8, MOST)

#: The kernels: functional.linear with the stored weight, the same for each row by itself, oneDNN
#: with a packed copy, and a matrix product with a transposed copy.
KERNELS = ("linear", "single", "packed", "transposed")

#: Timed repetitions of each kernel; the fastest counts, because other processes only add time.
_REPEATS = 7

#: A kernel that takes this many times as long as linear is not timed any further.
_HOPELESS = 3.0

#: Draws of rows with which kernels in half precision are compared bit for bit, of each kind.
_DRAWS = 2


@dataclass(frozen=True)
class Shape:
    """What decides how fast a kernel is: shape and dtype of the weight."""

    outputs: int
    inputs: int
    dtype: str
    bias: bool

    @classmethod
    def of(cls, modules: Sequence[nn.Linear]) -> Shape:
        """Return the shape of projections that are joined."""
        first = modules[0]
        return cls(
            sum(module.out_features for module in modules),
            first.in_features,
            str(first.weight.dtype).removeprefix("torch."),
            any(module.bias is not None for module in modules),
        )


@dataclass(frozen=True)
class Choice:
    """The kernels of one shape.

    Attributes:
        by_rows: The kernel for 1 to `MOST` rows.
        milliseconds: What each kernel took for the numbers of rows in `TIMED`; infinity where it
            was hopeless.
    """

    by_rows: tuple[str, ...]
    milliseconds: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def copy(self) -> str | None:
        """The form of the weight's second copy, "packed" or "transposed"; None without one."""
        return next((name for name in self.by_rows if name in ("packed", "transposed")), None)


#: No second copy. In half precision, rows are computed one by one, as when they are decoded.
PLAIN = Choice(("linear",) * MOST)
PLAIN_EXACT = Choice(("single",) * MOST)


class Matrix:
    """One or several projections of the same input, computed as one product.

    Args:
        modules: The projections. Their outputs follow each other in the result.
        choice: The kernels.
    """

    __slots__ = ("_bias", "_copy", "_kernels", "_weight", "modules")

    def __init__(self, modules: Sequence[nn.Linear], choice: Choice) -> None:
        self.modules = tuple(modules)
        joined = [module.weight.detach() for module in modules]
        whole = joined[0] if len(joined) == 1 else torch.cat(joined)
        self._bias: Tensor | None = None
        if any(module.bias is not None for module in modules):
            self._bias = torch.cat([_bias_of(module) for module in modules])
        self._kernels = choice.by_rows
        self._copy: Tensor | None = None
        if choice.copy == "packed":
            self._copy = pack(whole)
        elif choice.copy == "transposed":
            self._copy = whole.t().contiguous()
        if self._copy is None:
            plain = PLAIN if whole.dtype == torch.float32 else PLAIN_EXACT
            self._kernels = plain.by_rows
        # The joined weight is only kept where some number of rows needs it.
        needed = any(kernel in ("linear", "single") for kernel in self._kernels)
        self._weight = whole if needed else None

    @property
    def kernel(self) -> str:
        """The kernel for one row."""
        return self._kernels[0]

    @property
    def copied_bytes(self) -> int:
        """The memory that is held in addition to the model's own weights, in bytes."""
        own = sum(module.weight.nbytes for module in self.modules)
        joins = self._weight is not None and len(self.modules) > 1
        return own * ((self._copy is not None) + joins)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the product, `[R, outputs]`.

        Args:
            rows: `[R, inputs]`.
        """
        if len(rows) > MOST:
            return torch.cat([self(part) for part in rows.split(MOST)])
        kernel, copy = self._kernels[len(rows) - 1], self._copy
        if kernel == "packed" and copy is not None:
            return multiply(rows, copy, self._bias)
        if kernel == "transposed" and copy is not None:
            made = torch.mm(rows, copy)
            return made if self._bias is None else made + self._bias
        assert self._weight is not None  # kept for these two kernels
        if kernel == "single" and len(rows) > 1:
            single = [functional.linear(row, self._weight, self._bias) for row in rows.split(1)]
            return torch.cat(single)
        return functional.linear(rows, self._weight, self._bias)


def _bias_of(module: nn.Linear) -> Tensor:
    if module.bias is None:
        return module.weight.new_zeros(module.out_features)
    return module.bias.detach()


def measure(shape: Shape) -> Choice:
    """Time all kernels on this machine and return the best choice for a shape.

    A weight gets at most one copy: the one that saves most over all numbers of rows. In half
    precision, a kernel is used for a number of rows only if its results are bit for bit those of
    linear with each row by itself.

    Args:
        shape: Shape and dtype of the weight.
    """
    dtype = getattr(torch, shape.dtype)
    pairs = torch.randperm(shape.inputs)[: shape.inputs // 2 * 2].view(2, -1)
    weight = _opposite(torch.randn(shape.outputs, shape.inputs), pairs).to(dtype)
    bias = None
    if shape.bias:
        bias = torch.randn(shape.outputs).to(dtype)
        bias[::2] = 0.0
    packed, transposed = pack(weight), weight.t().contiguous()

    def plain(rows: Tensor) -> Tensor:
        return functional.linear(rows, weight, bias)

    def by_mm(rows: Tensor) -> Tensor:
        made = torch.mm(rows, transposed)
        return made if bias is None else made + bias

    kernels: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": plain,
        "single": lambda rows: torch.cat([plain(row) for row in rows.split(1)]),
        "transposed": by_mm,
    }
    if packed is not None:
        kernels["packed"] = lambda rows: multiply(rows, packed, bias)
    unlimited = (math.inf,) * len(TIMED)
    times: dict[str, tuple[float, ...]] = {}
    for name in KERNELS:
        if name in ("linear", "single"):  # "single" rounds right where nothing else does
            times[name] = _times(kernels[name], shape, unlimited)
        elif name in kernels:
            limits = [_HOPELESS * value for value in times["linear"]]
            times[name] = _times(kernels[name], shape, limits)
    exact = dtype != torch.float32
    useful = [name for name in times if math.isfinite(times[name][0])]
    equal = {
        name: _equal_rows(kernels[name], plain, weight, pairs) if exact else range(1, MOST + 1)
        for name in useful
    }
    choices = []
    for copy in ("packed", "transposed"):
        names = [name for name in ("linear", "single", copy) if name in useful]
        choices.append([_fastest(times, equal, names, rows) for rows in range(1, MOST + 1)])
    best = min(choices, key=lambda found: sum(seconds for seconds, _ in found))
    return Choice(tuple(name for _, name in best), times)


def _fastest(
    times: dict[str, tuple[float, ...]], equal: dict[str, Any], names: Sequence[str], rows: int
) -> tuple[float, str]:
    """Return the time and the name of the fastest kernel for a number of rows."""
    place = next(place for place, count in enumerate(TIMED) if rows <= count)
    return min((times[name][place], name) for name in names if rows in equal[name])


def _opposite(weight: Tensor, pairs: Tensor) -> Tensor:
    """Return a weight whose products with rows that are equal in each pair of columns cancel.

    What is left of a product is rounding, which depends on the order of the sum. With other
    numbers, only one in thousands of products in half precision shows that the order is another.

    Args:
        weight: `[outputs, inputs]`.
        pairs: The pairs of columns, `[2, inputs // 2]`.
    """
    made = torch.zeros_like(weight)
    made[:, pairs[0]] = weight[:, pairs[0]]
    made[:, pairs[1]] = -weight[:, pairs[0]]
    return made


def _equal_rows(
    kernel: Callable[[Tensor], Tensor],
    plain: Callable[[Tensor], Tensor],
    weight: Tensor,
    pairs: Tensor,
) -> set[int]:
    """Return the numbers of rows for which a kernel rounds as `linear` does with one row.

    Args:
        kernel: Multiplies rows by the weight.
        plain: Multiplies rows by the weight as `linear` does.
        weight: See `_opposite`.
        pairs: See `_opposite`.
    """
    found = set(range(1, MOST + 1))
    for draw in range(2 * _DRAWS):
        rows = torch.randn(MOST, weight.shape[1]).to(weight.dtype)
        if draw % 2:
            rows[:, pairs[1]] = rows[:, pairs[0]]
        single = torch.cat([plain(row) for row in rows.split(1)])
        found = {count for count in found if torch.equal(kernel(rows[:count]), single[:count])}
    return found


def _times(
    function: Callable[[Tensor], Tensor], shape: Shape, limits: Sequence[float]
) -> tuple[float, ...]:
    """Return the milliseconds of a kernel for each number of rows; infinity beyond a limit."""
    found: list[float] = []
    for count, limit in zip(TIMED, limits, strict=True):
        rows = torch.randn(count, shape.inputs).to(getattr(torch, shape.dtype))
        times: list[float] = []
        while len(times) < _REPEATS + 1 and not (times and min(times) > limit):
            begin = time.perf_counter()
            function(rows)
            times.append(1e3 * (time.perf_counter() - begin))
        # The first call allocates.
        best = min(times[1:], default=math.inf)
        found.append(best if best <= limit else math.inf)
        if math.isinf(found[-1]):
            return (*found, *[math.inf] * (len(TIMED) - len(found)))
    return tuple(found)
