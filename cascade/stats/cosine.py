"""Cosine similarity of hidden states, as profiles, exit rules and explanations all use it."""

from __future__ import annotations

import torch
from torch import Tensor


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
    # `clamp` keeps NaN, so that `analyze` can name the layer that overflowed.
    product: Tensor = torch.linalg.vecdot(a, b)
    return (product / (a_norm * b_norm).clamp_min(1e-30)).clamp(-1.0, 1.0)
