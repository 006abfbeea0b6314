"""The KV cache of a forward pass in which tokens exit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Selection:
    """Which tokens of a chunk `[B, T]` a layer computes, and which have exited below it.

    A layer needs only the keys and values of exited tokens.

    Args:
        active: `[B, T]`, true for tokens that the layer computes.
        exited: `[B, T]`, true for tokens that exited below it. All other tokens are padding.
    """

    def __init__(self, active: Tensor, exited: Tensor) -> None:
        self.active = active
        self.exited = exited
        self.rows, self.columns = torch.nonzero(active, as_tuple=True)
        self.exited_rows, self.exited_columns = torch.nonzero(exited, as_tuple=True)
        # With padding but no exits, compute all rows, as the model itself does.
        padded = len(self.exited_rows) == 0 and active.shape[1] > 1 and len(self.rows) > 0
        self.dense = padded or len(self.rows) == active.numel()

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """Packed rows grouped by sequence: sequences [G], packed index [G, M], place [n].

        `packed[g, m]` is the packed row of the m-th active token of sequence g. Sequences with
        fewer active tokens repeat their first. `place[i]` is the flat index g * M + m of packed
        row i.
        """
        counts = self.active.sum(dim=1)
        sequences = torch.nonzero(counts, as_tuple=True)[0]
        counts = counts[sequences]
        most = int(counts.max())
        first = counts.cumsum(0) - counts
        offset = torch.arange(most, device=counts.device)
        packed = first[:, None] + torch.where(offset < counts[:, None], offset, 0)
        group = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        place = group * most + torch.arange(len(group), device=counts.device) - first[group]
        return sequences, packed, place


class _Buffer(DynamicLayer):
    """One layer's keys and values, `[B, heads, capacity, head_dim]`."""

    keys: Any
    values: Any
    #: Keys of an indexer, which selects the tokens to attend to (sparse attention), `[B, T, d]`.
    indexer_keys: Any = None


class KeyValueCache(Cache):
    """Keys and values of every layer, in buffers that are allocated once.

    Layers may be filled to different columns. `window` sets the columns that the next calls write.
    In a plan made with this cache, the start of the window is the number of columns before the
    chunk.

    Args:
        num_layers: The number of layers.
        batch: The number of sequences.
        capacity: The maximum number of columns of a sequence.
        keep: Whether later calls read the columns that earlier calls wrote. A single chunk does not
            need this, since only one layer's keys and values are in use at a time.
    """

    def __init__(self, num_layers: int, batch: int, capacity: int, *, keep: bool = True) -> None:
        self._buffers = [
            _Buffer()  # type: ignore[no-untyped-call]
            for _ in range(num_layers)
        ]
        super().__init__(layers=list(self._buffers))
        self.batch, self.capacity, self.keep = batch, capacity, keep
        self.start = self.stop = 0
        self._packed: Selection | None = None
        #: The layers that stored keys and values, counted from 0.
        self.stored: set[int] = set()

    def window(self, start: int, stop: int) -> None:
        """Set the columns that the next calls write: start to stop - 1."""
        self.start, self.stop = start, stop

    @contextlib.contextmanager
    def packed(self, selection: Selection) -> Iterator[None]:
        """Interpret updates in the context as the active tokens of a selection, packed in a row."""
        self._packed = selection
        try:
            yield
        finally:
            self._packed = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns before the window."""
        return self.start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the first column of the window."""
        return self.start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of columns that attention sees, and the first of them."""
        return self.start + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; return all keys and values that attention sees.

        Args:
            key_states: `[B, heads, T, head_dim]`, or `[1, heads, n, head_dim]` if packed.
            value_states: Same shape as `key_states`.
            layer_idx: The layer, counted from 0.
            args: Ignored.
            kwargs: Ignored.
        """
        self.stored.add(layer_idx)
        if self._packed is not None:
            rows, columns = self._packed.rows, self._packed.columns
            return self.put(layer_idx, rows, columns, key_states[0], value_states[0])
        if not self.keep:
            return key_states, value_states
        buffer = self._buffer(layer_idx, key_states, value_states)
        buffer.keys[:, :, self.start : self.stop] = key_states
        buffer.values[:, :, self.start : self.stop] = value_states
        return self.read(layer_idx)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Write a layer's new indexer keys; return those of all columns up to the window end.

        Args:
            indexer_key_states: `[B, T, d]`.
            layer_idx: The layer, counted from 0.
        """
        if not self.keep:
            return indexer_key_states
        buffer = self._buffers[layer_idx]
        if buffer.indexer_keys is None:
            shape = (self.batch, self.capacity, indexer_key_states.shape[-1])
            buffer.indexer_keys = indexer_key_states.new_zeros(shape)
        buffer.indexer_keys[:, self.start : self.stop] = indexer_key_states
        kept: Tensor = buffer.indexer_keys[:, : self.stop]
        return kept

    def put(
        self, index: int, rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values `[heads, n, head_dim]` of n tokens; columns count in the window."""
        buffer = self._buffer(index, keys, values)
        buffer.keys[rows, :, self.start + columns] = keys.transpose(0, 1)
        buffer.values[rows, :, self.start + columns] = values.transpose(0, 1)
        return self.read(index)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values up to the window end, `[B, heads, stop, head_dim]`."""
        buffer = self._buffers[index if self.keep else 0]
        return buffer.keys[:, :, : self.stop], buffer.values[:, :, : self.stop]

    def allocate(self, heads: int, head_dim: int, like: Tensor) -> None:
        """Allocate all buffers, for code that writes to them directly.

        Args:
            heads: The heads of keys and values.
            head_dim: The width of a head.
            like: A tensor with their dtype and device.
        """
        shape = (self.batch, heads, self.capacity, head_dim)
        for index in range(len(self._buffers) if self.keep else 1):
            if self._buffers[index].keys is None:
                states = like.new_zeros(()).expand(shape)
                self._buffer(index, states, states)
            self.stored.add(index)

    def buffers(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values with all columns, `[B, heads, capacity, head_dim]`."""
        buffer = self._buffers[index if self.keep else 0]
        return buffer.keys, buffer.values

    def of_sequences(self, first: int, count: int) -> KeyValueCache:
        """Return a cache of consecutive sequences that shares its buffers with this one.

        The buffers have to be allocated, and columns are counted as here.
        """
        part = KeyValueCache(len(self._buffers), count, self.capacity)
        for own, buffer in zip(part._buffers, self._buffers, strict=True):
            own.keys = buffer.keys[first : first + count]
            own.values = buffer.values[first : first + count]
            own.is_initialized = True
        return part

    def _buffer(self, index: int, keys: Tensor, values: Tensor) -> _Buffer:
        # Without `keep`, all layers share one buffer, since each writes every column that it reads.
        buffer = self._buffers[index if self.keep else 0]
        shape = (self.batch, keys.shape[-3], self.capacity, keys.shape[-1])
        if buffer.keys is None or buffer.keys.shape != shape:
            # Zeros, because padding columns are masked but never written, and NaN * 0 is NaN.
            buffer.keys = keys.new_zeros(shape)
            buffer.values = values.new_zeros((*shape[:3], values.shape[-1]))
            buffer.is_initialized = True
        return buffer
