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

    The history has N+1 entries. Entry 0 is the embeddings, and entry k is the output of layer k on
    the residual stream. Layer k compares entries k-1 and k. For layer 29 of 30 these are entries
    `[-3]` and `[-2]`, counted from the end. The pair `[-2], [-1]` belongs to layer 30. Using it for
    layer 29 is the off-by-one error that this function prevents.

    Args:
        layer: 1..N.
        num_layers: N.
        from_end: Return negative indices, counted from the end.

    Raises:
        UsageError: The layer is outside 1..N; names the valid range.

    Example:
        >>> exit_entries(29, 30), exit_entries(29, 30, from_end=True)
        ((28, 29), (-3, -2))
    """
    own = as_int(layer)
    if own is None or not 1 <= own <= num_layers:
        raise UsageError(f"expected an exit layer in 1..{num_layers}, got {layer!r}")
    shift = num_layers + 1 if from_end else 0
    return own - 1 - shift, own - shift


@dataclass
class HiddenHistory:
    """The hidden history of some tokens; it may have only some of the entries.

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
        """Return the history of a model called with `output_hidden_states=True`.

        The last of those states is after the final norm. The output of layer N is not among them,
        so the pair of layer N is only available as "N+norm".

        Args:
            hidden_states: N+1 tensors `[B, T, D]`.
        """
        last = len(hidden_states) - 1
        return cls(last, dict(enumerate(hidden_states[:-1])), hidden_states[last])

    def pair(self, layer: int | str) -> tuple[Tensor, Tensor]:
        """Return the states that an exit layer compares: its input and its output.

        Args:
            layer: 1..N, or "N+norm" for the last layer's input and the state after the final norm.

        Raises:
            UsageError: The layer is outside 1..N, or the history does not have its states.
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
                    f"; hidden_states of transformers end after the final norm, use {after}+norm"
                    if after == self.num_layers and self.normed is not None
                    else ""
                )
            )
        # Neighbouring layers can be on different devices (`device_map`).
        return first.to(second.device), second


def _number(name: str, num_layers: int) -> int:
    if name != f"{num_layers}{_NORMED}":
        raise UsageError(
            f"expected an exit layer in 1..{num_layers} or {num_layers}{_NORMED}, got {name!r}"
        )
    return num_layers
