"""Decoder layers that compute only the active tokens.

Upper layers still need the keys and values of an exited token, because later tokens attend to them.
Everything else (queries, attention, output projection, MLP) is computed only for active tokens.
These are packed into one row, `[1, n, D]`, and passed to the layer's own forward, whose attention
is unpacked per sequence.

The shared model is not changed, so that several threads can decode with it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cascade.core.errors import UsageError, first_line
from cascade.core.float32_products import products_in
from cascade.decoding.engine.engine import DecodingEngine, EngineCall, EngineKind, engine_of
from cascade.decoding.engine.rows import MAX_ROWS
from cascade.decoding.exit_support import check_exits
from cascade.decoding.kv_cache import KeyValueCache, Selection
from cascade.decoding.packed_attention import PACKABLE, packed_layer
from cascade.models.flops import Counts
from cascade.models.overrides.hooks import hidden_of
from cascade.models.overrides.views import (
    can_be_copied,
    holders,
    paths_of,
    with_descendants,
    with_own_hooks,
)
from cascade.models.probing import close
from cascade.models.stack import DecoderStack, LayerCall


@dataclass(frozen=True)
class LayerTask:
    """The computation of one layer for a chunk.

    Attributes:
        layer: 1..N.
        hidden: The layer's input, `[B, T, D]`; for exited tokens their exit state.
        selection: Which tokens are active and which have exited.
        call: The layer's entry in the chunk's plan, made with `cache`.
        cache: The KV cache, whose window is the chunk.
        counts: Receives the work that is computed.
        predicted: The ridge maps' predictions for exited tokens, in the order of
            `selection.exited_rows`: the outputs of `k_proj` and `v_proj`,
            `[x, 2 * key_value_width]`. None: keys and values are computed from the exit states.
        predicts_states: Whether `predicted` has layer inputs instead, `[x, D]`.
    """

    layer: int
    hidden: Tensor
    selection: Selection
    call: LayerCall
    cache: KeyValueCache
    counts: Counts
    predicted: Tensor | None = None
    predicts_states: bool = False

    def count_all(self) -> None:
        """Count every token of the chunk as computed."""
        rows = self.hidden.shape[0] * self.hidden.shape[1]
        self.counts.layer_rows[self.layer - 1] += rows
        self.counts.pairs[self.layer - 1] += rows * self.cache.stop


class SkippingLayers:
    """The decoder layers of a stack, each of which can compute a selection of tokens.

    In families with separate query, key, value and output projections after an input norm (Llama
    and similar ones), layers skip exited tokens. In other families every token is computed, and the
    results of exited tokens are discarded. The output is the same, but no work is saved. A
    numerical comparison decides which of the two applies, not the name of the family; see `reason`.

    Args:
        stack: The model.
        skip: False always computes every token (a reference for the packed path).
        engine: What computes chunks of few tokens (see `engine_of`).

    Raises:
        UnsupportedModelError: A layer keeps other things than keys and values per token, so that no
            token can exit.

    Attributes:
        reason: Why layers do not skip exited tokens, or None if they do.
        engine: Computes chunks of few tokens, or None without `skip`.
        engine_kind: The kind of engine that was asked for, "model" without `skip`.
    """

    def __init__(
        self, stack: DecoderStack, *, skip: bool = True, engine: EngineKind = "auto"
    ) -> None:
        check_exits(stack)
        self.stack = stack
        self.reason: str | None = None
        if not skip:
            self.reason = "skip=False computes every token"
        elif not all(_is_llama_shaped(layer) for layer in stack.layers):
            self.reason = (
                f"{stack.model.config.model_type} layers have no separate q_proj, k_proj, v_proj"
                " and o_proj after an input_layernorm"
            )
        else:
            with products_in(stack.device):
                self.reason = self._find_reason()
        if self.reason is not None and skip and engine in ("compiled", "fused"):
            raise UsageError(
                f"the {engine} engine does not support this model: {self.reason}; use the engine"
                " auto"
            )
        self.engine: DecodingEngine | None = (
            engine_of(stack, engine) if skip and self.skips else None
        )
        self.engine_kind: EngineKind = engine if skip else "model"

    @property
    def skips(self) -> bool:
        """Whether layers compute only the keys and values of exited tokens."""
        return self.reason is None

    def new_cache(self, batch: int, capacity: int, *, keep: bool = True) -> KeyValueCache:
        """Return an empty cache for `batch` sequences of at most `capacity` columns."""
        return KeyValueCache(self.stack.num_layers, batch, capacity, keep=keep)

    @torch.no_grad()
    def run(self, task: LayerTask) -> Tensor:
        """Compute one layer for the active tokens; write the keys and values of all tokens.

        Returns:
            `[B, T, D]`: the layer's output for active tokens, the exit state for exited ones.
        """
        if task.selection.dense:
            task.count_all()
            if isinstance(task.call, EngineCall):
                return self._run_rows(task, task.call)
            return self.stack.step(task.layer, task.hidden, task.call)
        if not self.skips:
            return self._run_all(task)
        if len(task.selection.exited_rows):
            self._write_exited(task)
        if not len(task.selection.rows):
            return task.hidden
        if isinstance(task.call, EngineCall):
            return self._run_rows(task, task.call)
        return self._run_packed(task)

    def logits(self, hidden: Tensor, *, by_engine: bool) -> Tensor:
        """Return the logits `[n, V]` of states before the final norm, `[n, D]`, in fp32.

        Args:
            hidden: The states.
            by_engine: Whether the engine computed them. The model's own states get its own logits.
        """
        engine = self.engine if by_engine else None
        # In half precision, the model rounds several rows in another way than one.
        if (
            engine is not None
            and not engine.exact
            and len(hidden) <= MAX_ROWS
            and engine.is_ready()
        ):
            return engine.logits(hidden)
        return self.stack.decode(hidden[None])[0].float()

    def _run_rows(self, task: LayerTask, call: EngineCall) -> Tensor:
        """Compute the active tokens by the engine."""
        engine, hidden, selection = self.engine, task.hidden, task.selection
        assert engine is not None  # it made the call
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows, tables = call.rows, call.tables
        place = None
        if not selection.dense:
            place = selection.rows * hidden.shape[1] + selection.columns
            rows = rows.picked(place)
            tables = tables[0][place], tables[1][place]
            task.counts.layer_rows[task.layer - 1] += len(rows)
            task.counts.pairs[task.layer - 1] += len(rows) * task.cache.stop
        made = engine.run(
            flat if place is None else flat[place],
            rows,
            task.cache,
            below=task.layer - 1,
            last=task.layer,
            tables=tables,
        )
        if place is not None:
            made = flat.index_put((place,), made)
        return made.view_as(hidden)

    def _run_packed(self, task: LayerTask) -> Tensor:
        """Compute the active tokens alone, packed into one row."""
        rows, columns = task.selection.rows, task.selection.columns
        kwargs = dict(task.call.kwargs)
        cos, sin = _positions_of(kwargs, rows, columns)
        kwargs["position_embeddings"] = (cos[None], sin[None])
        if isinstance(kwargs.get("position_ids"), Tensor):
            kwargs["position_ids"] = _picked(kwargs["position_ids"], rows, columns)[None]
        mask = kwargs.pop("attention_mask", None)
        packed = task.hidden[rows, columns][None]
        _, index, _ = task.selection.groups
        task.counts.layer_rows[task.layer - 1] += packed.shape[1]
        task.counts.pairs[task.layer - 1] += index.numel() * task.cache.stop
        with (
            task.cache.packed(task.selection),
            packed_layer(self.stack.layers[task.layer - 1], task.selection, mask) as layer,
        ):
            output = layer(packed, *task.call.args, **kwargs, attention_mask=None)
        return task.hidden.index_put((rows, columns), hidden_of(output)[0])

    def _write_exited(self, task: LayerTask) -> None:
        """Write the keys and values of exited tokens."""
        rows, columns = task.selection.exited_rows, task.selection.exited_columns
        if task.predicted is not None:
            task.counts.predicted_rows[task.layer - 1] += len(rows)
        if task.predicted is None or task.predicts_states:
            task.counts.key_value_rows[task.layer - 1] += len(rows)
            states = task.hidden[rows, columns] if task.predicted is None else task.predicted
            raw = self.project(task.layer, states)
        else:
            raw = task.predicted
        cos, sin = _positions_of(task.call.kwargs, rows, columns)
        keys, values = self.rotate(task.layer, raw, cos, sin)
        task.cache.put(task.layer - 1, rows, columns, keys, values)

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
        """Return normed and rotated keys and values for the cache, `[heads, n, head_dim]` each.

        Args:
            layer: 1..N.
            raw: The result of `project`, `[n, 2 * key_value_width]`.
            cos: Cosines of the tokens' positions, `[n, head_dim]`.
            sin: Sines of the tokens' positions, `[n, head_dim]`.
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

    def _run_all(self, task: LayerTask) -> Tensor:
        """Compute every token, as the model does, and keep the output of active tokens."""
        task.count_all()
        exited = (task.selection.exited_rows, task.selection.exited_columns)
        if task.predicted is not None:
            task.counts.predicted_rows[task.layer - 1] += len(exited[0])
        if task.predicted is None:
            output = self.stack.step(task.layer, task.hidden, task.call)
        elif task.predicts_states:
            taken = task.hidden.index_put(exited, task.predicted)
            output = self.stack.step(task.layer, taken, task.call)
        else:
            with _projecting(self.stack.layers[task.layer - 1], exited, task.predicted) as layer:
                output = hidden_of(layer(task.hidden, *task.call.args, **task.call.kwargs))
        return torch.where(task.selection.active[..., None], output, task.hidden)

    def _attention(self, layer: int) -> Any:
        return self.stack.layers[layer - 1].self_attn

    def _find_reason(self) -> str | None:
        """Return why packed rows cannot be used with this model, or None if they can."""
        implementation = self._attention(1).config._attn_implementation
        if implementation not in PACKABLE:
            return (
                f"its attention is {implementation}; tokens are packed for "
                f"{' and '.join(PACKABLE)} attention only"
            )
        try:
            return self._find_difference()
        except Exception as error:
            # Layers of an unknown family may need any arguments and raise any error. They cannot be
            # packed, but every token can still be computed.
            return f"its layers cannot be computed for some tokens ({first_line(error)})"

    def _find_difference(self) -> str | None:
        """Run two short rows packed and dense; return the layer at which they differ, or None."""
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
            task = LayerTask(layer, hidden, selection, call, caches[1], counts)
            self._write_exited(task)
            packed = self._run_packed(task)
            pairs = [(dense[active], packed[active])]
            pairs += zip(caches[0].read(layer - 1), caches[1].read(layer - 1), strict=True)
            if not all(close(a, b) for a, b in pairs):
                return f"layer {layer} computed for some tokens differs from the full computation"
            hidden = dense
        return None


@contextlib.contextmanager
def _projecting(layer: nn.Module, where: tuple[Tensor, Tensor], raw: Tensor) -> Iterator[Any]:
    """Yield a layer whose projections return predicted keys and values for some tokens.

    The result is a copy, as in `packed_layer`, or the layer itself if it cannot be copied.

    Args:
        layer: The layer, with its attention as `self_attn`.
        where: The rows `[n]` and columns `[n]` of the tokens.
        raw: Keys and values before any norm and rotation, `[n, 2 * key_value_width]`.
    """
    attention: Any = layer.self_attn
    projections: list[nn.Module] = [attention.k_proj, attention.v_proj]
    # A module can be registered under several names; all of them get its copy.
    paths = [(path, module) for module in projections for path in paths_of(module, layer)]
    if all(can_be_copied(holder) for path, _ in paths for holder in holders(layer, path)):
        copies = {module: with_own_hooks(module) for module in projections}
        projections = list(copies.values())
        layer = with_descendants(layer, {path: copies[module] for path, module in paths})
    with contextlib.ExitStack() as restored:
        for projection, values in zip(projections, raw.chunk(2, dim=-1), strict=True):
            hook = _replacing(where, values)
            restored.callback(projection.register_forward_hook(hook).remove)
        yield layer


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
