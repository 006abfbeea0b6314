"""The engines of this machine, and states of a text by the engine and by the model itself."""

from __future__ import annotations

import os
import shutil

import pytest
from torch import Tensor

from cascade.decoding.engine.engine import DecodingEngine, EngineKind
from cascade.decoding.engine.rows import Rows
from cascade.decoding.kv_cache import KeyValueCache
from cascade.models.stack import DecoderStack

_HAS_COMPILER = shutil.which(os.environ.get("CC") or "cc") is not None

#: For tests of compiled layers.
needs_compiler = pytest.mark.skipif(not _HAS_COMPILER, reason="needs a C compiler")

#: The engines that this machine has, the best one first.
KINDS: tuple[EngineKind, ...] = ("compiled", "fused") if _HAS_COMPILER else ("fused",)

#: What computes a model like Llama in fp32 if no engine is named.
BEST: EngineKind = KINDS[0]

#: fp32 rounding of sums in another order, for states below 100.
CLOSE = 1e-4


def states_of(engine: DecodingEngine, rows: Rows, ids: Tensor, cache: KeyValueCache) -> Tensor:
    return engine.run(engine.embed(ids), rows, cache)


def filled(engine: DecodingEngine, ids: Tensor, capacity: int) -> KeyValueCache:
    """Return a cache of one sequence with the keys and values of a text, by the model itself."""
    stack = engine.stack
    cache = KeyValueCache(stack.num_layers, 1, capacity)
    cache.allocate(*engine.cache_shape, engine.embed(ids[:1]))
    cache.window(0, len(ids))
    plan = stack.plan(ids[None], cache=cache)
    hidden = plan.embedded
    for layer, call in enumerate(plan.calls, start=1):
        hidden = stack.step(layer, hidden, call)
    return cache


def own_states(stack: DecoderStack, ids: Tensor) -> Tensor:
    """Return the states of a text before the final norm, `[T, D]`, by the model itself."""
    last: list[Tensor] = []
    stack.visit(ids[None], lambda entry, hidden: last.__setitem__(slice(None), [hidden]))
    return last[0][0]


def difference_behind(engine: DecodingEngine, ids: Tensor, prompt: int) -> float:
    """Return how far states and logits behind a prompt are from the model's own.

    Args:
        engine: The engine.
        ids: A text, `[T]`.
        prompt: The tokens that the model computes itself; the engine computes the others.
    """
    cache = filled(engine, ids[:prompt], len(ids) + 8)
    rows = Rows.chains([0], [prompt], [len(ids) - prompt])
    made = states_of(engine, rows, ids[prompt:], cache)
    expected = own_states(engine.stack, ids)[prompt:]
    logits = engine.stack.decode(expected[None])[0]
    differences = (made - expected), (engine.logits(made) - logits)
    return max(float(values.abs().max()) for values in differences)
