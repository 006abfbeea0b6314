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
        name: For tables: "logit_lens", "ridge", ...
        multiplications: Per row, in addition to the LM head's own.
    """

    name: str
    multiplications: int

    def logits(self, hidden: Tensor) -> Tensor:
        """Return `[n, V]` from exit states `[n, D]`."""
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
        """Return `[n, V]` from exit states `[n, D]`."""
        return self.stack.decode(hidden[None])[0]


class RidgeHead:
    """An affine map from the RMS-normalized exit state to the final normed state, then the LM head.

    Args:
        stack: The model.
        weight: `[D, D]`, inputs first.
        bias: `[D]`.
        name: For tables.
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
        """Return `[n, V]` from exit states `[n, D]`."""
        return self.stack.decode_normed(self.normed(hidden)[None])[0]


class PropagationMap:
    """Predicts from an exit state what every upper layer needs of an exited token.

    That is one product for all upper layers together. For layers with separate projections it
    predicts keys and values before any norm and rotation, at the cost of the projections; for
    other layers it predicts the layer's input.

    Args:
        weight: `[D, layers * width]`, inputs first, the lowest upper layer first.
        bias: `[layers * width]`.
        first: The lowest upper layer, exit layer + 1.
        width: Outputs per layer.
        of_states: Whether layer inputs are predicted, in units of the exit state's size.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, *, first: int, width: int, of_states: bool
    ) -> None:
        self.weight, self.bias = weight, bias
        self.first, self.width, self.of_states = first, width, of_states

    def predict(self, hidden: Tensor) -> Tensor:
        """Return `[n, layers, width]` from exit states `[n, D]`."""
        predicted: Tensor = torch.addmm(self.bias, rms_normalized(hidden), self.weight)
        if self.of_states:
            predicted = predicted * weights_size(hidden)
        by_layer: Tensor = predicted.to(hidden.dtype).unflatten(-1, (-1, self.width))
        return by_layer


def weights_size(hidden: Tensor) -> Tensor:
    """Return the root mean square of each state, `[..., 1]`."""
    size: Tensor = hidden.float().square().mean(dim=-1, keepdim=True).clamp_min(1e-30).sqrt()
    return size
