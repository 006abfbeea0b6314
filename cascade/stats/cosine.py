"""Similarity: the cosine of two states, the one formula behind profiles, rules and explanations."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(hidden: Tensor) -> Tensor:
    """Return states in fp32, or in float64 where they are that already."""
    return hidden if hidden.dtype is torch.float64 else hidden.float()


def norm(values: Tensor) -> Tensor:
    """Return Euclidean norms along the last dimension."""
    found: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return found


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine along the last dimension, 0 beside a zero vector, within [-1, 1]."""
    return cosine_of(a, norm(a), b, norm(b))


def cosine_of(a: Tensor, a_norm: Tensor, b: Tensor, b_norm: Tensor) -> Tensor:
    """Return what `cosine` does, where the norms are known already."""
    # torch.clamp keeps NaN, which is refused by the layer's name.
    product: Tensor = torch.linalg.vecdot(a, b)
    return (product / (a_norm * b_norm).clamp_min(1e-30)).clamp(-1.0, 1.0)
