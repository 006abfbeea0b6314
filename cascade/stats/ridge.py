"""Ridge regression from streaming, mergeable normal equations in constant memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.stats.exact_sums import ExactSum

#: The penalty strengths that `fit` tries, in units of the inputs' mean square.
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def rms_normalized(hidden: Tensor) -> Tensor:
    """Return states scaled to a root mean square of 1, in fp32; a zero state stays zero.

    Args:
        hidden: `[..., D]`.
    """
    states = hidden.float()
    return states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True).clamp_min(1e-30))


class NormalEquations:
    """The sums over the data from which a least-squares fit of `y = x W + b` follows.

    Sums of batches are exact (see `ExactSum`): the same batches give the same bits in any order and
    grouping. `a + b` equals the sums over the data of both.

    Args:
        inputs: The width of x.
        outputs: The width of y.
        device: The device that holds the sums.
    """

    def __init__(self, inputs: int, outputs: int, *, device: torch.device | None = None) -> None:
        self.count = 0
        self.sums = {
            "xx": ExactSum((inputs + 1, inputs + 1), device=device),
            "xy": ExactSum((inputs + 1, outputs), device=device),
            "yy": ExactSum((outputs,), device=device),
        }

    @property
    def device(self) -> torch.device:
        """The device of the sums."""
        return self.sums["yy"].fine.device

    @property
    def inputs(self) -> int:
        """The width of x."""
        return len(self.sums["xx"].fine) - 1

    @property
    def outputs(self) -> int:
        """The width of y."""
        return len(self.sums["yy"].fine)

    @property
    def xx(self) -> Tensor:
        """The products of the inputs and a constant 1, `[inputs + 1, inputs + 1]`, in float64."""
        return self.sums["xx"].total()

    @property
    def xy(self) -> Tensor:
        """The products of inputs and outputs, `[inputs + 1, outputs]`, in float64."""
        return self.sums["xy"].total()

    @property
    def yy(self) -> Tensor:
        """The squares of the outputs, `[outputs]`, in float64."""
        return self.sums["yy"].total()

    def update(self, x: Tensor, *y: Tensor) -> None:
        """Add tokens.

        Args:
            x: `[n, inputs]`.
            y: `[n, outputs]`, as one tensor or as several that together have this width. Joining
                them first would take a third of the time of the products.

        Raises:
            ValueError: A shape is wrong, or a value is NaN or infinite.
        """
        inputs, outputs = self.inputs, self.outputs
        widths = [part.shape[1] if part.ndim == 2 else -1 for part in y]
        if x.shape[1:] != (inputs,) or sum(widths) != outputs or {len(x)} != set(map(len, y)):
            raise ValueError(
                f"expected x [n, {inputs}] and y [n, {outputs}], got {list(x.shape)} and "
                f"{' and '.join(str(list(part.shape)) for part in y)}"
            )
        # Products in fp32: exact to 1e-7 of the largest sum.
        with_one = torch.cat([x.float(), torch.ones_like(x[:, :1], dtype=torch.float32)], dim=1)
        parts = [part.float() for part in y]
        xx, *xy = (with_one.T @ part for part in (with_one, *parts))
        if not all(bool(torch.isfinite(product).all()) for product in (xx, *xy)):
            raise ValueError("expected finite states, got NaN or infinite ones")
        self.count += len(x)
        self.sums["xx"].add(xx)
        end = 0
        for part, product in zip(parts, xy, strict=True):
            columns = slice(end, end := end + part.shape[1])
            self.sums["xy"].add(product, columns)
            squares = torch.linalg.vector_norm(part, dim=0, dtype=torch.float32).square()
            self.sums["yy"].add(squares, columns)

    def include(self, other: NormalEquations) -> None:
        """Add the sums over other data.

        Raises:
            ValueError: The widths differ.
        """
        if (self.inputs, self.outputs) != (other.inputs, other.outputs):
            raise ValueError("expected normal equations of the same widths")
        self.count += other.count
        for name, sums in self.sums.items():
            sums.include(other.sums[name])

    def __add__(self, other: NormalEquations) -> NormalEquations:
        both = NormalEquations(self.inputs, self.outputs, device=self.device)
        for each in (self, other):
            both.include(each)
        return both

    def solve(
        self, strength: float, columns: Tensor | None = None, *, intercept: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the ridge solution `(W [inputs, outputs], b [outputs])` in fp32.

        If rounding leaves the system without a solution, which happens when few inputs differ, the
        penalty is multiplied by ten until there is one.

        Args:
            strength: The penalty on W, in units of the inputs' mean square; b has no penalty.
            columns: `[outputs]`, true for the outputs to solve for (default: all).
            intercept: Whether there is a b; otherwise it is zero.

        Raises:
            ValueError: There are no tokens, or the strength is not positive.
        """
        if self.count == 0:
            raise ValueError("expected at least one token to fit on, got none")
        if not strength > 0:
            raise ValueError(f"expected a positive strength, got {strength}")
        inputs, xx, xy = self.inputs, self.xx, self.xy
        kept = inputs + intercept
        penalty = xx.diagonal()[:inputs].mean().clamp_min(1e-30) * strength
        system = xx[:kept, :kept].clone()
        system.diagonal()[:inputs] += penalty
        factor, failed = torch.linalg.cholesky_ex(system)
        while failed:
            penalty *= 10
            system.diagonal()[:inputs] += penalty
            factor, failed = torch.linalg.cholesky_ex(system)
        wanted = xy if columns is None else xy[:, columns]
        solution = torch.cholesky_solve(wanted[:kept], factor).float()
        return solution[:inputs], solution[-1] if intercept else torch.zeros_like(solution[0])

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the mean square error of a solution on this data, `[outputs]`."""
        full = torch.cat([weight, bias[None]]).double()
        square = (full * (self.xx @ full)).sum(dim=0) - 2 * (full * self.xy).sum(dim=0) + self.yy
        return square / max(self.count, 1)


def fit(
    train: NormalEquations, check: NormalEquations, groups: Sequence[int]
) -> tuple[Tensor, Tensor, list[float]]:
    """Choose the strength of each group of outputs on held-out tokens, then fit on all tokens.

    Args:
        train: Most of the tokens.
        check: The held-out tokens. Without any, the middle strength is used.
        groups: The numbers of consecutive outputs that share a strength.

    Returns:
        `W [inputs, outputs]`, `b [outputs]`, and the strength of each group.

    Raises:
        ValueError: The groups do not cover all outputs, or there are no tokens.
    """
    if sum(groups) != train.outputs:
        raise ValueError(f"expected groups of {train.outputs} outputs, got {list(groups)}")
    everything = train + check
    chosen = [len(STRENGTHS) // 2] * len(groups)
    if check.count and train.count:
        errors = torch.stack([check.error(*train.solve(value)) for value in STRENGTHS])
        grouped = [part.mean(dim=1) for part in errors.split(list(groups), dim=1)]
        chosen = [int(part.argmin()) for part in grouped]
    weight = torch.empty(everything.inputs, everything.outputs, device=everything.device)
    bias = torch.empty_like(weight[0])
    of_output = torch.repeat_interleave(torch.tensor(chosen), torch.tensor(list(groups)))
    for index in sorted(set(chosen)):
        columns = (of_output == index).to(weight.device)
        weight[:, columns], bias[columns] = everything.solve(STRENGTHS[index], columns)
    return weight, bias, [STRENGTHS[index] for index in chosen]
