"""Floating-point operations of counted token rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from cascade.models.counts import CountsRecord


class Layered(Protocol):
    """A model whose operations are counted, such as a `DecoderStack`."""

    @property
    def layers(self) -> Sequence[nn.Module] | nn.ModuleList:
        """Decoder layers 1 to N."""

    @property
    def attends(self) -> Sequence[bool]:
        """Whether each layer's attention compares every token with every earlier one."""

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""

    @property
    def vocab_size(self) -> int:
        """The number of outputs of the LM head."""


def flops(stack: Layered, counts: Counts, *, map_width: int = 0, head_size: int = 0) -> float:
    """Return the floating-point operations of counted token rows.

    A multiplication with an addition counts as two. Matrix products and attention are counted;
    norms, rotations and softmax are not (below 1 % for SmolLM2-135M). A mixture of experts is
    counted as if every expert ran, and updating a recurrent state is not counted.

    Args:
        stack: The model; only its sizes are used.
        counts: The token rows that were computed.
        map_width: The outputs of the propagation maps per upper layer.
        head_size: The multiplications of an exit head per row, in addition to the LM head's.
    """
    total, attends = 0.0, stack.attends
    for index, layer in enumerate(stack.layers):
        total += 2.0 * counts.layer_rows[index] * _matrices(layer)
        # Query times key, then weight times value, each with heads x head_dim multiplications.
        if attends[index]:
            total += 4.0 * counts.pairs[index] * _query_width(layer, stack.hidden_size)
        total += 2.0 * counts.key_value_rows[index] * _key_value_size(layer)
        total += 2.0 * counts.predicted_rows[index] * stack.hidden_size * map_width
    total += 2.0 * counts.lm_head_rows * stack.hidden_size * stack.vocab_size
    total += 2.0 * sum(counts.head_rows.values()) * head_size
    return total


def full_flops(stack: Layered, batch: int, length: int) -> float:
    """Return the operations of the full model over `batch` sequences of `length` tokens."""
    rows, depth = batch * length, len(stack.layers)
    counts = Counts.of(depth)
    counts.layer_rows = [rows] * depth
    counts.pairs = [rows * length] * depth
    counts.lm_head_rows = rows
    return flops(stack, counts)


def layer_flops(stack: Layered, batch: int, length: int) -> list[float]:
    """Return the operations of each decoder layer over `batch` sequences of `length` tokens.

    `full_flops` is their sum plus the LM head.
    """
    rows, depth = batch * length, len(stack.layers)
    found = []
    for index in range(depth):
        counts = Counts.of(depth)
        counts.layer_rows[index], counts.pairs[index] = rows, rows * length
        found.append(flops(stack, counts))
    return found


def _matrices(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)


def _query_width(layer: nn.Module, hidden_size: int) -> int:
    projection = getattr(getattr(layer, "self_attn", None), "q_proj", None)
    return projection.out_features if isinstance(projection, nn.Linear) else hidden_size


def _key_value_size(layer: nn.Module) -> int:
    attention = getattr(layer, "self_attn", None)
    found = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
    return sum(projection.weight.numel() for projection in found if projection is not None)


@dataclass
class Counts:
    """The token rows that were computed; index 0 is layer 1.

    Attributes:
        layer_rows: Rows that ran through a layer (queries, attention, output projection, MLP).
        pairs: Pairs of query and key in a layer's attention, including padding.
        key_value_rows: Rows for which a layer only projected keys and values.
        predicted_rows: Rows whose keys and values in a layer came from a ridge map.
        lm_head_rows: Rows that ran through the LM head, including those for exit decisions.
        head_rows: Rows that an exit head mapped before the LM head, by exit layer.
    """

    layer_rows: list[int]
    pairs: list[int]
    key_value_rows: list[int]
    predicted_rows: list[int]
    lm_head_rows: int = 0
    head_rows: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, num_layers: int) -> Counts:
        """Return counts of zero."""
        return cls([0] * num_layers, [0] * num_layers, [0] * num_layers, [0] * num_layers)

    def add_pass(self, rows: int, pairs: int) -> None:
        """Count rows that ran through all layers.

        Args:
            rows: The rows.
            pairs: Their pairs of query and key in the attention of each layer.
        """
        self.layer_rows = [count + rows for count in self.layer_rows]
        self.pairs = [count + pairs for count in self.pairs]

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            layer_rows=_sums(self.layer_rows, other.layer_rows),
            pairs=_sums(self.pairs, other.pairs),
            key_value_rows=_sums(self.key_value_rows, other.key_value_rows),
            predicted_rows=_sums(self.predicted_rows, other.predicted_rows),
            lm_head_rows=self.lm_head_rows + other.lm_head_rows,
            head_rows={
                layer: self.head_rows.get(layer, 0) + other.head_rows.get(layer, 0)
                for layer in sorted({*self.head_rows, *other.head_rows})
            },
        )

    def record(self) -> CountsRecord:
        """Return the counts as a record."""
        return CountsRecord(
            layer_rows=list(self.layer_rows),
            pairs=list(self.pairs),
            key_value_rows=list(self.key_value_rows),
            predicted_rows=list(self.predicted_rows),
            lm_head_rows=self.lm_head_rows,
            head_rows={str(layer): rows for layer, rows in self.head_rows.items()},
        )


def _sums(some: list[int], others: list[int]) -> list[int]:
    return [one + other for one, other in zip(some, others, strict=True)]
