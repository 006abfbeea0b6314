"""Ridge regression as a textbook has it."""

from __future__ import annotations

import torch
from torch import Tensor


def textbook_ridge(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Solve with centred data, so that the intercept is free of the penalty, in float64."""
    a, b = x.double(), y.double()
    centred = a - a.mean(dim=0)
    penalty = strength * a.square().mean() * len(a)
    system = centred.T @ centred + penalty * torch.eye(a.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(system, centred.T @ (b - b.mean(dim=0)))
    return weight.float(), (b.mean(dim=0) - a.mean(dim=0) @ weight).float()
