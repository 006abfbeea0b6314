"""Layers with fused weights in PyTorch, for machines and dtypes for which nothing is compiled.

When one token is decoded, the operations between the matrix products take as long as the products
themselves. Layers with Llama's modules compute the same result with fewer operations, and with
weights that belong together in one product.

In half precision, each row is computed with the same roundings as in the model, so that a draft is
verified with the model's own logits, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.decoding.engine.matrices import Choice, Matrix, Shape
from cascade.decoding.engine.modules import LayerModules
from cascade.decoding.engine.rows import Rows
from cascade.decoding.kv_cache import KeyValueCache


class FusedLayers:
    """Decoder layers with Llama's modules.

    Args:
        layers: The layers.
        choose: Returns the kernels for a shape.
        exact: Whether each operation has to round as the model's own does (half precision).
    """

    def __init__(
        self, layers: Sequence[LayerModules], choose: Callable[[Shape], Choice], *, exact: bool
    ) -> None:
        self.exact = exact
        self._layers = [_FusedLayer(layer, choose, exact=exact) for layer in layers]
        #: The product of each LM head, and the weights that it was made of.
        self._heads: dict[nn.Linear, tuple[_Weights, Matrix]] = {}
        self._choose = choose

    @property
    def copied_bytes(self) -> int:
        """The memory of copies of weights, in bytes."""
        matrices = [matrix for layer in self._layers for matrix in layer.matrices]
        matrices += [matrix for _, matrix in self._heads.values()]
        return sum(matrix.copied_bytes for matrix in matrices)

    @property
    def description(self) -> str:
        """What computes the layers, for records."""
        kernels = sorted({matrix.kernel for layer in self._layers for matrix in layer.matrices})
        return "fused, " + " and ".join(kernels)

    def run(
        self,
        below: int,
        last: int,
        hidden: Tensor,
        rows: Rows,
        tables: tuple[Tensor, Tensor],
        cache: KeyValueCache,
    ) -> Tensor:
        """Return the output of layers below + 1 to last, `[R, D]`; see `CompiledLayers.run`."""
        cos, sin = tables
        half = sin.shape[-1] // 2
        signed = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
        turning = (cos[:, None], signed[:, None])
        attend = _attention_of(rows, exact=self.exact)
        first = self._layers[below]
        cache.allocate(first.key_heads, first.head_dim, hidden)
        for number in range(below, last):
            hidden = self._layers[number].run(hidden, rows, turning, cache.buffers(number), attend)
        return hidden

    def linear(self, module: nn.Linear, rows: Tensor) -> Tensor:
        """Return `module(rows)`, `[R, outputs]`; see `CompiledLayers.linear`."""
        found = self._heads.get(module)
        if found is None or not found[0].are_of(module):
            made = Matrix([module], self._choose(Shape.of([module])))
            found = self._heads[module] = _Weights(module), made
        return found[1](rows)


class _Weights:
    """The weights of a projection, to find out whether they have changed.

    Args:
        module: The projection.
    """

    def __init__(self, module: nn.Linear) -> None:
        self._weights = [
            (weight, weight.data_ptr(), weight._version) for weight in module.parameters()
        ]

    def are_of(self, module: nn.Linear) -> bool:
        """Return whether a projection still has these weights."""
        found = list(module.parameters())
        return len(found) == len(self._weights) and all(
            new is weight and new.data_ptr() == address and new._version == version
            for new, (weight, address, version) in zip(found, self._weights, strict=True)
        )


#: Attention of all rows of a call: queries [R, heads, head_dim], keys and values of the layer
#: [B, key_heads, capacity, head_dim], scaling, window.
_Attention = Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor]


class _FusedLayer:
    """One decoder layer.

    Args:
        layer: Its modules.
        choose: Returns the kernels for a shape.
        exact: See `FusedLayers`.
    """

    __slots__ = (
        "_attention_norm",
        "_down",
        "_gate_up",
        "_mlp_norm",
        "_modules",
        "_out",
        "_qkv",
        "exact",
        "head_dim",
        "heads",
        "key_heads",
    )

    def __init__(
        self, layer: LayerModules, choose: Callable[[Shape], Choice], *, exact: bool
    ) -> None:
        def matrix(*modules: nn.Linear) -> Matrix:
            return Matrix(modules, choose(Shape.of(modules)))

        self._modules = layer
        self.exact = exact
        self._qkv = matrix(layer.query, layer.key, layer.value)
        self._out = matrix(layer.out)
        self._gate_up = matrix(layer.gate, layer.up)
        self._down = matrix(layer.down)
        self._attention_norm = _norm_of(layer.attention_norm, exact=exact)
        self._mlp_norm = _norm_of(layer.mlp_norm, exact=exact)
        self.head_dim, self.heads, self.key_heads = layer.head_dim, layer.heads, layer.key_heads

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The layer's products."""
        return self._qkv, self._out, self._gate_up, self._down

    def run(
        self,
        hidden: Tensor,
        rows: Rows,
        turning: tuple[Tensor, Tensor],
        buffers: tuple[Tensor, Tensor],
        attend: _Attention,
    ) -> Tensor:
        """Return the layer's output, `[R, D]`, and write its keys and values.

        Args:
            hidden: The layer's input, `[R, D]`.
            rows: The rows.
            turning: Cosines and signed sines of the positions, `[R, 1, head_dim]`.
            buffers: The layer's keys and values, `[B, key_heads, capacity, head_dim]`.
            attend: Computes the attention.
        """
        count, queries, keys = len(hidden), self.heads, self.key_heads
        heads = self._qkv(self._attention_norm(hidden)).view(count, -1, self.head_dim)
        both, values = heads[:, : queries + keys], heads[:, queries + keys :]
        if self._modules.query_norm is not None and self._modules.key_norm is not None:
            both = torch.cat(
                [
                    self._modules.query_norm(both[:, :queries]),
                    self._modules.key_norm(both[:, queries:]),
                ],
                dim=1,
            )
        if self._modules.rotates:
            both = self._rotated(both, *turning)
        known, seen = buffers
        known[rows.sequence, :, rows.column] = both[:, queries:]
        seen[rows.sequence, :, rows.column] = values
        attended = attend(
            both[:, :queries], known, seen, self._modules.scaling, self._modules.window
        )
        hidden = hidden + self._out(attended.reshape(count, -1))
        gate, up = self._gate_up(self._mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self._down(self._modules.act(gate) * up)

    def _rotated(self, heads: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
        """Rotate queries and keys, `[R, heads, head_dim]`, to their positions."""
        turned = heads.roll(self.head_dim // 2, dims=-1)
        if self.exact:  # addcmul rounds once, the model twice
            return heads * cos + turned * signed
        return torch.addcmul(heads * cos, turned, signed)


def _attention_of(rows: Rows, *, exact: bool) -> _Attention:
    """Return a function that computes the attention of rows.

    Args:
        rows: The rows.
        exact: Compute each row by itself over exactly the columns that it sees, as the model does
            when it decodes one token.
    """
    sequences, firsts, bases = rows.sequence.tolist(), rows.first.tolist(), rows.base.tolist()
    stop = int(torch.maximum(rows.base, rows.column + 1).max())

    def one_by_one(
        queries: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        found = []
        for row, sequence in enumerate(sequences):
            end = bases[row]
            begin = firsts[row] if window is None else max(firsts[row], end - window)
            known, seen = (
                states[sequence : sequence + 1, :, begin:end] for states in (keys, values)
            )
            found.append(_attend(queries[None, row : row + 1], known, seen, None, scaling)[0])
        return torch.cat(found)

    masks: dict[int | None, Tensor] = {}

    def together(
        queries: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        if window not in masks:
            masks[window] = rows.visible(stop, window).to(queries.device)
        mask = masks[window]
        known, seen = keys[:, :, :stop], values[:, :, :stop]
        if sequences == list(range(len(keys))):  # one row of every sequence
            return _attend(queries[:, None], known, seen, mask[:, None], scaling)[:, 0]
        made = torch.empty_like(queries)
        for number in dict.fromkeys(sequences):
            own = rows.sequence == number
            part = slice(number, number + 1)
            made[own] = _attend(
                queries[own][None], known[part], seen[part], mask[own][None], scaling
            )[0]
        return made

    return one_by_one if exact else together


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Return the attention of queries, `[B, T, heads, head_dim]`.

    Args:
        queries: `[B, T, heads, head_dim]`.
        keys: `[B, key_heads, L, head_dim]`.
        values: `[B, key_heads, L, head_dim]`.
        mask: What each query sees, `[B, T, L]`, or None for everything.
        scaling: The factor of the scores.
    """
    made: Tensor = functional.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys,
        values,
        attn_mask=None if mask is None else mask[:, None],
        scale=scaling,
        enable_gqa=queries.shape[2] != keys.shape[1],
    )
    return made.transpose(1, 2)


def _norm_of(norm: Any, *, exact: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that computes a norm with fewer operations, or the norm itself."""
    epsilon = getattr(norm, "variance_epsilon", None)
    if epsilon is None:
        made: Callable[[Tensor], Tensor] = norm
        return made
    weight = norm.weight

    def fused(hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, epsilon)

    def rounded_twice(hidden: Tensor) -> Tensor:
        plain = functional.rms_norm(hidden.float(), weight.shape, None, epsilon)
        made: Tensor = weight * plain.to(hidden.dtype)
        return made

    return rounded_twice if exact else fused
