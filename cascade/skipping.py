"""Decoder layers computed for some of the tokens only: KV cache, packed rows, counted work.

A token that left still owes the upper layers its keys and values, because later tokens attend to
them. Everything else of those layers (queries, attention, output projection, MLP) is computed for
the remaining tokens alone: they are packed into one row, `[1, n, D]`, and go through the layer's
own forward, whose attention is unpacked per sequence.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from cascade.errors import first_line
from cascade.lean import LeanLayers
from cascade.models import DecoderStack, LayerCall

#: The name under which packed attention is registered with `transformers`.
_PACKED = "cascade_packed"

#: The implementations of attention that take a mask per query, as packed queries need one.
_UNPACKABLE = ("eager", "sdpa")


@dataclass
class Counts:
    """What was really computed, in token rows; index 0 is layer 1.

    Attributes:
        layer_rows: Rows that went through a layer: queries, attention, output projection, MLP.
        pairs: Pairs of query and key in a layer's attention, padding included.
        key_value_rows: Rows of which a layer only projected keys and values.
        predicted_rows: Rows whose keys and values in a layer came from a ridge map.
        lm_head_rows: Rows that went through the LM head, probing included.
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
        """Return counts of nothing."""
        return cls([0] * num_layers, [0] * num_layers, [0] * num_layers, [0] * num_layers)

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

    def record(self) -> dict[str, Any]:
        """Return the counts as a record holds them."""
        return {
            "layer_rows": list(self.layer_rows),
            "pairs": list(self.pairs),
            "key_value_rows": list(self.key_value_rows),
            "predicted_rows": list(self.predicted_rows),
            "lm_head_rows": self.lm_head_rows,
            "head_rows": {str(layer): rows for layer, rows in self.head_rows.items()},
        }


def _sums(some: list[int], others: list[int]) -> list[int]:
    return [one + other for one, other in zip(some, others, strict=True)]


class Selection:
    """Which tokens of a chunk `[B, T]` a layer computes, and which only owe it keys and values.

    Args:
        active: `[B, T]`, true for the tokens that go through the layer.
        exited: `[B, T]`, true for those that left below it. What is neither is padding.
    """

    def __init__(self, active: Tensor, exited: Tensor) -> None:
        self.active = active
        self.exited = exited
        self.rows, self.columns = torch.nonzero(active, as_tuple=True)
        self.exited_rows, self.exited_columns = torch.nonzero(exited, as_tuple=True)
        # Padding alone is no reason to pack: a dense pass is what the model itself would do.
        padded = len(self.exited_rows) == 0 and active.shape[1] > 1 and len(self.rows) > 0
        self.dense = padded or len(self.rows) == active.numel()

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """Packed rows grouped by sequence: sequences [G], packed index [G, M], place [n].

        `packed[g, m]` is the packed row of sequence g's m-th active token, sequences with fewer
        repeat their first; `place[i]` is the flat index g * M + m of packed row i.
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


class KeyValueCache(Cache):
    """Keys and values of every layer, in buffers made once; a layer may lag behind another.

    `window` says which columns the next calls write; a plan made with this cache takes the
    window's start for what was seen before.

    Args:
        num_layers: How many layers.
        batch: How many sequences.
        capacity: The most columns that a sequence can come to.
        keep: Whether later calls will read what earlier ones wrote. A single chunk needs one
            layer's keys and values at a time.
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

    def window(self, start: int, stop: int) -> None:
        """Let the next calls write columns start to stop - 1."""
        self.start, self.stop = start, stop

    @contextlib.contextmanager
    def packed(self, selection: Selection) -> Iterator[None]:
        """Let the next updates bring the active rows of a selection, packed into one."""
        self._packed = selection
        try:
            yield
        finally:
            self._packed = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns lie before the window."""
        return self.start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the window's first column."""
        return self.start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many columns attention sees, and the first of them."""
        return self.start + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; return all that its attention may see.

        Args:
            key_states: `[B, heads, T, head_dim]`, or `[1, heads, n, head_dim]` when packed.
            value_states: The same.
            layer_idx: From 0.
            args: Ignored.
            kwargs: Ignored.
        """
        if self._packed is not None:
            rows, columns = self._packed.rows, self._packed.columns
            return self.put(layer_idx, rows, columns, key_states[0], value_states[0])
        if not self.keep:
            return key_states, value_states
        buffer = self._buffer(layer_idx, key_states, value_states)
        buffer.keys[:, :, self.start : self.stop] = key_states
        buffer.values[:, :, self.start : self.stop] = value_states
        return self.read(layer_idx)

    def put(
        self, index: int, rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write single tokens' keys and values, `[heads, n, head_dim]`, columns of the window."""
        buffer = self._buffer(index, keys, values)
        buffer.keys[rows, :, self.start + columns] = keys.transpose(0, 1)
        buffer.values[rows, :, self.start + columns] = values.transpose(0, 1)
        return self.read(index)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values up to the window's end, `[B, heads, stop, head_dim]`."""
        buffer = self._buffers[index if self.keep else 0]
        return buffer.keys[:, :, : self.stop], buffer.values[:, :, : self.stop]

    def _buffer(self, index: int, keys: Tensor, values: Tensor) -> _Buffer:
        # Without `keep` all layers share one buffer: each writes every column that it reads.
        buffer = self._buffers[index if self.keep else 0]
        shape = (self.batch, keys.shape[-3], self.capacity, keys.shape[-1])
        if buffer.keys is None or buffer.keys.shape != shape:
            # Zeros: what padding never writes is masked, but NaN times nothing is NaN.
            buffer.keys = keys.new_zeros(shape)
            buffer.values = values.new_zeros((*shape[:3], values.shape[-1]))
            buffer.is_initialized = True
        return buffer


@dataclass(frozen=True)
class _Packing:
    """What packed attention must know of the call that it stands in."""

    selection: Selection
    mask: Tensor | None
    implementation: str


_PACKING: ContextVar[_Packing] = ContextVar("cascade_packing")


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Unpack the queries per sequence, let the model's own attention run, and pack its output.

    Args:
        module: The attention module.
        query: `[1, heads, n, head_dim]`.
        key: `[B, heads, L, head_dim]`.
        value: The same.
        attention_mask: Not looked at: the mask for all of the chunk's tokens is in the packing.
        kwargs: What the module passes on: scaling, soft-capping and the like.
    """
    packing = _PACKING.get()
    sequences, packed, place = packing.selection.groups
    if len(sequences) < key.shape[0]:
        key, value = key[sequences], value[sequences]
    padded = query[0].transpose(0, 1)[packed].transpose(1, 2)
    mask = _mask_of(packing, packed, key.shape[2])
    output, _ = _attention_of(module, packing.implementation)(
        module, padded, key, value, mask, **kwargs
    )
    return output.flatten(0, 1)[place][None], None


def _mask_of(packing: _Packing, packed: Tensor, seen: int) -> Tensor | None:
    """Return the mask of the padded queries, `[G, 1, M, seen]`."""
    rows, columns = packing.selection.rows[packed], packing.selection.columns[packed]
    if packing.mask is not None:
        batch = packing.selection.active.shape[0]
        mask = packing.mask.expand(batch, *packing.mask.shape[1:])
        return mask[rows, :, columns].transpose(1, 2)
    if packing.selection.active.shape[1] == 1:
        return None  # a single column attends to everything before it
    # Without a mask of its own `transformers` means: causal, nothing before the chunk.
    return (torch.arange(seen, device=columns.device) <= columns[..., None])[:, None]


def _attention_of(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    found: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, eager
    )
    return found


AttentionInterface.register(_PACKED, _packed_attention)


class SkippingLayers:
    """The decoder layers of a stack, each computable for some of the tokens.

    Where a family has separate query, key, value and output projections behind an input norm
    (Llama and its likes), layers are truly skipped. Elsewhere every token is computed, and what
    was computed for tokens that left is thrown away: the same result, no work saved. Which of the
    two it is was tried with numbers, not read off a name: see `reason`.

    Args:
        stack: The model.
        skip: False computes every token in any case (a reference for the packed path).

    Attributes:
        reason: Why layers are not truly skipped; None where they are.
    """

    def __init__(self, stack: DecoderStack, *, skip: bool = True) -> None:
        self.stack = stack
        self.reason: str | None = None
        if not skip:
            self.reason = "asked to compute every token"
        elif not all(_is_llama_shaped(layer) for layer in stack.layers):
            self.reason = (
                f"{stack.model.config.model_type} layers have no separate q_proj, k_proj, v_proj"
                " and o_proj behind an input_layernorm"
            )
        else:
            self.reason = self._try()
        self._lean = self._try_lean() if skip else None

    @property
    def skips(self) -> bool:
        """Whether tokens that left cost no more than their keys and values."""
        return self.reason is None

    def new_cache(self, batch: int, capacity: int, *, keep: bool = True) -> KeyValueCache:
        """Return an empty cache for `batch` sequences of at most `capacity` columns."""
        return KeyValueCache(self.stack.num_layers, batch, capacity, keep=keep)

    @torch.no_grad()
    def run(
        self,
        layer: int,
        hidden: Tensor,
        selection: Selection,
        call: LayerCall,
        cache: KeyValueCache,
        counts: Counts,
        *,
        predicted: Tensor | None = None,
        of_states: bool = False,
    ) -> Tensor:
        """Compute one layer for the active tokens; write everybody's keys and values.

        Args:
            layer: 1..N.
            hidden: `[B, T, D]`, the layer's input; for exited tokens their exit state.
            selection: Which tokens are which.
            call: The layer's entry of the chunk's plan, made with `cache`.
            cache: Its window is the chunk.
            counts: What is computed is added here.
            predicted: What the ridge maps say of the exited tokens, in the order of
                `selection.exited_rows`: `[x, 2 * key_value_width]`, what `k_proj` and `v_proj`
                would give. None: keys and values are made from the exit states.
            of_states: The maps say the layer's input instead, `[x, D]`.

        Returns:
            `[B, T, D]`: the layer's output for active tokens, the exit state for exited ones.
        """
        if selection.dense:
            counts.layer_rows[layer - 1] += hidden.shape[0] * hidden.shape[1]
            counts.pairs[layer - 1] += hidden.shape[0] * hidden.shape[1] * cache.stop
            if self._lean is not None and self._lean.take(layer, hidden, call.kwargs):
                return self._lean.step(layer, hidden, call.kwargs)
            return self.stack.step(layer, hidden, call)
        if not self.skips:
            return self._run_all(
                layer, hidden, selection, call, cache, counts, predicted, of_states
            )
        if len(selection.exited_rows):
            self._put_exited(layer, hidden, selection, call, cache, counts, predicted, of_states)
        if not len(selection.rows):
            return hidden
        return self._run_packed(layer, hidden, selection, call, cache, counts)

    def _run_packed(
        self,
        layer: int,
        hidden: Tensor,
        selection: Selection,
        call: LayerCall,
        cache: KeyValueCache,
        counts: Counts,
    ) -> Tensor:
        rows, columns = selection.rows, selection.columns
        kwargs = dict(call.kwargs)
        cos, sin = _positions_of(kwargs, rows, columns)
        kwargs["position_embeddings"] = (cos[None], sin[None])
        if isinstance(kwargs.get("position_ids"), Tensor):
            kwargs["position_ids"] = _picked(kwargs["position_ids"], rows, columns)[None]
        mask = kwargs.pop("attention_mask", None)
        packed = hidden[rows, columns][None]
        _, index, _ = selection.groups
        counts.layer_rows[layer - 1] += packed.shape[1]
        counts.pairs[layer - 1] += index.numel() * cache.stop
        config = self._attention(layer).config
        packing = _Packing(selection, mask, config._attn_implementation)
        with cache.packed(selection), _packed_calls(config, packing):
            output = self.stack.step(
                layer, packed, LayerCall(call.args, kwargs | {"attention_mask": None})
            )
        return hidden.index_put((rows, columns), output[0])

    def _put_exited(
        self,
        layer: int,
        hidden: Tensor,
        selection: Selection,
        call: LayerCall,
        cache: KeyValueCache,
        counts: Counts,
        predicted: Tensor | None = None,
        of_states: bool = False,
    ) -> None:
        rows, columns = selection.exited_rows, selection.exited_columns
        if predicted is not None:
            counts.predicted_rows[layer - 1] += len(rows)
        if predicted is None or of_states:
            counts.key_value_rows[layer - 1] += len(rows)
            raw = self.project(layer, hidden[rows, columns] if predicted is None else predicted)
        else:
            raw = predicted
        cos, sin = _positions_of(call.kwargs, rows, columns)
        keys, values = self.rotate(layer, raw, cos, sin)
        cache.put(layer - 1, rows, columns, keys, values)

    def project(self, layer: int, hidden: Tensor) -> Tensor:
        """Return keys and values before any norm and rotation, `[n, 2 * key_value_width]`.

        Args:
            layer: 1..N.
            hidden: Layer inputs, `[n, D]`.
        """
        attention = self._attention(layer)
        normed: Tensor = self.stack.layers[layer - 1].input_layernorm(hidden)  # type: ignore[operator]
        return torch.cat([attention.k_proj(normed), attention.v_proj(normed)], dim=-1)

    def rotate(self, layer: int, raw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Turn what `project` returns into what a cache holds: `[heads, n, head_dim]` twice.

        Args:
            layer: 1..N.
            raw: `[n, 2 * key_value_width]`.
            cos: `[n, head_dim]` of the tokens' positions.
            sin: The same.
        """
        attention = self._attention(layer)
        heads = raw.unflatten(-1, (2, -1, attention.head_dim))  # [n, 2, heads, head_dim]
        keys, values = heads[:, 0], heads[:, 1].transpose(0, 1)
        if getattr(attention, "k_norm", None) is not None:
            keys = attention.k_norm(keys)
        keys = keys.transpose(0, 1)
        if getattr(attention, "use_rope", True):
            rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
            keys = rotary(keys[None], keys[None], cos[None], sin[None])[1][0]
        return keys, values

    def _run_all(
        self,
        layer: int,
        hidden: Tensor,
        selection: Selection,
        call: LayerCall,
        cache: KeyValueCache,
        counts: Counts,
        predicted: Tensor | None,
        of_states: bool,
    ) -> Tensor:
        """Compute every token, as the model would, and keep the active ones' output."""
        counts.layer_rows[layer - 1] += hidden.shape[0] * hidden.shape[1]
        counts.pairs[layer - 1] += hidden.shape[0] * hidden.shape[1] * cache.stop
        exited = (selection.exited_rows, selection.exited_columns)
        with contextlib.ExitStack() as restored:
            taken = hidden
            if predicted is not None:
                counts.predicted_rows[layer - 1] += len(exited[0])
            if predicted is not None and of_states:
                taken = hidden.index_put(exited, predicted)
            elif predicted is not None:
                for name, raw in zip(("k_proj", "v_proj"), predicted.chunk(2, dim=-1), strict=True):
                    projection = getattr(self._attention(layer), name)
                    hook = _replacing(exited, raw)
                    restored.callback(projection.register_forward_hook(hook).remove)
            output = self.stack.step(layer, taken, call)
        return torch.where(selection.active[..., None], output, hidden)

    def _attention(self, layer: int) -> Any:
        return self.stack.layers[layer - 1].self_attn

    def _try(self) -> str | None:
        """Say why packed rows cannot be trusted here; None where they can."""
        implementation = self._attention(1).config._attn_implementation
        if implementation not in _UNPACKABLE:
            return (
                f"its attention is {implementation}; tokens are packed for "
                f"{' and '.join(_UNPACKABLE)} attention only"
            )
        try:
            return self._part()
        except Exception as error:
            # Any family's layers may ask anything of their call; whatever they raise, they cannot
            # be packed, and the model's own way still works.
            return f"its layers cannot be run for some of the tokens ({first_line(error)})"

    def _part(self) -> str | None:
        """Run two short rows packed and dense; say in which layer they part, if they do."""
        ids = torch.arange(8, device=self.stack.device).remainder(self.stack.vocab_size)
        ids = ids.reshape(2, 4)
        active = torch.tensor([[True, False, True, True], [False, True, False, True]])
        active = active.to(ids.device)
        selection, counts = Selection(active, ~active), Counts.of(self.stack.num_layers)
        caches = [self.new_cache(2, 4) for _ in range(2)]
        plans = []
        for cache in caches:
            cache.window(0, 4)
            plans.append(self.stack.plan(ids, cache=cache))
        if "position_embeddings" not in plans[0].calls[0].kwargs:
            return "its layers are called without rotary position_embeddings"
        hidden = plans[0].embedded
        for layer in range(1, self.stack.num_layers + 1):
            dense = self.stack.step(layer, hidden, plans[0].calls[layer - 1])
            call = plans[1].calls[layer - 1]
            self._put_exited(layer, hidden, selection, call, caches[1], counts)
            packed = self._run_packed(layer, hidden, selection, call, caches[1], counts)
            pairs = [(dense[active], packed[active])]
            pairs += zip(caches[0].read(layer - 1), caches[1].read(layer - 1), strict=True)
            if not all(_close(a, b) for a, b in pairs):
                return f"layer {layer} computed for some of the tokens differs from the whole one"
            hidden = dense
        return None

    def _try_lean(self) -> LeanLayers | None:
        """Return lean layers where they do what the model's own do, None elsewhere."""
        lean = LeanLayers(self.stack.layers)
        if not self.skips or not lean.are_shaped():
            return None
        try:
            return lean if self._agrees(lean) else None
        except Exception:
            # As in `_try`: a family that asks for more of its call than Llama's does.
            return None

    def _agrees(self, lean: LeanLayers) -> bool:
        """Run two columns behind a short prompt, padded in one row, in both ways."""
        ids = torch.arange(10, device=self.stack.device).remainder(self.stack.vocab_size)
        ids = ids.reshape(2, 5)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        cache = self.new_cache(2, 5)
        for start, stop in ((0, 3), (3, 5)):
            cache.window(start, stop)
            plan = self.stack.plan(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache)
            hidden = plan.embedded
            for layer, call in enumerate(plan.calls, start=1):
                real = self.stack.step(layer, hidden, call)
                if start:
                    found = [state.clone() for state in (real, *cache.read(layer - 1))]
                    if not lean.take(layer, hidden, call.kwargs):
                        return False
                    made = (lean.step(layer, hidden, call.kwargs), *cache.read(layer - 1))
                    if not all(_close(*pair) for pair in zip(found, made, strict=True)):
                        return False
                hidden = real
        return True


def _close(a: Tensor, b: Tensor) -> bool:
    # Half of the dtype's digits: kernels may differ far below it, a missing step never does.
    limit = torch.finfo(a.dtype).eps ** 0.5 * a.abs().max().clamp_min(1e-6)
    return bool((a - b).abs().max() <= limit)


def _replacing(
    where: tuple[Tensor, Tensor], values: Tensor
) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda module, args, output: output.index_put(where, values)


@contextlib.contextmanager
def _packed_calls(config: Any, packing: _Packing) -> Iterator[None]:
    """Let the attention of one call unpack its queries."""
    token = _PACKING.set(packing)
    config._attn_implementation = _PACKED
    try:
        yield
    finally:
        config._attn_implementation = packing.implementation
        _PACKING.reset(token)


def _picked(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return `values[row, column]` of `[B or 1, T, ...]`."""
    return values[rows if values.shape[0] > 1 else torch.zeros_like(rows), columns]


def _positions_of(kwargs: dict[str, Any], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = kwargs["position_embeddings"]
    return _picked(cos, rows, columns), _picked(sin, rows, columns)


def _is_llama_shaped(layer: nn.Module) -> bool:
    attention = getattr(layer, "self_attn", None)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    module = sys.modules[type(attention).__module__]
    return (
        isinstance(getattr(layer, "input_layernorm", None), nn.Module)
        and all(isinstance(getattr(attention, name, None), nn.Module) for name in names)
        and all(hasattr(attention, name) for name in ("head_dim", "config"))
        and all(
            hasattr(module, name) for name in ("apply_rotary_pos_emb", "eager_attention_forward")
        )
    )
