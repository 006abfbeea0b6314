"""Histories to test exit layers and rules with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.exits.history import HiddenHistory
from cascade.exits.rules import ExitPoint, find_rule
from support.reference_early_exit import (
    LAYERS,
)


def a_point(
    logits: Tensor | None = None,
    *,
    layer: int = 3,
    history: HiddenHistory | None = None,
    count: int | None = None,
    **changes: Any,
) -> ExitPoint:
    """Return an exit point of as many tokens as there are logits, `[n, V]`."""
    count = count or (1 if logits is None else len(logits))
    settings: dict[str, Any] = {
        "token_ids": torch.arange(count),
        "positions": torch.arange(count),
    }

    def compute() -> Tensor:
        assert logits is not None, "the logits must not be computed"
        return logits

    return ExitPoint(layer, history or HiddenHistory(LAYERS), compute, **settings | changes)


def confidence(name: str, at: ExitPoint) -> Tensor:
    values = find_rule(name).confidence(at)
    assert values.shape == at.token_ids.shape
    assert values.dtype == torch.float32
    return values


DRAWS = 100_000


def drawn(*, seed: int = 0, layer: int = 29, **changes: Any) -> np.ndarray[Any, Any]:
    at = a_point(layer=layer, count=DRAWS, seed=seed, **changes)
    return confidence("random", at).double().numpy()
