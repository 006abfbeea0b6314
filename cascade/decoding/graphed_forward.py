"""A model's own forward over a static KV cache, with CUDA graphs for passes over a few tokens.

A pass over a few tokens launches hundreds of small kernels, which takes a GPU's host longer than
the GPU needs for them. A CUDA graph launches all of them at once. It repeats the same kernels at
the same addresses, so whatever changes from pass to pass is in a tensor that stays where it is: the
tokens, the column of the first one, and where each row begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade.core.errors import first_line
from cascade.decoding.engine.modules import is_untouched
from cascade.decoding.forward import finite_logits
from cascade.decoding.own_forward import OwnForward
from cascade.models.stack import DecoderStack

#: Computes something into tensors that stay where they are.
Compute = Callable[[], None]
#: Captures what is computed, and returns what replays it.
Capture = Callable[[Compute], Compute]

#: The most tokens of a pass: the last confirmed one and 8 drafted ones.
MOST_TOKENS = 9

#: A cache has a multiple of this many columns, so that texts of similar lengths share it.
_COLUMNS = 256


_capturing = threading.Lock()


class CaptureError(Exception):
    """The operations of a pass cannot be captured in a CUDA graph."""


def capture_cuda_graph(compute: Compute) -> Compute:
    """Capture what is computed in a CUDA graph, on the current device; return its replay.

    Raises:
        CaptureError: It contains an operation that cannot be captured.
    """
    current = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        # A process captures one graph at a time. Its other threads may go on using the device.
        with _capturing, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            compute()
    except RuntimeError as error:  # torch raises this for operations that cannot be captured
        torch.cuda.set_stream(current)  # a failed capture leaves its own stream behind
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CaptureError(f"a pass cannot be captured ({first_line(error)})") from error
    return graph.replay


@dataclass(frozen=True)
class CacheShape:
    """The shape of a static cache and of the passes over it.

    Attributes:
        batch: The number of rows.
        columns: The number of columns.
        most: The most tokens of a row in a pass behind the prompt.
    """

    batch: int
    columns: int
    most: int

    @classmethod
    def fitting(cls, stack: DecoderStack, batch: int, capacity: int, most: int) -> CacheShape:
        """Return the shape for texts of at most `capacity` columns."""
        columns = -(-capacity // _COLUMNS) * _COLUMNS
        columns = max(capacity, min(columns, stack.max_positions or columns))
        # The comparison with the model takes a prompt, two single tokens and a longest pass.
        return cls(batch, columns, max(1, min(most, columns - 3)))

    def covers(self, other: CacheShape) -> bool:
        """Return whether passes of another shape have this one, too."""
        same = (self.batch, self.columns) == (other.batch, other.columns)
        return same and self.most >= other.most


class _Pass:
    """A pass over a fixed number of tokens.

    Args:
        compute: Returns the logits of tokens `[B, T]`; everything else that it reads stays where it
            is.
        ids: Tokens with the shape of the pass.
        capture: Captures the pass; None calls `compute` again in each pass.
    """

    def __init__(
        self, compute: Callable[[Tensor], Tensor], ids: Tensor, capture: Capture | None
    ) -> None:
        self.ids = ids.clone()
        self.logits = torch.zeros_like(self._warm_up(compute))

        def run() -> None:
            self.logits.copy_(compute(self.ids))

        self.run = run if capture is None else capture(run)

    def _warm_up(self, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute before the capture, in which libraries cannot be loaded; return the logits."""
        if self.ids.device.type != "cuda":
            return compute(self.ids)
        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):
            for _ in range(2):
                logits = compute(self.ids)
        current.wait_stream(other)
        return logits


class GraphedForward(OwnForward):
    """A model's own forward over a static cache, which can go back to earlier columns.

    A generation begins with a pass over the prompt (`start=0`), which is not captured. Each later
    pass begins in the column behind any earlier pass, or before. Columns from there on are
    overwritten or masked.

    Args:
        stack: The model, which has no obstacle (see `graph_obstacle`).
        shape: The shape of the cache.
        capture: Captures a pass; None computes it without capture, e.g. on a CPU.

    Attributes:
        shape: The shape of the cache. `most` may have been lowered by the comparison with the
            model.
        requested: The shape as it was asked for.
        rounding: A note on the rounding, if it is not that of the model with its usual cache.
        watched: What the model was like when the forward was compared with it.
    """

    def __init__(self, stack: DecoderStack, shape: CacheShape, capture: Capture | None) -> None:
        self.requested = shape
        self.watched: object = None
        super().__init__(stack, static_cache(stack, shape.columns))
        self.shape, self.rounding = shape, ""
        self._capture = capture
        self._start = torch.zeros((), dtype=torch.long, device=stack.device)
        self._first = torch.zeros((shape.batch, 1), dtype=torch.long, device=stack.device)
        self._columns = torch.arange(shape.columns, device=stack.device)
        self._passes: dict[int, _Pass] = {}

    @property
    def cache_bytes(self) -> int:
        """The memory of the cache, in bytes; 0 before the first pass."""
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    @property
    def name(self) -> str:
        """What computes the passes, and where."""
        device = self.stack.device
        if self._capture is None:
            return f"passes of a fixed size on {device.type}"
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"graphs on {where}"

    @property
    def description(self) -> str:
        """What computes the passes, for records."""
        what = "graphs" if self._capture is not None else "passes of a fixed size, not captured"
        size = f"static cache of {self.shape.columns} columns, {self.cache_bytes / 1e6:.1f} MB"
        return f"{what} ({size}{self.rounding})"

    @torch.no_grad()
    def run(
        self,
        ids: Tensor,
        start: int,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """Return the logits of the next tokens, in fp32; see `OwnForward`.

        Behind the prompt, its mask holds, and positions are counted from the first token of a row.

        Raises:
            ModelError: Logits are not finite.
        """
        if start:
            return self._run_fixed(ids, start, last=last)
        self.cache.reset()
        self._first.zero_()
        if attention_mask is not None:
            self._first.copy_((attention_mask == 0).sum(dim=1, keepdim=True))
        return super().run(
            ids, 0, attention_mask=attention_mask, position_ids=position_ids, last=last
        )

    def _run_fixed(self, ids: Tensor, start: int, *, last: bool) -> Tensor:
        batch, count = ids.shape
        self._start.fill_(start)
        found = self._passes.get(count)
        if found is None:
            with torch.cuda.device_of(ids):  # captures use the current device
                found = _Pass(self._logits, ids, self._capture)
            self._passes[count] = found
        found.ids.copy_(ids)
        found.run()
        self.counts.lm_head_rows += batch * count
        self.counts.add_pass(batch * count, batch * count * (start + count))
        logits = found.logits[:, -1:] if last else found.logits
        # A copy: the next pass writes to the same place.
        return finite_logits(logits.to(torch.float32, copy=True), self.stack.num_layers)

    def _logits(self, ids: Tensor) -> Tensor:
        """Return the logits of tokens in the columns from `_start` on; runs in the capture."""
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(self._start)
        columns = self._start + self._columns[: ids.shape[1]]
        visible = (self._columns <= columns[:, None]) & (self._columns >= self._first[:, :, None])
        mask = visible[:, None]
        if self.stack.model.config._attn_implementation == "eager":
            dtype = self.stack.dtype
            hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            mask = hidden.masked_fill(~mask, torch.finfo(dtype).min)
        logits: Tensor = self.stack.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(columns - self._first).clamp_min(0),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        ).logits
        return logits


def static_cache(stack: DecoderStack, columns: int) -> Any:
    """Return an empty static cache of `transformers` with a number of columns."""
    from transformers import StaticCache

    return StaticCache(config=stack.model.config, max_cache_len=columns)


def graph_obstacle(stack: DecoderStack) -> str | None:
    """Return why passes of a model cannot have a fixed size, or None if they may.

    The comparison with the model follows when a cache is made (see `GraphPool`).
    """
    from transformers.cache_utils import StaticLayer

    if not OwnForward.supports(stack):
        return "its forward may take more than text"
    devices = {str(weight.device) for weight in stack.model.parameters()}
    if len(devices) > 1:
        return f"its weights are on several devices ({', '.join(sorted(devices))})"
    changed = [name for name, module in stack.model.named_modules() if not is_untouched(module)]
    if changed:
        return f"its module {changed[0] or 'at the top'} has hooks or a replaced forward"
    if torch.is_autocast_enabled(stack.device.type):
        return "autocast is on"
    attention = getattr(stack.model.config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"its attention {attention} takes no masks of a fixed size"
    if not OwnForward(stack).takes_positions:
        return "its forward takes no position_ids"
    for layer in static_cache(stack, 1).layers:
        if type(layer) is not StaticLayer:  # windows and states cannot go back
            return f"its static cache has layers of the kind {type(layer).__name__}"
        if not hasattr(layer, "cumulative_length"):
            return "this version of transformers has no static cache that can go back"
    return None
