"""Cosine similarity of hidden states, as profiles, exit rules and explanations all use it."""

from __future__ import annotations

import torch
from torch import Tensor

#: Vectors with norms outside of this range are multiplied in float64: in float32, the squares of
#: their components underflow or overflow.
_SHORT, _LONG = 1e-15, 1e18


def widened(hidden: Tensor) -> Tensor:
    """Return states in fp32; float64 states stay in float64."""
    return hidden if hidden.dtype is torch.float64 else hidden.float()


def norm(values: Tensor) -> Tensor:
    """Return Euclidean norms along the last dimension."""
    found: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return found


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine along the last dimension, in [-1, 1]; 0 if one vector is zero."""
    return cosine_of(a, norm(a), b, norm(b))


def cosine_of(a: Tensor, a_norm: Tensor, b: Tensor, b_norm: Tensor) -> Tensor:
    """Return the same as `cosine`, from norms that are already known."""
    # The product of two norms overflows or underflows before either norm does.
    product: Tensor = torch.linalg.vecdot(a, b)
    smallest = torch.finfo(product.dtype).tiny
    found = product / a_norm.clamp_min(smallest) / b_norm.clamp_min(smallest)
    extreme = (torch.minimum(a_norm, b_norm) < _SHORT) | (torch.maximum(a_norm, b_norm) > _LONG)
    if extreme.any():
        wide = (each[extreme].double() for each in torch.broadcast_tensors(a, b))
        found = found.masked_scatter(extreme, _normalized_product(*wide).to(found.dtype))
    # `clamp` keeps NaN, so that `analyze` can name the layer that overflowed.
    return found.clamp(-1.0, 1.0)


def _normalized_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of float64 vectors, each divided by its norm first."""
    smallest = torch.finfo(a.dtype).tiny
    units = (each / norm(each).clamp_min(smallest).unsqueeze(-1) for each in (a, b))
    product: Tensor = torch.linalg.vecdot(*units)
    return product
