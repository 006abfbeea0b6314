"""The engine of one model: its layers, its plans, its LM head, and the test of all three."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cascade.core.errors import UsageError, first_line
from cascade.core.float32_products import is_by_autocast, product_precision, products_in
from cascade.decoding.engine.choices import choose_kernels
from cascade.decoding.engine.compiled_layers import CompiledLayers
from cascade.decoding.engine.compiler import CompilerError
from cascade.decoding.engine.fused_layers import FusedLayers
from cascade.decoding.engine.modules import LayerModules, is_plain, is_untouched, obstacle_of
from cascade.decoding.engine.rows import MAX_ROWS, Rows
from cascade.decoding.kv_cache import KeyValueCache
from cascade.models.probing import close
from cascade.models.stack import DecoderStack, LayerCall, Plan

if TYPE_CHECKING:
    from cascade.decoding.forward import Chunk

#: What computes the layers: compiled C, fused PyTorch, the model's own modules, these in CUDA
#: graphs (see `cascade.decoding.graphed_forward`), or the first that passes the self-test.
EngineKind = Literal["auto", "compiled", "fused", "graphs", "model"]

ENGINES: tuple[EngineKind, ...] = ("auto", "compiled", "fused", "graphs", "model")

#: Kinds of RoPE whose table does not depend on the length of the sequence.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")

#: Dtypes whose roundings are reproduced bit for bit; fp32 is compared up to rounding.
_HALF = (torch.bfloat16, torch.float16)

#: Lengths of texts around which attention kernels change to other code: vectors and blocks.
_BORDERS = (1, 2, 7, 8, 9, 33, 64, 200, 511, 512, 513, 520, 1024, 1031)

#: Choosing kernels and copying weights takes time and memory, so threads share what one has made.
_lock = threading.Lock()


def engine_of(stack: DecoderStack, kind: EngineKind = "auto") -> DecodingEngine:
    """Return the engine of a model, made on first use and again after its weights have changed.

    Args:
        stack: The model.
        kind: What computes the layers.

    Raises:
        UsageError: The kind is unknown, or its name is given and it does not support the model.
    """
    if kind not in ENGINES:
        raise UsageError(f"expected an engine among {', '.join(ENGINES)}, got {kind!r}")
    with _lock:
        found: dict[str, DecodingEngine] = stack.engines
        if kind not in found or not found[kind].has_same_weights():
            found[kind] = DecodingEngine(stack, kind)
        made = found[kind]
    if kind in ("compiled", "fused") and made.obstacle is not None:
        raise UsageError(
            f"the {kind} engine does not support this model: {made.obstacle}; use the engine auto"
        )
    return made


@dataclass(frozen=True)
class EngineCall(LayerCall):
    """The call of a layer in a plan of the engine.

    Attributes:
        rows: The rows of the chunk, sequence by sequence.
        tables: Cosines and sines of their positions, `[R, head_dim]`.
    """

    rows: Rows
    tables: tuple[Tensor, Tensor]


class DecodingEngine:
    """Computes a few tokens behind a prompt with the results of a model, in less time.

    Args:
        stack: The model.
        kind: What computes the layers.

    Attributes:
        obstacle: Why the model's own modules are used instead, or None.
        exact: Whether results are bit for bit those of the model, one token at a time.
    """

    def __init__(self, stack: DecoderStack, kind: EngineKind = "auto") -> None:
        self.stack = stack
        self.exact = stack.dtype in _HALF
        self.layers: CompiledLayers | FusedLayers | None = None
        self._modules: tuple[LayerModules, ...] = ()
        self._rotary: Any = getattr(stack.decoder, "rotary_emb", None)
        self._table: tuple[Tensor, Tensor] | None = None
        self._watched: _Watched | None = None
        self.obstacle = self._find_obstacle(kind)
        if self.obstacle is not None:
            return
        text = stack.model.config
        self._modules = tuple(LayerModules.of(layer, text) for layer in stack.layers)
        with products_in(stack.device):  # kernels are chosen, stored and compared in full precision
            for name in ("compiled", "fused") if kind == "auto" else (kind,):
                self.obstacle = self._try(name)
                if self.obstacle is None:
                    return
        self.layers = None

    def _find_obstacle(self, kind: EngineKind) -> str | None:
        stack = self.stack
        if kind == "model":
            return "the model's own modules were asked for"
        if kind == "graphs":  # which are of whole passes
            return "graphs were asked for"
        if stack.dtype not in (torch.float32, *_HALF):
            return f"it supports float32, bfloat16 and float16, not {stack.dtype}"
        for layer in stack.layers:
            reason = obstacle_of(layer)
            if reason is not None:
                return reason
        if self._rotary is None:
            return "its decoder has no rotary_emb"
        rope = getattr(self._rotary, "rope_type", "default")
        if rope not in _STATIC_ROPE:
            return f"its rotary tables ({rope}) depend on the length of the text"
        if stack.direct_norm is None:
            return "its logits need more than final norm and LM head"
        return None

    def _try(self, name: str) -> str | None:
        """Make the layers and test them; return what is wrong with them, or None."""
        device = self.stack.device.type
        try:
            if name == "fused":
                self.layers = FusedLayers(self._modules, choose_kernels(), exact=self.exact)
            elif device != "cpu":
                return f"layers are compiled for CPUs, and the model is on {device}"
            else:
                self.layers = CompiledLayers(self._modules, self._heads)
            # In-place changes of weights are missed only by copies.
            self._watched = _Watched(
                self._modules, self._heads, versions=self.layers.copied_bytes > 0
            )
            return self._find_difference()
        except CompilerError as error:
            return first_line(error)
        except Exception as error:
            # Layers of an unknown family may need any arguments and raise any error.
            return f"its layers cannot be computed by the engine ({first_line(error)})"

    @property
    def _heads(self) -> list[nn.Linear]:
        """The LM head, if its weights can be read in their place."""
        head = self.stack.lm_head
        return [head] if is_plain(head) else []

    @property
    def description(self) -> str:
        """What computes the layers, for records: e.g. "compiled" or "model"."""
        return "model" if self.layers is None else self.layers.description

    @property
    def longest(self) -> int | None:
        """The columns up to which the model's own step is compared; None for any number."""
        if not self.exact:
            return None
        # Behind a window, `generate` keeps only the columns of the window, as the engine does. A
        # step of the model over all columns rounds with the hidden ones, too.
        return min((layer.window for layer in self._modules if layer.window), default=None)

    @property
    def supports_trees(self) -> bool:
        """Whether rows of a tree get the results of the texts that they stand for."""
        # In half precision, the columns of siblings would change how PyTorch's attention rounds.
        return not self.exact or isinstance(self.layers, CompiledLayers)

    @property
    def copied_bytes(self) -> int:
        """The memory of second copies of weights, in bytes."""
        return 0 if self.layers is None else self.layers.copied_bytes

    @property
    def cache_shape(self) -> tuple[int, int]:
        """The heads of keys and values, and their width."""
        return self._modules[0].key_heads, self._modules[0].head_dim

    @property
    def products(self) -> str | None:
        """How the model's products are rounded, which no engine does; None if they are not."""
        found = product_precision(self.stack.device)
        # The setting for float32 is not that of products of half precision; autocast is for both.
        return None if self.exact and found and not is_by_autocast(found) else found

    def has_same_weights(self) -> bool:
        """Return whether modules and weights are those that the engine was made for."""
        return self._watched is None or self._watched.are_same()

    def is_ready(self) -> bool:
        """Return whether the engine can compute now.

        No hook was added, no weight has changed, and products are not rounded.
        """
        return (
            self.layers is not None
            and self._watched is not None
            and self._watched.are_same()
            and self.products is None
            and self._watched.are_untouched()
        )

    # --- Passes -----------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings of token ids `[R]`, `[R, D]`."""
        made: Tensor = self.stack.model.get_input_embeddings()(ids)
        return made

    def tables(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the rows' positions, `[R, head_dim]`."""
        table = self._table
        most = int(rows.position.max())
        if table is None or len(table[0]) <= most:
            size = max(256, min(2 * most, self.stack.max_positions or 2 * most), most + 1)
            columns = torch.arange(size, device=self.stack.device)
            like = torch.zeros((), dtype=self.stack.dtype, device=columns.device)
            cos, sin = self._rotary(like, columns[None])
            table = self._table = (cos[0], sin[0])
        return table[0][rows.position], table[1][rows.position]

    @torch.no_grad()
    def run(
        self,
        hidden: Tensor,
        rows: Rows,
        cache: KeyValueCache,
        *,
        below: int = 0,
        last: int | None = None,
        tables: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the output of layers below + 1 to last, `[R, D]`; write keys and values.

        Args:
            hidden: The output of layer `below`, `[R, D]`.
            rows: The rows.
            cache: The KV cache.
            below: 0 for the embeddings.
            last: The last layer (default: N).
            tables: The result of `tables`, if it exists already.
        """
        if self.layers is None:
            raise RuntimeError(f"the engine cannot compute: {self.obstacle}")
        last = self.stack.num_layers if last is None else last
        return self.layers.run(below, last, hidden, rows, tables or self.tables(rows), cache)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of states before the final norm, `[R, V]`.

        Args:
            hidden: `[R, D]`.
        """
        norm, head = self.stack.direct_norm, self.stack.lm_head
        assert norm is not None  # otherwise there is an obstacle
        assert self.layers is not None
        normed = norm(hidden)
        if is_plain(head) and head.weight.dtype == normed.dtype and is_untouched(head):
            return self.layers.linear(head, normed)
        return torch.cat([head(row) for row in normed.split(1)])

    def plan(self, chunk: Chunk, cache: KeyValueCache) -> Plan | None:
        """Return the plan of a short chunk, or None where the model's own modules compute it.

        Args:
            chunk: The tokens.
            cache: The KV cache, whose window is the chunk.
        """
        if chunk.ids.numel() > MAX_ROWS or not self.is_ready():
            return None
        if self.exact and not cache.start:
            return None  # the model computes a prompt with other roundings than single tokens
        first = _first_columns(chunk, cache)
        if first is None:
            return None
        batch, length = chunk.ids.shape
        rows = Rows.block(batch, cache.start, cache.stop, first)
        tables = self.tables(rows)
        embedded = self.embed(chunk.ids.reshape(-1)).view(batch, length, -1)
        cos, sin = (values.view(batch, length, -1) for values in tables)
        call = EngineCall((), {"position_embeddings": (cos, sin)}, rows, tables)
        return Plan(embedded, (call,) * self.stack.num_layers)

    # --- The self-test ----------------------------------------------------------------------

    @torch.no_grad()
    def _find_difference(self) -> str | None:
        """Compare plans, layers and logits with the model's own; return what differs, or None."""
        limit = self.stack.max_positions or 4096
        windows = {layer.window for layer in self._modules} - {None}
        for start in sorted({5, limit - 3, *(int(window) + 1 for window in windows if window)}):
            if 0 < start <= limit - 3:
                reason = self._compare_plan(start)
                if reason is not None:
                    return reason
        if self.exact:
            longest = min(limit, self.longest or limit)
            for start in _BORDERS:
                if start < longest and not self._attends_alike(start):
                    return f"its attention behind {start} tokens differs"
        for padding in (0, 2):
            for length in (1, 3):
                reason = self._compare_layers(padding, length)
                if reason is not None:
                    return reason
        reason = self._compare_last_positions(limit)
        self._table = None  # a table of all positions is large
        return reason

    def _attends_alike(self, start: int) -> bool:
        """Compare the first layer behind a long text of random keys and values, bit for bit."""
        stack = self.stack
        generator = torch.Generator().manual_seed(start)
        cache = KeyValueCache(stack.num_layers, 1, start + 1)
        hidden = self.embed(torch.arange(1, 2, device=stack.device))
        cache.allocate(*self.cache_shape, hidden)
        for buffer in cache.buffers(0):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        cache.window(start, start + 1)
        plan = stack.plan(torch.ones((1, 1), dtype=torch.long, device=stack.device), cache=cache)
        real = stack.step(1, hidden[None], plan.calls[0])[0]
        return torch.equal(self.run(hidden, Rows.block(1, start, start + 1), cache, last=1), real)

    def _compare_plan(self, start: int) -> str | None:
        """Compare masks and rotary tables of two columns with the model's own."""
        stack = self.stack
        cache = KeyValueCache(stack.num_layers, 1, start + 2)
        cache.window(start, start + 2)
        ids = torch.ones((1, 2), dtype=torch.long, device=stack.device)
        plan = stack.plan(ids, cache=cache)
        rows = Rows.block(1, start, start + 2)
        own = self.tables(rows)
        for layer, call in zip(self._modules, plan.calls, strict=True):
            tables = call.kwargs.get("position_embeddings")
            if tables is None or call.args:
                return "its layers are called without rotary position_embeddings"
            if not all(torch.equal(one[0], other) for one, other in zip(tables, own, strict=True)):
                return f"its rotary tables at position {start} are others"
            mask = call.kwargs.get("attention_mask")
            if mask is not None:
                seen = mask if mask.dtype == torch.bool else mask == 0
                if not torch.equal(seen[0, 0], rows.visible(start + 2, layer.window)):
                    return f"its attention mask at column {start} is another"
        return None

    def _compare_layers(self, padding: int, length: int) -> str | None:
        """Compare layers and logits behind a prompt with the model's own.

        Args:
            padding: The columns before the first of two sequences.
            length: The columns that are computed. In half precision, the model computes them one by
                one.
        """
        stack, start, layers = self.stack, 5, range(self.stack.num_layers)
        stop = start + length
        ids = (torch.arange(2 * stop, device=stack.device) * 7 + 1).remainder(stack.vocab_size)
        ids = ids.reshape(2, stop)
        cache, owns = KeyValueCache(stack.num_layers, 2, stop), []
        cache.allocate(*self.cache_shape, self.embed(ids[:, 0]))
        expected = []
        for number, first in enumerate((padding, 0)):
            own = KeyValueCache(stack.num_layers, 1, stop - first)
            owns.append(own)
            text = ids[number : number + 1, first:]
            self._run_own(text[:, : start - first], own, 0)
            for layer in layers:
                for buffer, found in zip(cache.buffers(layer), own.buffers(layer), strict=True):
                    buffer[number, :, first:start] = found[0, :, : start - first]
            step = 1 if self.exact else length
            for at in range(start - first, stop - first, step):
                expected.append(self._run_own(text[:, at : at + step], own, at))
        rows = Rows.block(2, start, stop, torch.tensor([padding, 0]))
        made = self.run(self.embed(ids[:, start:].reshape(-1)), rows, cache)
        real = torch.cat(expected)
        same = torch.equal if self.exact else close
        if not same(real, made):
            return "its layers compute something else than Llama's"
        for layer in layers:
            for number, first in enumerate((padding, 0)):
                pairs = zip(cache.buffers(layer), owns[number].buffers(layer), strict=True)
                if not all(same(mine[number, :, first:], own[0]) for mine, own in pairs):
                    return f"layer {layer + 1} writes other keys and values than Llama's"
        logits = torch.cat([stack.decode(row[None])[0] for row in real.split(1)])
        return None if same(logits, self.logits(made)) else "its logits differ"

    def _compare_last_positions(self, limit: int) -> str | None:
        """Compare layers at the last positions, at which some models scale their queries.

        The text is short, so that it fits in memory. Layers with a window are left out, because
        their windows are at the positions of a long one.
        """
        stack, count = self.stack, min(3, limit)
        caches = [KeyValueCache(stack.num_layers, 1, count) for _ in range(2)]
        same = torch.equal if self.exact else close
        for at in range(count):
            position = torch.tensor([limit - count + at])
            column, nothing = torch.tensor([at]), torch.zeros(1, dtype=torch.long)
            rows = Rows(nothing, column, position, nothing, column + 1, nothing.int())
            for cache in caches:
                cache.window(at, at + 1)
            ids = torch.full((1, 1), at, device=stack.device)
            places = position[None].to(stack.device)
            plan = stack.plan(ids, position_ids=places, cache=caches[0])
            hidden = plan.embedded
            for number, (layer, call) in enumerate(zip(self._modules, plan.calls, strict=True)):
                own = stack.step(number + 1, hidden, call)
                if layer.window is None:
                    made = self.run(hidden[0], rows, caches[1], below=number, last=number + 1)
                    if not same(own[0], made):
                        return f"its layers compute something else at position {int(position)}"
                hidden = own
        return None

    def _run_own(self, ids: Tensor, cache: KeyValueCache, start: int) -> Tensor:
        """Compute columns of one sequence by the model's own modules; return `[T, D]`."""
        cache.window(start, start + ids.shape[1])
        plan = self.stack.plan(ids, cache=cache)
        hidden = plan.embedded
        for layer, call in enumerate(plan.calls, start=1):
            hidden = self.stack.step(layer, hidden, call)
        return hidden[0]


class _Watched:
    """The modules and weights of layers, to find out whether they have changed.

    Args:
        layers: The layers.
        others: Further modules whose weights are watched.
        versions: Whether changes of weights in place count.
    """

    def __init__(
        self, layers: Sequence[LayerModules], others: Sequence[nn.Module], *, versions: bool
    ) -> None:
        self.versions = versions
        self._modules = [module for layer in layers for module in layer.modules]
        #: The dictionary that holds a module, its name there, and the module.
        self._places = [
            (parent._modules, name, module)
            for layer in layers
            for parent in layer.modules
            for name, module in parent._modules.items()
            if module is not None
        ]
        self._weights = [
            (module._parameters, name, weight, weight.data_ptr(), weight._version)
            for module in (*(place[2] for place in self._places), *others)
            for name, weight in module._parameters.items()
            if weight is not None
        ]

    def are_same(self) -> bool:
        """Return whether all modules and weights are still the same."""
        # Loops, because generators take twice as long, and this runs before every pass.
        for holder, name, module in self._places:
            if holder.get(name) is not module:
                return False
        for parameters, name, weight, address, version in self._weights:
            if parameters.get(name) is not weight or weight.data_ptr() != address:
                return False
            if self.versions and weight._version != version:
                return False
        return True

    def are_untouched(self) -> bool:
        """Return whether no module has hooks or a replaced forward."""
        for module in self._modules:
            own = module.__dict__
            touched = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
            if touched and not is_untouched(module):
                return False
        return True


def _first_columns(chunk: Chunk, cache: KeyValueCache) -> Tensor | None:
    """Return the first column of each sequence behind its padding, or None for other masks."""
    mask = chunk.attention_mask
    if mask is None:
        return torch.zeros(len(chunk.ids), dtype=torch.long)
    real = mask[:, : cache.stop] > 0
    first = real.int().argmax(dim=1)
    if not bool((real.sum(dim=1) == cache.stop - first).all()):
        return None
    return first
