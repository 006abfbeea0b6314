"""The hidden history: which two entries an exit layer compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cascade.core.arguments import as_int
from cascade.core.errors import UsageError

_NORMED = "+norm"


def exit_entries(layer: int, num_layers: int, *, from_end: bool = False) -> tuple[int, int]:
    """Return the two entries of the hidden history that an exit layer compares.

    The history has N+1 entries: entry 0 is the embeddings, entry k the output of layer k on the
    residual stream. Layer k compares entries k-1 and k. Counted from the end, that is `[-3], [-2]`
    for layer 29 of 30. The pair `[-2], [-1]` is layer 30; taking it for layer 29 is the off-by-one
    error that this function prevents.

    Args:
        layer: 1..N.
        num_layers: N.
        from_end: Count from the end, as negative indices.

    Raises:
        UsageError: There is no such layer (names the valid range).
    """
    own = as_int(layer)
    if own is None or not 1 <= own <= num_layers:
        raise UsageError(f"expected an exit layer in 1..{num_layers}, got {layer!r}")
    shift = num_layers + 1 if from_end else 0
    return own - 1 - shift, own - shift


@dataclass
class HiddenHistory:
    """The hidden history of some tokens, or some of its entries.

    Attributes:
        num_layers: N.
        entries: Entry number -> states on the residual stream, `[..., D]`.
        normed: The state after the final norm, `[..., D]`, or None.
    """

    num_layers: int
    entries: dict[int, Tensor] = field(default_factory=dict)
    normed: Tensor | None = None

    @classmethod
    def from_transformers(cls, hidden_states: Sequence[Tensor]) -> HiddenHistory:
        """Read what `output_hidden_states=True` returns; its last entry is after the final norm.

        Layer N's own output is not among them, so its pair is only known as "N+norm".

        Args:
            hidden_states: N+1 tensors `[B, T, D]`.
        """
        last = len(hidden_states) - 1
        return cls(last, dict(enumerate(hidden_states[:-1])), hidden_states[last])

    def pair(self, layer: int | str) -> tuple[Tensor, Tensor]:
        """Return the states that an exit layer compares: its input and its output.

        Args:
            layer: 1..N, or "N+norm" for the last layer's input and the state after the norm.

        Raises:
            UsageError: There is no such layer, or its states were not kept.
        """
        number = _number(layer, self.num_layers) if isinstance(layer, str) else layer
        before, after = exit_entries(number, self.num_layers)
        first = self.entries.get(before)
        second = self.normed if isinstance(layer, str) else self.entries.get(after)
        if first is None or second is None:
            raise UsageError(
                f"the states of layer {layer} are not in this history (it has entries "
                f"{sorted(self.entries)}{' and the normed state' * (self.normed is not None)})"
                + (
                    f"; hidden_states of transformers end behind the final norm, use {after}+norm"
                    if after == self.num_layers and self.normed is not None
                    else ""
                )
            )
        return first, second


def _number(name: str, num_layers: int) -> int:
    if name != f"{num_layers}{_NORMED}":
        raise UsageError(
            f"expected an exit layer in 1..{num_layers} or {num_layers}{_NORMED}, got {name!r}"
        )
    return num_layers
