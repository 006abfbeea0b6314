"""Sums over a corpus from which exit heads and propagation maps are fitted in closed form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cascade.core.arrays import Array
from cascade.core.errors import ModelError, not_finite
from cascade.exits.fitted_heads import HELD_OUT, FittedHeads
from cascade.exits.heads import root_mean_square
from cascade.exits.records import HeadsProvenance
from cascade.models.stack import DecoderStack
from cascade.stats.ridge import NormalEquations, fit, rms_normalized

#: Sequences on which a head is fitted, and those on which its strength is chosen.
_GROUPS = ("train", "held-out")


class HeadSums:
    """The sums over a corpus from which heads and propagation maps follow.

    The same batches give the same bits, in any order and in any grouping into several sums.

    Args:
        stack: The model.
        layers: Exit layers, sorted.
    """

    def __init__(self, stack: DecoderStack, layers: Sequence[int]) -> None:
        self.stack, self.layers = stack, list(layers)
        found = [_projections(layer) for layer in stack.layers]
        widths = {projection.out_features for pair in found for projection in pair or ()}
        # A map predicts keys and values of one width, or else the inputs of the layers.
        self.of_states = None in found or len(widths) > 1
        self.projections = [] if self.of_states else found
        self.width = stack.hidden_size if self.of_states else 2 * widths.pop()
        self.equations = {
            layer: [
                NormalEquations(
                    stack.hidden_size,
                    stack.hidden_size + (stack.num_layers - layer) * self.width,
                    device=stack.device if stack.device.type != "mps" else torch.device("cpu"),
                )
                for _ in _GROUPS
            ]
            for layer in layers
        }

    def add(self, ids: npt.NDArray[np.int32], numbers: npt.NDArray[np.integer[Any]]) -> None:
        """Add a batch.

        Args:
            ids: Token ids, `[B, T]`.
            numbers: The number of each sequence in the corpus, `[B]`. One in ten is held out.

        Raises:
            ModelError: A layer's output is NaN or infinite (the message names the layer).
        """
        history: dict[int, Tensor] = {}
        kept = set(self.layers) | {self.stack.num_layers}
        if self.of_states:
            kept |= set(range(min(self.layers), self.stack.num_layers))

        def keep(entry: int, hidden: Tensor) -> None:
            if entry in kept:
                history[entry] = hidden.flatten(0, 1)

        # Held-out sequences are moved to the end, so that both groups are slices without a copy.
        held_out = numbers % 10 == HELD_OUT
        ids = ids[np.argsort(held_out, kind="stable")]
        with _captured(self.projections[min(self.layers) :]) as raw:
            normed = self.stack.visit(torch.from_numpy(ids).long().to(self.stack.device), keep)
        final = history[self.stack.num_layers] if normed is None else normed.flatten(0, 1)
        trained = int((~held_out).sum()) * ids.shape[1]
        for layer in self.layers:
            targets = [final, *self._upper(layer, history, raw)]
            x = rms_normalized(history[layer])
            for equations, rows in zip(
                self.equations[layer], (slice(trained), slice(trained, None)), strict=True
            ):
                if len(x[rows]):
                    self._update(equations, x[rows], [y[rows] for y in targets], layer, history)

    def _update(
        self,
        equations: NormalEquations,
        x: Tensor,
        targets: list[Tensor],
        layer: int,
        history: dict[int, Tensor],
    ) -> None:
        device = equations.device
        try:
            equations.update(x.to(device), *(y.to(device) for y in targets))
        except ValueError as error:
            for entry, states in sorted(history.items()):
                if not torch.isfinite(states).all():
                    raise not_finite(
                        f"layer {entry} gives NaN or infinite hidden states"
                    ) from error
            raise ModelError(f"exit layer {layer}: {error}; use a wider --dtype") from error

    def _upper(self, layer: int, history: dict[int, Tensor], raw: list[Tensor]) -> list[Tensor]:
        """Return the targets of the upper layers, `width` outputs each, the lowest layer first."""
        if self.of_states:
            size = root_mean_square(history[layer])
            return [
                history[entry].float() / size.to(history[entry].device)
                for entry in range(layer, self.stack.num_layers)
            ]
        return [values.flatten(0, 1) for values in raw[2 * (layer - min(self.layers)) :]]

    def arrays(self) -> dict[str, Array]:
        """Return the sums as arrays, for `include`."""
        return {name: part.cpu().numpy() for name, part in self._parts()} | {
            "count": np.array(self._counts(), dtype=np.int64)
        }

    def include(self, arrays: Mapping[str, Array]) -> None:
        """Add the sums over other batches of the corpus.

        Args:
            arrays: What `arrays` returned for them, for the same model and exit layers.

        Raises:
            KeyError: An array is missing.
            ValueError: An array has another shape, dtype or values that are not finite.
        """
        counts = arrays["count"]
        if counts.dtype != np.int64 or counts.shape != (len(self._all()),) or (counts < 0).any():
            raise ValueError("expected the numbers of tokens of each sum")
        for name, part in self._parts():
            other = arrays[name]
            if other.dtype != np.float64 or other.shape != tuple(part.shape):
                raise ValueError(f"expected {name} of shape {list(part.shape)} in float64")
            if not np.isfinite(other).all():
                raise ValueError(f"expected finite numbers in {name}")
            part += torch.from_numpy(np.ascontiguousarray(other)).to(part.device)
        for each, count in zip(self._all(), counts.tolist(), strict=True):
            each.count += count

    def _all(self) -> list[NormalEquations]:
        return [each for layer in self.layers for each in self.equations[layer]]

    def _counts(self) -> list[int]:
        return [each.count for each in self._all()]

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        for layer in self.layers:
            for group, equations in zip(_GROUPS, self.equations[layer], strict=True):
                for name, sums in equations.sums.items():
                    yield f"{layer}.{group}.{name}.coarse", sums.coarse
                    yield f"{layer}.{group}.{name}.fine", sums.fine

    def fit(self) -> FittedHeads:
        """Return the heads and maps that fit best.

        Raises:
            ValueError: There are no tokens.
        """
        weights, maps, strengths = {}, {}, {}
        hidden = self.stack.hidden_size
        for layer, (train, held_out) in self.equations.items():
            groups = [hidden] + [self.width] * (self.stack.num_layers - layer)
            weight, bias, chosen = fit(train, held_out, groups)
            weights[layer] = (weight[:, :hidden].clone(), bias[:hidden].clone())
            if layer < self.stack.num_layers:
                maps[layer] = (weight[:, hidden:].clone(), bias[hidden:].clone())
            strengths[str(layer)] = chosen
        return FittedHeads(
            weights, maps, self.width, self.of_states, HeadsProvenance(strengths=strengths)
        )


def _projections(layer: nn.Module) -> list[Any] | None:
    """Return a layer's key and value projections, or None if they are not separate modules."""
    attention = getattr(layer, "self_attn", None)
    found = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
    if all(isinstance(projection, nn.Linear) for projection in found):
        return found
    return None


@contextlib.contextmanager
def _captured(projections: Sequence[Sequence[nn.Module] | None]) -> Iterator[list[Tensor]]:
    """Collect the outputs of the layers' key and value projections, `[B, T, width]` each."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        kept.append(output)

    with contextlib.ExitStack() as hooks:
        for pair in projections:
            for projection in pair or ():
                hooks.callback(projection.register_forward_hook(keep).remove)
        yield kept
