"""Fast layers match the layers of models like Llama; a check precedes their use."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, WIDTH, random_ids, tiny_model
from torch import Tensor, nn

from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.selective_layers import SkippingLayers
from cascade.models.fast_layers import MAX_ROWS, FastLayers, product
from cascade.models.stack import DecoderStack

#: The families whose layers combine their modules as Llama does.
SUPPORTED = ["llama", "qwen2", "qwen3", "mistral", "smollm3"]

#: fp32 rounding of sums in another order, for states below 100.
CLOSE = 1e-4


def fast_of(layers: SkippingLayers) -> FastLayers | None:
    return layers.fast


def columns(
    stack: DecoderStack, fast: FastLayers, batch: int, start: int, stop: int, *, padded: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return layer outputs, keys and values of some tokens, by the model and by fast layers."""
    ids = random_ids(batch, stop)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :2] = 0
    found: list[list[Tensor]] = []
    for method in ("own", "fast"):
        cache = SkippingLayers(stack, skip=False).new_cache(batch, stop)
        states: list[Tensor] = []
        for first, last in ((0, start), (start, stop)):
            cache.window(first, last)
            plan = stack.plan(
                ids[:, first:last], attention_mask=mask[:, :last] if padded else None, cache=cache
            )
            hidden = plan.embedded
            for layer, call in enumerate(plan.calls, start=1):
                if first and method == "fast":
                    assert fast.can_compute(layer, hidden, call.kwargs)
                    hidden = fast.compute(layer, hidden, call.kwargs)
                else:
                    hidden = stack.step(layer, hidden, call)
                if first:
                    states += [hidden, *cache.read(layer - 1)]
        found.append(states)
    return found[0], found[1]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("batch", "start", "stop"), [(1, 9, 10), (3, 9, 10), (2, 9, 14)])
@pytest.mark.parametrize("family", SUPPORTED)
def test_fast_layers_match_the_model(
    family: str, batch: int, start: int, stop: int, padded: bool
) -> None:
    stack = DecoderStack(tiny_model(family))
    own, fast = columns(stack, FastLayers(stack.layers), batch, start, stop, padded=padded)
    assert len(own) == len(fast) == 12
    for one, other in zip(own, fast, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= CLOSE


def test_fast_layers_use_the_sliding_window_mask() -> None:
    stack = DecoderStack(tiny_model("mistral"))  # windows of 8
    own, fast = columns(stack, FastLayers(stack.layers), 2, 20, 22, padded=False)
    for one, other in zip(own, fast, strict=True):
        assert (one - other).abs().max() <= CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_only_matching_families_use_fast_layers(family: str) -> None:
    layers = SkippingLayers(DecoderStack(tiny_model(family)))
    assert (fast_of(layers) is not None) == (family in SUPPORTED)
    assert fast_of(SkippingLayers(layers.stack, skip=False)) is None


class Doubled(nn.Module):
    """An MLP with the same modules as Llama's but twice its output."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, rows: Tensor) -> Tensor:
        made: Tensor = self.down_proj(self.act_fn(self.gate_proj(rows)) * self.up_proj(rows))
        return 2 * made


def test_layer_with_another_mlp_uses_no_fast_layers() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    stack = DecoderStack(model)
    assert fast_of(SkippingLayers(stack)) is not None
    layer: Any = stack.layers[2]
    layer.mlp = Doubled(layer.mlp)
    assert fast_of(SkippingLayers(stack)) is None


@pytest.mark.parametrize("name", ["", "self_attn", "mlp", "mlp.up_proj", "self_attn.q_proj"])
def test_hooks_on_any_module_are_called(name: str) -> None:
    stack = DecoderStack(tiny_model("llama"))
    fast, own = EarlyExit(stack), EarlyExit(stack, skip=False)
    calls: list[int] = []
    stack.layers[1].get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    times = []
    for early in (fast, own):
        calls.clear()
        early.generate(random_ids(1, 20), max_new_tokens=3, eos_token_id=())
        times.append(len(calls))
    assert times[0] == times[1] >= 3


@pytest.mark.parametrize("family", SUPPORTED)
def test_capture_hooks_of_transformers_do_not_disable_fast_layers(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = FastLayers.compute

    def counting(self: FastLayers, layer: int, *args: Any) -> Tensor:
        steps.append(layer)
        return step(self, layer, *args)

    monkeypatch.setattr(FastLayers, "compute", counting)
    stack, ids = DecoderStack(tiny_model(family)), random_ids(1, 20)
    model: Any = stack.model

    def generated(early: EarlyExit) -> tuple[Tensor, int]:
        steps.clear()
        made = early.generate(ids, max_new_tokens=3, eos_token_id=())
        assert isinstance(made, Tensor)
        return made, len(steps)

    early = EarlyExit(stack)
    before, taken = generated(early)
    assert taken == 2 * 4  # two tokens after the prompt run through four layers each
    captured = model(ids, output_hidden_states=True).hidden_states
    assert any(layer._forward_hooks for layer in stack.layers), "expected capture hooks"
    for later in (early, EarlyExit(stack)):
        text, steps_taken = generated(later)
        assert torch.equal(text, before)
        assert steps_taken == taken
    # Capturing still works, and so does another hook next to it.
    for one, other in zip(
        captured, model(ids, output_hidden_states=True).hidden_states, strict=True
    ):
        assert torch.equal(one, other)
    calls: list[int] = []
    stack.layers[1].register_forward_hook(lambda *_: calls.append(1))
    assert generated(early)[1] == 2 * 3
    assert len(calls) >= 2


def test_fast_layers_use_weights_changed_later() -> None:
    stack = DecoderStack(tiny_model("llama"))
    fast = FastLayers(stack.layers)
    before, _ = columns(stack, fast, 1, 9, 10, padded=False)
    layer: Any = stack.layers[0]
    layer.input_layernorm = copy.deepcopy(layer.input_layernorm)
    with torch.no_grad():
        layer.input_layernorm.weight.mul_(3.0)
        layer.mlp.up_proj.weight.mul_(0.5)
    own, other = columns(stack, fast, 1, 9, 10, padded=False)
    assert (own[-3] - before[-3]).abs().max() > 0.1
    assert (own[-3] - other[-3]).abs().max() <= CLOSE


def test_many_rows_use_the_models_own_layers() -> None:
    stack = DecoderStack(tiny_model("llama"))
    cache = SkippingLayers(stack).new_cache(1, MAX_ROWS + 1)
    for length, taken in ((MAX_ROWS, True), (MAX_ROWS + 1, False)):
        cache.window(0, length)
        plan = stack.plan(random_ids(1, length), cache=cache)
        fast = FastLayers(stack.layers)
        assert fast.can_compute(1, plan.embedded, plan.calls[0].kwargs) is taken


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1,), (2, 3)])
def test_product_matches_the_module(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bias: bool,
    amx: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    calls: list[int] = []
    mv = torch.mv
    monkeypatch.setattr("cascade.models.fast_layers.has_amx", lambda: amx)
    monkeypatch.setattr(torch, "mv", lambda *args: calls.append(1) or mv(*args))
    module = nn.Linear(WIDTH, 3 * WIDTH, bias=bias, dtype=dtype)
    rows = torch.randn((*shape, WIDTH), dtype=dtype)
    expected = module(rows)
    made = product(module, rows)
    assert made.shape == expected.shape
    assert made.dtype is dtype
    # Numbers around 1 are rounded twice.
    assert (made - expected).abs().max() <= 4 * torch.finfo(dtype).eps
    # Without AMX a matrix product with one row is faster.
    single = shape != (2, 3)
    assert bool(calls) is (amx and single and dtype is torch.bfloat16)


def test_product_calls_modules_other_than_linear() -> None:
    class Other(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            return super().forward(rows) + 1

    module = Other(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
    rows = torch.randn((1, WIDTH), dtype=torch.bfloat16)
    assert torch.equal(product(module, rows), module(rows))
