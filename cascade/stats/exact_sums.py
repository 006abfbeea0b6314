"""Sums of float32 numbers that do not depend on their order or on who added what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Numbers are rounded to multiples of 2**_FINE, and split at 2**_COARSE. Both parts then add up in
#: float64 without rounding: the coarse one to 2**49 in all, the fine one over 2**24 additions.
_FINE, _COARSE = -34, -4

#: Adding and subtracting this rounds a float64 to a multiple of 2**_FINE or 2**_COARSE.
_ROUND_FINE, _ROUND_COARSE = (1.5 * 2.0 ** (52 + exponent) for exponent in (_FINE, _COARSE))

#: Numbers that are split at a time, so that the intermediate results stay in the processor's cache.
_AT_A_TIME = 1 << 15


class ExactSum:
    """The sum of float32 tensors of one shape, equal to the bit for any order and grouping.

    Each number is rounded to a multiple of 2**-34 (6e-11), once. After that nothing is rounded, up
    to sums of 5e14 and 16 million additions. Beyond these, the sum is as exact as one in float64,
    but depends on the order.

    Args:
        shape: The shape of the tensors.
        device: The device that holds the sum.

    Example:
        >>> parts = torch.tensor([[1e8], [0.1], [-1e8]])
        >>> one, other = ExactSum((1,)), ExactSum((1,))
        >>> for number in (0, 1, 2):
        ...     one.add(parts[number])
        >>> for number in (2, 0, 1):
        ...     other.add(parts[number])
        >>> torch.equal(one.total(), other.total())
        True
    """

    def __init__(self, shape: Sequence[int], *, device: torch.device | None = None) -> None:
        self.coarse = torch.zeros(*shape, dtype=torch.float64, device=device)
        self.fine = torch.zeros_like(self.coarse)

    def add(self, values: Tensor, columns: slice = slice(None)) -> None:
        """Add a tensor.

        Args:
            values: Finite float32 numbers, of the shape of the sum or of its columns.
            columns: The part of the last dimension that they belong to (default: all of it).
        """
        wanted = (values, self.coarse[..., columns], self.fine[..., columns])
        rows = max(1, _AT_A_TIME * len(values) // max(1, values.numel()))
        for each, coarse, fine in zip(*(part.split(rows) for part in wanted), strict=True):
            wide = each.double()
            upper = (wide + _ROUND_COARSE).sub_(_ROUND_COARSE)
            coarse += upper
            fine += wide.sub_(upper).add_(_ROUND_FINE).sub_(_ROUND_FINE)

    def include(self, other: ExactSum) -> None:
        """Add the numbers of another sum of the same shape."""
        self.coarse += other.coarse.to(self.coarse.device)
        self.fine += other.fine.to(self.fine.device)

    def total(self) -> Tensor:
        """Return the sum, in float64."""
        return self.coarse + self.fine
