"""The engine is used for few tokens, and only if it computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.reference_early_exit import (
    CLOSE,
    LAYERS,
    SKIPPING_FAMILIES,
    difference,
    own_logits,
)
from support.tiny_models import random_ids, tiny_model
from torch import Tensor, nn

from cascade.decoding.engine.compiled_layers import CompiledLayers
from cascade.decoding.engine.engine import DecodingEngine
from cascade.decoding.engine.fused_layers import FusedLayers
from cascade.decoding.forward import Chunk
from cascade.decoding.kv_cache import Selection
from cascade.decoding.selective_layers import LayerTask, SkippingLayers
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack


@pytest.fixture
def hooked() -> Iterator[Callable[[nn.Module, Any], None]]:
    """Return a function that registers a forward hook during a test."""
    handles = []
    yield lambda module, hook: handles.append(module.register_forward_hook(hook))
    for handle in handles:
        handle.remove()


def own_stack(family: str) -> DecoderStack:
    """Return a new stack, since the engine does not replace modules with hooks of other tests."""
    return DecoderStack(tiny_model(family))


#: Families with exactly Llama's layers, which the engine computes.
LEAN = ("llama", "qwen2", "qwen3", "mistral", "smollm3")


def own_difference(layers: SkippingLayers, ids: Tensor) -> float:
    """Return the distance between logits computed token by token and the model's logits."""
    stack, cache = layers.stack, layers.new_cache(*ids.shape)
    outputs = []
    for start in range(ids.shape[1]):
        cache.window(start, start + 1)
        everything = torch.ones(len(ids), 1).bool()
        positions = torch.full((len(ids), 1), start)
        chunk = Chunk(ids[:, start : start + 1], everything, positions, None)
        plan = chunk.plan(layers, cache)
        hidden = plan.embedded
        for layer, call in enumerate(plan.calls, start=1):
            selection = Selection(everything, ~everything)
            task = LayerTask(layer, hidden, selection, call, cache, Counts.of(LAYERS))
            hidden = layers.run(task)
        outputs.append(hidden)
    return difference(stack.decode(torch.cat(outputs, dim=1)), own_logits(stack, ids))


@SKIPPING_FAMILIES
def test_engine_is_used_only_for_llama_layers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = DecodingEngine.run

    def counting(self: DecodingEngine, *args: Any, **kwargs: Any) -> Tensor:
        runs.append(kwargs["last"])
        return run(self, *args, **kwargs)

    layers = SkippingLayers(own_stack(family))
    monkeypatch.setattr(DecodingEngine, "run", counting)
    assert own_difference(layers, random_ids(2, 6)) <= CLOSE
    assert runs == (6 * [1, 2, 3, 4] if family in LEAN else [])


@pytest.mark.parametrize("family", LEAN)
def test_planted_bug_disables_the_engine(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (CompiledLayers, FusedLayers):
        run: Any = kind.run

        def wrong(self: Any, *args: Any, run: Any = run) -> Tensor:
            made: Tensor = run(self, *args) * 1.01
            return made

        monkeypatch.setattr(kind, "run", wrong)
    layers = SkippingLayers(own_stack(family))
    assert layers.skips
    assert layers.engine is not None
    assert not layers.engine.is_ready()
    assert own_difference(layers, random_ids(2, 6)) <= CLOSE


MODULES = [name for name, _ in own_stack("qwen3").layers[0].named_modules()]


def louder(output: Any) -> Any:
    """Change a module's output so that a following norm does not cancel the change."""
    hidden = output[0] if isinstance(output, tuple) else output
    made = 1.5 * hidden + 0.1
    return (made, *output[1:]) if isinstance(output, tuple) else made


@pytest.mark.parametrize("path", MODULES, ids=[path or "layer" for path in MODULES])
def test_engine_calls_hooks_registered_later(
    path: str, hooked: Callable[[nn.Module, Any], None]
) -> None:
    layers, ids = SkippingLayers(own_stack("qwen3")), random_ids(2, 6)
    before = own_logits(layers.stack, ids)
    hooked(layers.stack.layers[1].get_submodule(path), lambda _, __, output: louder(output))
    assert difference(own_logits(layers.stack, ids), before) > 1e-3
    assert own_difference(layers, ids) <= CLOSE


@pytest.mark.parametrize("path", MODULES, ids=[path or "layer" for path in MODULES])
def test_engine_calls_forwards_replaced_later(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, ids = SkippingLayers(own_stack("qwen3")), random_ids(2, 6)
    before = own_logits(layers.stack, ids)
    module = layers.stack.layers[1].get_submodule(path)
    forward = module.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return louder(forward(*args, **kwargs))

    monkeypatch.setitem(vars(module), "forward", replaced)
    assert difference(own_logits(layers.stack, ids), before) > 1e-3
    assert own_difference(layers, ids) <= CLOSE
