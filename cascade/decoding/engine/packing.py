"""Weights packed once for oneDNN, which torch offers only through operators it does not document.

All uses of these operators are here, so that another release of torch needs a change in one
place. Where they are missing or do not support the dtype on this processor, nothing is packed, and
products use `functional.linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Rows that the layout of packed weights is optimized for.
_ROWS = 8


def pack(weight: Tensor) -> Tensor | None:
    """Return a packed copy of a weight, or None where this machine cannot pack it.

    Args:
        weight: `[outputs, inputs]`.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        multiply(weight.new_zeros((1, weight.shape[1])), packed)
    except (AttributeError, RuntimeError, NotImplementedError):
        # The operator is absent, or the processor lacks the instructions that the dtype needs.
        return None
    return packed


def multiply(rows: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `functional.linear(rows, weight, bias)` with a packed weight.

    Args:
        rows: `[..., inputs]`.
        packed: The result of `pack`.
        bias: `[outputs]`.
    """
    operator: Any = torch.ops.mkldnn._linear_pointwise
    made: Tensor = operator.default(rows, packed, bias, "none", [], "")
    return made
