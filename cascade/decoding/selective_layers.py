"""Decoder layers computed for some of the tokens only: KV cache, packed rows, counted work.

A token that left still owes the upper layers its keys and values, because later tokens attend to
them. Everything else of those layers (queries, attention, output projection, MLP) is computed for
the remaining tokens alone: they are packed into one row, `[1, n, D]`, and go through the layer's
own forward, whose attention is unpacked per sequence.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cascade.core.errors import first_line
from cascade.decoding.kv_cache import KeyValueCache, Selection
from cascade.decoding.packed_attention import PACKABLE, Packing, packed_calls
from cascade.models.fast_layers import LeanLayers
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack, LayerCall


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
        packing = Packing(selection, mask, config._attn_implementation)
        with cache.packed(selection), packed_calls(config, packing):
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
        if implementation not in PACKABLE:
            return (
                f"its attention is {implementation}; tokens are packed for "
                f"{' and '.join(PACKABLE)} attention only"
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
