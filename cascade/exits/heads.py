"""Exit heads and propagation maps: from an exit state to logits, keys and values."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cascade.models.stack import DecoderStack
from cascade.stats.ridge import rms_normalized


class ExitHead(Protocol):
    """Turns exit states into logits.

    Attributes:
        name: The name in tables: "logit_lens", "ridge", ...
        multiplications: Multiplications per row, in addition to those of the LM head.
    """

    name: str
    multiplications: int

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[n, V]` of exit states `[n, D]`."""
        ...


class LogitLens:
    """The model's own final norm and LM head, applied to the exit state (nostalgebraist 2020).

    Args:
        stack: The model.
    """

    name = "logit_lens"
    multiplications = 0

    def __init__(self, stack: DecoderStack) -> None:
        self.stack = stack

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[n, V]` of exit states `[n, D]`."""
        return self.stack.decode(hidden[None])[0]


class RidgeHead:
    """An affine map from the RMS-normalized exit state to the final normed state, then the LM head.

    Args:
        stack: The model.
        weight: `[D, D]`; the first dimension is the input.
        bias: `[D]`.
        name: The name in tables.
    """

    def __init__(
        self, stack: DecoderStack, weight: Tensor, bias: Tensor, *, name: str = "ridge"
    ) -> None:
        self.stack = stack
        self.name = name
        self.weight = weight.to(stack.device)
        self.bias = bias.to(stack.device)
        self.multiplications = self.weight.numel()

    def normed(self, hidden: Tensor) -> Tensor:
        """Return the predicted final normed state, `[n, D]`."""
        return torch.addmm(self.bias, rms_normalized(hidden), self.weight).to(hidden.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[n, V]` of exit states `[n, D]`."""
        return self.stack.decode_normed(self.normed(hidden)[None])[0]


class PropagationMap:
    """Predicts the keys and values of exited tokens for all upper layers from their exit states.

    One matrix product serves all upper layers. If the layers have separate key and value
    projections, the map predicts their outputs, before any norm and rotation, at the same cost as
    the projections. Otherwise it predicts the input of each layer.

    Args:
        weight: `[D, layers * width]`; the first dimension is the input, and the lowest upper layer
            comes first in the second.
        bias: `[layers * width]`.
        first: The lowest upper layer (exit layer + 1).
        width: Outputs per layer.
        of_states: Whether the map predicts layer inputs, relative to the exit state's root mean
            square.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, *, first: int, width: int, of_states: bool
    ) -> None:
        self.weight, self.bias = weight, bias
        self.first, self.width, self.of_states = first, width, of_states

    def predict(self, hidden: Tensor) -> Tensor:
        """Return the predictions `[n, layers, width]` of exit states `[n, D]`."""
        predicted: Tensor = torch.addmm(self.bias, rms_normalized(hidden), self.weight)
        if self.of_states:
            predicted = predicted * root_mean_square(hidden)
        by_layer: Tensor = predicted.to(hidden.dtype).unflatten(-1, (-1, self.width))
        return by_layer


def root_mean_square(hidden: Tensor) -> Tensor:
    """Return the root mean square of each state, `[..., 1]`."""
    size: Tensor = hidden.float().square().mean(dim=-1, keepdim=True).clamp_min(1e-30).sqrt()
    return size
