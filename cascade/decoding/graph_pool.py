"""The graphed forwards of a model: made, compared with the model, and kept between generations."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cascade.core.errors import ModelError, UsageError, first_line
from cascade.core.float32_products import product_precision
from cascade.decoding.engine.engine import EngineKind
from cascade.decoding.graphed_forward import (
    CacheShape,
    Capture,
    CaptureError,
    GraphedForward,
    capture_cuda_graph,
    graph_obstacle,
    static_cache,
)
from cascade.decoding.own_forward import OwnForward
from cascade.models.probing import close
from cascade.models.stack import DecoderStack

#: Dtypes whose roundings must be the model's, bit for bit; others are compared up to rounding.
_HALF = (torch.bfloat16, torch.float16)

#: The most columns before the pass in the comparison with the model.
_LONGEST_TEST = 600

#: The number of single tokens that are compared bit for bit.
_SINGLES = 16

#: How many caches of a model are kept between generations.
_KEPT = 2


class GraphPool:
    """The graphed forwards of a model, each used by one generation at a time.

    Args:
        stack: The model.
        capture: Captures a pass; None computes passes without capture.
        rounds_as_static: Whether half precision may be rounded as by the model with a static cache.
            Otherwise it must have the bits of the model with its usual cache.
    """

    def __init__(
        self, stack: DecoderStack, capture: Capture | None, *, rounds_as_static: bool
    ) -> None:
        self._stack, self._capture = stack, capture
        self._rounds_as_static = rounds_as_static
        self._lock = threading.Lock()
        self._watched: object = None
        self._idle: list[GraphedForward] = []
        self._obstacles: dict[CacheShape, str] = {}

    def take(self, batch: int, capacity: int, most: int) -> GraphedForward | str:
        """Return a forward that computes what the model computes, or why there is none.

        Args:
            batch: The number of rows.
            capacity: The maximum number of columns of a row.
            most: The most tokens of a row in a pass behind the prompt, 1 to `MOST_TOKENS`.
        """
        obstacle = graph_obstacle(self._stack)  # hooks may be new
        if obstacle is not None:
            return obstacle
        shape = CacheShape.fitting(self._stack, batch, capacity, most)
        watched = _watched(self._stack)
        with self._lock:
            if watched != self._watched:  # graphs have the addresses of weights
                self._watched = watched
                self._idle.clear()
                self._obstacles.clear()
            for place, forward in enumerate(self._idle):
                if forward.requested.covers(shape):
                    return self._idle.pop(place)
            obstacle = self._obstacles.get(shape)
        if obstacle is not None:
            return obstacle
        try:
            # What is made in inference mode could not be written outside of it.
            with torch.inference_mode(False), torch.no_grad():
                made = self._make(shape)
        except torch.OutOfMemoryError as error:  # not remembered: later, there may be more memory
            return f"a cache of {shape.columns} columns does not fit ({first_line(error)})"
        if isinstance(made, str):
            with self._lock:
                self._obstacles[shape] = made
        else:
            made.watched = watched
        return made

    def give_back(self, forward: GraphedForward) -> None:
        """Keep a forward for later generations."""
        with self._lock:
            if forward.watched == self._watched:
                self._idle.insert(0, forward)
                del self._idle[_KEPT:]

    def _make(self, shape: CacheShape) -> GraphedForward | str:
        """Return a forward that was compared with the model, or what differs."""
        stack = self._stack
        try:
            forward = GraphedForward(stack, shape, self._capture)
            reason = self._find_difference(forward)
        except torch.OutOfMemoryError:
            raise
        except CaptureError as error:
            return str(error)
        except (ModelError, RuntimeError, TypeError, ValueError) as error:
            # What models raise for caches, masks or positions that they do not take.
            return f"its forward does not run over a static cache ({first_line(error)})"
        return forward if reason is None else reason

    def _find_difference(self, forward: GraphedForward) -> str | None:
        stack = self._stack

        def usual() -> OwnForward:
            return OwnForward(stack)

        def static() -> OwnForward:
            return OwnForward(stack, static_cache(stack, forward.shape.columns))

        if stack.dtype not in _HALF and product_precision(stack.device) is None:
            return _find_difference(forward, usual, bits=False)
        reason = _find_difference(forward, usual, bits=True)
        if reason is None or not self._rounds_as_static:
            return reason
        forward.rounding = ", rounded as by generate with this cache"
        reason = _find_difference(forward, usual, bits=False)
        return reason or _find_difference(forward, static, bits=True)


def check_graphs(stack: DecoderStack, kind: EngineKind) -> None:
    """Check that a model supports graphs if they were chosen by name.

    Raises:
        UsageError: It does not.
    """
    obstacle = graph_obstacle(stack) if kind == "graphs" else None
    if obstacle is not None:
        raise UsageError(
            f"the graphs engine does not support this model: {obstacle}; use the engine auto"
        )


def graphs_of(stack: DecoderStack, kind: EngineKind) -> GraphPool | None:
    """Return the graphs of a model, made on first use, or None where they are not used.

    Args:
        stack: The model.
        kind: "graphs" on any device, "auto" on CUDA only. Passes are captured on CUDA only.
    """
    is_cuda = stack.device.type == "cuda"
    if kind != "graphs" and not (kind == "auto" and is_cuda):
        return None
    capture = capture_cuda_graph if is_cuda else None
    pool = GraphPool(stack, capture, rounds_as_static=kind == "graphs")
    found: GraphPool = stack.engines.setdefault(f"passes of {kind}", pool)
    return found


def _watched(stack: DecoderStack) -> object:
    """Return what a graph depends on: modules, addresses of weights, and how kernels are chosen."""
    model, cuda = stack.model, torch.backends.cuda
    weights = (*model.parameters(), *model.buffers())
    return (
        tuple(model.modules()),
        tuple(weight.data_ptr() for weight in weights),
        getattr(model.config, "_attn_implementation", None),
        product_precision(stack.device),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        torch.are_deterministic_algorithms_enabled(),
    )


def _find_difference(
    forward: GraphedForward, reference: Callable[[], OwnForward], *, bits: bool
) -> str | None:
    """Compare passes with the model's, one token at a time; return what differs, or None.

    Args:
        forward: The forward. Passes over so many tokens that bits differ lower its `most`.
        reference: Returns the model's own, before any pass.
        bits: Whether every bit must be equal; otherwise results may be rounded in another way.
    """
    singles = _SINGLES if bits else 2
    longest = min(forward.shape.columns, _LONGEST_TEST) - max(singles, 1 + forward.shape.most)
    for start in sorted({max(1, min(at, longest)) for at in (5, longest)}):
        reason = _Comparison(forward, reference(), start, singles, bits=bits).run()
        if reason is not None:
            return reason
    return None


class _Comparison:
    """A comparison behind a prompt of random tokens; see `_find_difference`.

    Args:
        forward: The forward.
        reference: The model's own.
        start: The length of the prompt. With several rows, the first one is half as long.
        singles: The number of passes over a single token.
        bits: Whether every bit must be equal.
    """

    def __init__(
        self,
        forward: GraphedForward,
        reference: OwnForward,
        start: int,
        singles: int,
        *,
        bits: bool,
    ) -> None:
        stack, shape = forward.stack, forward.shape
        self.forward, self.reference, self.start = forward, reference, start
        self.bits, self.same = bits, torch.equal if bits else self._close
        stop = min(start + max(singles, 1 + shape.most), shape.columns)
        self.singles = range(start, min(start + singles, stop))
        random = torch.Generator().manual_seed(start)
        ids = torch.randint(stack.vocab_size, (shape.batch, stop), generator=random)
        self.ids = ids.to(stack.device)
        columns = torch.arange(stop, device=stack.device)
        first = torch.zeros((shape.batch, 1), dtype=torch.long, device=stack.device)
        first[0] = start // 2 if shape.batch > 1 else 0
        self.mask, self.positions = (columns >= first).long(), (columns - first).clamp_min(0)

    def run(self) -> str | None:
        """Return what differs, or None."""
        start, stop = self.start, self.ids.shape[1]
        expected = self._logits(self.reference, 0, start)
        if not self.same(self._logits(self.forward, 0, start), expected):
            return f"a prompt of {start} tokens gives other logits than without graphs"
        each = {at: self._logits(self.reference, at, at + 1) for at in range(start, stop)}
        for at in self.singles:
            if not self.same(self._logits(self.forward, at, at + 1), each[at]):
                return f"a token behind {at} others gets other logits than without graphs"
        if not self._same_cache(self.singles):
            return "keys and values are rounded in another way than without graphs"
        begin, wrong = start + 1, (self.ids + 1).remainder(self.forward.stack.vocab_size)
        for end in range(begin + 1, min(begin + self.forward.shape.most, stop) + 1):
            self._logits(self.forward, begin, end, wrong)  # a draft that is rejected
            made = self._logits(self.forward, begin, end)
            own = torch.cat([each[at] for at in range(begin, end)], dim=1)
            if not (self.same(made, own) and self._same_cache(range(begin, end))):
                count = end - begin
                if not self.bits or count == 1:
                    return f"a pass over {count} tokens gives other logits than without graphs"
                self.forward.shape = replace(self.forward.shape, most=count - 1)
                return None
        return None

    def _close(self, made: Tensor, own: Tensor) -> bool:
        dtype = self.forward.stack.dtype  # logits are in fp32
        return close(made.to(dtype), own.to(dtype))

    def _logits(self, by: OwnForward, begin: int, end: int, ids: Tensor | None = None) -> Tensor:
        padded: dict[str, Any] = {}
        if self.forward.shape.batch > 1:
            mask, positions = self.mask[:, :end], self.positions[:, begin:end]
            padded = {"attention_mask": mask, "position_ids": positions}
        tokens = (self.ids if ids is None else ids)[:, begin:end]
        return by.run(tokens, begin, last=not begin, **padded)

    def _same_cache(self, written: range) -> bool:
        """Return whether columns have the bits of the model's keys and values, if bits count."""
        columns = slice(written.start, written.stop)
        layers = zip(self.forward.cache.layers, self.reference.cache.layers, strict=True)
        return not self.bits or all(
            torch.equal(getattr(made, name)[:, :, columns], getattr(own, name)[:, :, columns])
            for made, own in layers
            for name in ("keys", "values")
        )
