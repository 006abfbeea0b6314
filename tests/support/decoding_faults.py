"""Faults to plant in decoding: the prefill of a model stays as it is, cached steps do not.

Each is a context manager, as those of `support.faults`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from cascade.models.stack import DecoderStack
from support.faults import Fault, Plant, attribute_of

#: What attention reads in a cached step, changed: keys and values `[B, heads, T, head_dim]`.
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def wrong_cache(layer: int, change: Change) -> Plant:
    """Change what one layer's cache returns in cached steps, and only there."""

    def plant(_: DecoderStack) -> Any:
        right = Cache.update

        def update(self: Any, key: Tensor, value: Tensor, index: int, *args: Any, **kw: Any) -> Any:
            keys, values = right(self, key, value, index, *args, **kw)
            is_cached = keys.shape[-2] > key.shape[-2]
            return change(keys, values) if is_cached and index == layer - 1 else (keys, values)

        return attribute_of(Cache, "update", update)

    return plant


def _with(tensor: Tensor, place: int, values: Tensor | float) -> Tensor:
    """Return a copy in which one token's keys or values are others."""
    changed = tensor.clone()
    changed[:, :, place] = values
    return changed


def _fp8(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn).to(tensor.dtype)


#: Name -> what a broken cache returns. The last token is the one that the step adds.
CHANGES: dict[str, Change] = {
    "stale key": lambda k, v: (_with(k, -1, k[:, :, -2]), v),
    "stale value": lambda k, v: (k, _with(v, -1, v[:, :, -2])),
    "shifted keys": lambda k, v: (k.roll(1, dims=-2), v),
    "shifted values": lambda k, v: (k, v.roll(1, dims=-2)),
    "zeroed key": lambda k, v: (_with(k, -2, 0.0), v),
    "zeroed value": lambda k, v: (k, _with(v, -2, 0.0)),
    "truncated": lambda k, v: (k[:, :, 4:], v[:, :, 4:]),
    "fp8 keys": lambda k, v: (_fp8(k), v),
    "fp8 values": lambda k, v: (k, _fp8(v)),
}


def forgets_after_crop(layer: int) -> Plant:
    """Let a layer's cache lose the last token that it keeps when tokens are removed."""

    def plant(_: DecoderStack) -> Any:
        right = Cache.crop

        def crop(self: Any, tokens_to_remove: int) -> None:
            right(self, tokens_to_remove)
            if tokens_to_remove:
                held: Any = self.layers[layer - 1]
                held.keys = _with(held.keys, -1, 0.0)
                held.values = _with(held.values, -1, 0.0)

        return attribute_of(Cache, "crop", crop)

    return plant


def removes_nothing(_: DecoderStack) -> Any:
    """Let the cache keep rejected tokens."""
    return attribute_of(DynamicLayer, "crop", lambda self, tokens_to_remove: None)


def late_positions(stack: DecoderStack) -> Any:
    """Add one to the rotary positions of cached steps."""
    rotary: Any = stack.decoder.rotary_emb
    forward = rotary.forward

    def shifted(x: Tensor, position_ids: Tensor) -> Any:
        return forward(x, position_ids=position_ids + int(position_ids.min() > 0))

    return attribute_of(rotary, "forward", shifted)


def late_learned_positions(stack: DecoderStack) -> Any:
    """Add one to the learned positions of GPT-2's cached steps."""
    table: Any = stack.decoder.wpe
    forward = table.forward
    return attribute_of(table, "forward", lambda ids: forward(ids + int(ids.min() > 0)))


def wrong_kernel(layer: int, applies: Callable[[int], bool], *, by: float = 1.01) -> Plant:
    """Scale what one layer's attention writes if `applies(tokens of the pass)`."""

    def plant(stack: DecoderStack) -> Any:
        output: Any = stack.layers[layer - 1].self_attn.o_proj  # type: ignore[union-attr]
        forward = output.forward
        return attribute_of(
            output, "forward", lambda x: forward(x) * (by if applies(x.shape[1]) else 1.0)
        )

    return plant


@contextlib.contextmanager
def together(stack: DecoderStack, *plants: Plant) -> Iterator[None]:
    """Plant several faults at once."""
    with contextlib.ExitStack() as restore:
        for plant in plants:
            restore.enter_context(plant(stack))
        yield


def _in_layer_13(name: str) -> Fault:
    what = f"decoding: {name} in layer 13"
    return Fault(what, wrong_cache(13, CHANGES[name]), "decoding", "13")


#: Faults of a Llama-shaped model of 30 layers, for `tests/suites/test_sensitivity.py`.
DECODING_FAULTS = {
    **{name: _in_layer_13(name) for name in CHANGES},
    "late positions": Fault(
        "decoding: positions off by one in cached steps only", late_positions, "decoding", "1"
    ),
    "crop": Fault(
        "decoding: layer 13's cache forgets a token when rejected ones are removed",
        forgets_after_crop(13),
        "decoding",
        "13",
    ),
    "one row": Fault(
        "decoding: layer 13's attention x 1.01 for a single token",
        wrong_kernel(13, lambda tokens: tokens == 1),
        "decoding",
        "13",
    ),
    "few rows": Fault(
        "decoding: layer 13's attention x 1.01 for 2 to 8 tokens at once",
        wrong_kernel(13, lambda tokens: 2 <= tokens <= 8),
        "decoding",
        "13",
    ),
}

#: Parametrizes a test with every change of a cache.
ALL_CHANGES = pytest.mark.parametrize("name", CHANGES)
