"""Statistics of the residual stream over depth: norms, updates and massive activations."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cascade.core.schema import UNSET
from cascade.models.sublayers import Update, attention_modules
from cascade.stats.cosine import cosine, norm
from cascade.studies.explanations.records import (
    LayerRow,
    MassiveDimension,
    StreamEntry,
    TokenCount,
)

#: An activation is massive if its magnitude exceeds 100 and is at least about 1,000 times the
#: median magnitude of its hidden state (Sun et al. 2024, arXiv:2402.17762, section 2).
MASSIVE_MAGNITUDE = 100.0
MASSIVE_RATIO = 1000.0

#: Number of tokens with massive activations that the record lists.
_NAMED_TOKENS = 3


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Return the angles between vectors along the last dimension, in degrees."""
    return torch.rad2deg(torch.acos(cosine(a, b)))


def massive(hidden: Tensor) -> Tensor:
    """Return a mask of massive activations, by the definition of Sun et al. 2024.

    Args:
        hidden: Hidden states, `[B, T, D]`. The median magnitude is taken over each sequence.

    Returns:
        True for massive activations, `[B, T, D]`.
    """
    sizes = hidden.abs()
    return _beyond(sizes, _medians(sizes))


def _medians(sizes: Tensor) -> Tensor:
    """Return each sequence's median magnitude, `[B]`."""
    found: Tensor = sizes.flatten(1).median(dim=1).values
    return found


def _beyond(sizes: Tensor, medians: Tensor) -> Tensor:
    return (sizes > MASSIVE_MAGNITUDE) & (sizes > MASSIVE_RATIO * medians[:, None, None])


@contextlib.contextmanager
def attention_weights(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the attention weights that a layer returns, `[B, H, T, T]` per run."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        rest = output[1:] if isinstance(output, tuple) else ()
        found.extend(value for value in rest if isinstance(value, Tensor) and value.ndim == 4)

    handles = [module.register_forward_hook(keep) for module in attention_modules(layer)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _MassiveCount:
    """The massive activations of one dimension in one entry of the history."""

    count: int = 0
    first: int = 0
    largest: float = 0.0
    tokens: Counter[int] = field(default_factory=Counter)


class StreamStatistics:
    """Accumulate statistics of the residual stream, batch by batch.

    Medians exclude the first token of a sequence. Its norm can be a hundred times that of others.
    """

    def __init__(self) -> None:
        # Keep floats, not arrays. Kept arrays between temporary arrays of batches fragment the
        # heap, and memory grows with the number of tokens. The maximum resident set of
        # `cascade explain --layer 25` was 2.8 GB with arrays and 1.4 GB with floats.
        self._values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._heads: dict[int, list[list[float]]] = defaultdict(list)
        self._massive: dict[int, dict[int, _MassiveCount]] = defaultdict(dict)

    def _keep(self, name: str, number: int, values: Tensor) -> None:
        self._values[name][number].extend(values.tolist())

    def add_entry(self, entry: int, hidden: Tensor, ids: Tensor) -> None:
        """Add one entry of a batch's hidden history.

        Args:
            entry: Entry, 0..N.
            hidden: Hidden states, `[B, T, D]`.
            ids: Token ids, `[B, T]`.
        """
        hidden = hidden.float()
        sizes = hidden.abs()
        medians = _medians(sizes)
        self._keep("norm", entry, norm(hidden[:, 1:]).median(dim=1).values)
        self._keep("first_norm", entry, norm(hidden[:, 0]))
        self._keep("largest", entry, sizes.flatten(1).amax(dim=1))
        self._keep("median", entry, medians)
        rows, columns, dims = torch.nonzero(_beyond(sizes, medians), as_tuple=True)
        for row, column, dim in zip(rows.tolist(), columns.tolist(), dims.tolist(), strict=True):
            one = self._massive[entry].setdefault(dim, _MassiveCount())
            one.count += 1
            one.first += column == 0
            one.largest = max(one.largest, float(sizes[row, column, dim]))
            one.tokens[int(ids[row, column])] += 1

    def add_layer(
        self, layer: int, update: Update, weights: Tensor | None, delimiters: Tensor
    ) -> None:
        """Add the update of one layer in a batch.

        Args:
            layer: Layer, 1..N.
            update: Update of the layer.
            weights: Attention weights, `[B, H, T, T]`; None if the layer does not return them.
            delimiters: True for delimiters, `[B, T]`.
        """
        start, whole = update.hidden, update.whole
        length = norm(start[:, 1:]).clamp_min(1e-30)
        for name, added in (
            ("update", whole),
            ("attention", update.attention),
            ("mlp", update.mlp),
        ):
            ratio = norm(added[:, 1:]) / length
            self._keep(f"{name}_ratio", layer, ratio.median(dim=1).values)
            self._keep(f"{name}_angle", layer, angle(added, start)[:, 1:].mean(dim=1))
        self._keep("angle", layer, angle(start, start + whole).mean(dim=1))
        self._keep("similarity", layer, cosine(start, start + whole).mean(dim=1))
        self._keep("without_attention", layer, angle(start, start + update.mlp).mean(dim=1))
        self._keep("without_mlp", layer, angle(start, start + update.attention).mean(dim=1))
        if weights is None:
            return
        weights = weights.float()[:, :, 1:]
        self._heads[layer].extend(weights[..., 0].mean(dim=2).tolist())
        self._keep("first_token_attention", layer, weights[..., 0].mean(dim=(1, 2)))
        others = delimiters.clone()
        others[:, 0] = False
        to_others = (weights * others[:, None, None, :]).sum(dim=-1)
        self._keep("delimiter_attention", layer, to_others.mean(dim=(1, 2)))

    @property
    def has_weights(self) -> bool:
        """Whether any layer returned its attention weights."""
        return bool(self._heads)

    def layer_rows(self) -> list[LayerRow]:
        """Return one row per layer: norms, ratios, angles in degrees, attention to sinks.

        `attention_share` and `mlp_share` are the shares of attention and MLP in the angle. Each is
        the mean reduction of the angle when the sublayer is removed first and when it is removed
        last (Shapley 1953).
        """
        return [self._layer_row(layer) for layer in sorted(self._values["angle"])]

    def _layer_row(self, layer: int) -> LayerRow:
        turn = self._mean("angle", layer)
        without, alone = self._mean("without_attention", layer), self._mean("without_mlp", layer)
        share = None if turn == 0 else (turn - without + alone) / 2 / turn
        has_weights = layer in self._heads
        return LayerRow(
            layer=str(layer),
            update_ratio=self._mean("update_ratio", layer),
            update_angle=self._mean("update_angle", layer),
            attention_ratio=self._mean("attention_ratio", layer),
            attention_angle=self._mean("attention_angle", layer),
            mlp_ratio=self._mean("mlp_ratio", layer),
            mlp_angle=self._mean("mlp_angle", layer),
            angle=turn,
            similarity=self._mean("similarity", layer),
            first_token_attention=(
                self._mean("first_token_attention", layer) if has_weights else UNSET
            ),
            delimiter_attention=self._mean("delimiter_attention", layer) if has_weights else UNSET,
            attention_share=share,
            mlp_share=None if share is None else 1 - share,
            heads=(
                [float(value) for value in np.mean(self._heads[layer], axis=0)]
                if has_weights
                else None
            ),
        )

    def entry_rows(self, texts: dict[int, str]) -> list[StreamEntry]:
        """Return one row per entry of the hidden history: norms, magnitudes, massive activations.

        Args:
            texts: Text by token id. An id without a text is shown as a number.
        """
        return [
            StreamEntry(
                entry=entry,
                norm=self._mean("norm", entry),
                first_norm=self._mean("first_norm", entry),
                median=self._mean("median", entry),
                largest=max(self._values["largest"][entry]),
                massive=self._massive_rows(entry, texts),
            )
            for entry in sorted(self._values["norm"])
        ]

    def _massive_rows(self, entry: int, texts: dict[int, str]) -> list[MassiveDimension]:
        found = sorted(self._massive[entry].items(), key=lambda pair: -pair[1].largest)
        return [
            MassiveDimension(
                dimension=dim,
                activations=one.count,
                at_first_token=one.first,
                largest=one.largest,
                tokens=[
                    TokenCount(text=texts.get(number, str(number)), count=count)
                    for number, count in sorted(
                        one.tokens.items(), key=lambda pair: (-pair[1], pair[0])
                    )[:_NAMED_TOKENS]
                ],
            )
            for dim, one in found
        ]

    def _mean(self, name: str, number: int) -> float:
        return float(np.mean(self._values[name][number]))
