"""A drafter's layer while it decodes: the texts of a batch, with keys and values of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.decoding.engine.compiled_layers import CompiledLayers
from cascade.decoding.engine.compiler import CompilerError
from cascade.decoding.engine.modules import LayerModules
from cascade.decoding.engine.rows import MAX_ROWS, Rows
from cascade.decoding.kv_cache import KeyValueCache
from cascade.drafters.network.drafter_network import DrafterNetwork
from cascade.drafters.network.layers import Tables, attend, rotary_tables
from cascade.models.probing import close
from cascade.models.stack import DecoderStack

#: The texts and the columns that there is room for at first.
_TEXTS, _COLUMNS = 1, 256


@dataclass(frozen=True)
class Columns:
    """Consecutive columns of one text.

    Attributes:
        text: The text.
        start: The first column.
        hidden: The layer's inputs, `[n, inputs]`.
    """

    text: int
    start: int
    hidden: Tensor


class DraftingLayer:
    """Computes a drafter's layer, compiled where that works, otherwise by its own modules.

    Drafts need not be exact, so the compiled layer computes in fp32, whatever the model's dtype.

    Args:
        stack: The model.
        network: The drafter in fp32. It is converted to the model's dtype if the layer is not
            compiled.
    """

    def __init__(self, stack: DecoderStack, network: DrafterNetwork) -> None:
        self._stack, self._network = stack, network
        self._compiled = _compiled_layer(stack, network)
        if self._compiled is None:
            network.to(stack.dtype)
        self.dtype = next(network.parameters()).dtype
        attention = network.layer.self_attn
        width = attention.head_dim
        self._shape = attention.k_proj.out_features // width, width
        self._cache = self._new_cache(_TEXTS, _COLUMNS)
        self._tables = self._tables_of(_COLUMNS)

    @property
    def is_compiled(self) -> bool:
        """Whether the layer is compiled."""
        return self._compiled is not None

    def linear(self, module: nn.Linear, rows: Tensor) -> Tensor:
        """Return `module(rows)` for rows `[R, inputs]`.

        Args:
            module: A projection in the dtype of the layer.
            rows: The rows.
        """
        if self._compiled is None or len(rows) > MAX_ROWS:
            return functional.linear(rows, module.weight, module.bias)
        return self._compiled.linear(module, rows)

    @torch.no_grad()
    def run(self, chunks: Sequence[Columns]) -> Tensor:
        """Write keys and values of some columns; return the last state of each chunk, `[n, D]`.

        Args:
            chunks: The columns, each of another text. Columns before them are written.
        """
        self._make_room(
            1 + max(chunk.text for chunk in chunks),
            max(chunk.start + len(chunk.hidden) for chunk in chunks),
        )
        if self._compiled is None or sum(len(chunk.hidden) for chunk in chunks) > MAX_ROWS:
            return torch.cat([self._run_alone(chunk) for chunk in chunks])
        sizes = [len(chunk.hidden) for chunk in chunks]
        rows = Rows.chains(
            [chunk.text for chunk in chunks], [chunk.start for chunk in chunks], sizes
        )
        cos, sin = (table[0][rows.position] for table in self._tables)
        hidden = torch.cat([chunk.hidden for chunk in chunks])
        made = self._compiled.run(0, 1, hidden, rows, (cos, sin), self._cache)
        return made[torch.tensor(sizes).cumsum(0) - 1]

    def _run_alone(self, chunk: Columns) -> Tensor:
        """Compute a chunk by the modules: the states of all columns but the last are not needed."""
        network, hidden, stop = self._network, chunk.hidden, chunk.start + len(chunk.hidden)
        cos, sin = (table[:, chunk.start : stop] for table in self._tables)
        queries, new_keys, new_values = network.heads(hidden[None], (cos, sin))
        keys, values = (buffer[chunk.text] for buffer in self._cache.buffers(0))
        keys[:, chunk.start : stop], values[:, chunk.start : stop] = new_keys[0], new_values[0]
        seen = keys[None, :, :stop], values[None, :, :stop]
        attended = attend(network.layer, queries[:, :, -1:], *seen, None)
        return network.output(hidden[None, -1:], attended)[0]

    def _make_room(self, texts: int, columns: int) -> None:
        old = self._cache
        if texts <= old.batch and columns <= old.capacity:
            return
        batch = old.batch if texts <= old.batch else 2 * texts
        capacity = old.capacity if columns <= old.capacity else 2 * columns
        self._cache = self._new_cache(batch, capacity)
        for buffer, kept in zip(self._cache.buffers(0), old.buffers(0), strict=True):
            buffer[: old.batch, :, : old.capacity] = kept
        self._tables = self._tables_of(capacity)

    def _new_cache(self, batch: int, capacity: int) -> KeyValueCache:
        cache = KeyValueCache(1, batch, capacity)
        cache.allocate(*self._shape, torch.empty(0, dtype=self.dtype, device=self._stack.device))
        return cache

    def _tables_of(self, length: int) -> Tables:
        cos, sin = rotary_tables(self._stack, length)
        return cos.to(self.dtype), sin.to(self.dtype)


@torch.no_grad()
def _compiled_layer(stack: DecoderStack, network: DrafterNetwork) -> CompiledLayers | None:
    """Return the compiled layer, or None if it cannot be compiled or computes something else."""
    if stack.device.type != "cpu" or not network.is_plain:
        return None
    # A drafter attends to all columns, also where the layer that it is a copy of does not.
    modules = replace(LayerModules.of(network.layer, stack.model.config), window=None)
    try:
        made = CompiledLayers([modules])
    except CompilerError:
        return None
    heads = modules.key_heads, modules.head_dim
    hidden = torch.linspace(-1, 1, 3 * network.hidden_size).sin().view(3, -1)
    cos, sin = rotary_tables(stack, 3)
    cache = KeyValueCache(1, 1, 3)
    cache.allocate(*heads, hidden)
    found = made.run(0, 1, hidden, Rows.chains([0], [0], [3]), (cos[0], sin[0]), cache)
    own = network.heads(hidden[None], (cos, sin))
    wanted = network.output(hidden[None], attend(network.layer, *own, None))[0]
    return made if close(found, wanted) else None
