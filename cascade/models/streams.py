"""The layout of the residual stream, which some families split into parallel streams."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StreamLayout:
    """How a family's layers take and return the residual stream.

    Most families have one stream, `[B, T, D]`. Gemma 3n keeps several, `[n, B, T, D]`, and so do
    hyper-connections, `[B, T, n, D]`. The hidden state of a token is then all of its streams, one
    after the other.

    Args:
        count: The number of streams, n.
        axis: The axis of the streams: 0 or 2; None for a single stream without an axis.

    Example:
        >>> import torch
        >>> StreamLayout(4, axis=0).joined(torch.zeros(4, 2, 3, 32)).shape
        torch.Size([2, 3, 128])
    """

    count: int = 1
    axis: int | None = None

    def joined(self, hidden: Tensor) -> Tensor:
        """Return hidden states as `[B, T, n * D]`, given a layer's input or output."""
        if self.axis is None:
            return hidden
        joined: Tensor = hidden.movedim(self.axis, 2).flatten(2)
        return joined

    def split(self, hidden: Tensor) -> Tensor:
        """Return hidden states as a layer takes them, given `[B, T, n * D]`."""
        if self.axis is None:
            return hidden
        parallel: Tensor = hidden.unflatten(2, (self.count, -1))
        return parallel.movedim(2, self.axis)


def layout_of(shape: tuple[int, ...], tokens: tuple[int, ...], width: int) -> StreamLayout | None:
    """Return the layout of a layer's output, or None if the shape is not that of hidden states.

    Args:
        shape: The shape of the output.
        tokens: The shape of the token ids, `(B, T)`; the two differ.
        width: The hidden size, D.

    Example:
        >>> layout_of((2, 3, 4, 32), (2, 3), 32)
        StreamLayout(count=4, axis=2)
    """
    if shape == (*tokens, width):
        return StreamLayout()
    if len(shape) != 4 or shape[3] != width:
        return None
    if shape[1:3] == tokens:
        return StreamLayout(shape[0], axis=0)
    if shape[:2] == tokens:
        return StreamLayout(shape[2], axis=2)
    return None
