"""Families whose tokens cannot be packed compute every token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.reference_early_exit import (
    CLOSE,
    LAYERS,
    SKIPPING_FAMILIES,
    a_stack,
    apart,
    by_hand,
    some_exits,
    some_heads,
    state_of,
)
from support.tiny_models import random_ids, tiny_model
from torch import Tensor, nn

from cascade.decoding.early_exit import EarlyExit, Propagation
from cascade.decoding.selective_layers import SkippingLayers
from cascade.models.stack import DecoderStack

# --- Helpers ----------------------------------------------------------------------------------


@pytest.fixture
def hooked() -> Iterator[Callable[[nn.Module, Any], None]]:
    """Return a function that registers a forward hook during a test."""
    handles = []
    yield lambda module, hook: handles.append(module.register_forward_hook(hook))
    for handle in handles:
        handle.remove()


# --- The numerical comparison -----------------------------------------------------------------


def check_it_falls_back(stack: DecoderStack, reason: str) -> None:
    """Raise AssertionError unless exits work without skipping, for the given reason."""
    heads, ids = some_heads(stack.model.config.model_type), random_ids(2, 16)
    propagations: tuple[Propagation, ...] = ("frozen", "ridge")
    for propagation in propagations:
        exits = some_exits(stack, heads=heads, propagation=propagation, text=ids)
        early = EarlyExit(stack, exits=exits, propagation=propagation)
        assert early.fallback_reason == reason
        score = early.score(ids, keep_logits=True)
        expected = by_hand(stack, ids, exits, propagation=propagation, heads=heads)
        assert score.logits is not None
        assert apart(score.logits, expected.logits) <= CLOSE
        assert torch.equal(score.exit_layers, expected.exit_layers)
        assert score.counts.layer_rows == [32] * LAYERS


DIFFERS = "layer {} computed for some tokens differs from the full computation"


def forget_rotation(layers: type[SkippingLayers]) -> Callable[..., Any]:
    rotate = layers.rotate

    def wrong(self: SkippingLayers, layer: int, raw: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return rotate(self, layer, raw, torch.ones_like(cos), torch.zeros_like(sin))

    return wrong


def rotate_too_far(layers: type[SkippingLayers]) -> Callable[..., Any]:
    rotate = layers.rotate

    def wrong(self: SkippingLayers, layer: int, raw: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return rotate(self, layer, raw, cos.roll(1, dims=0), sin.roll(1, dims=0))

    return wrong


def swap_keys_and_values(layers: type[SkippingLayers]) -> Callable[..., Any]:
    rotate = layers.rotate

    def wrong(self: SkippingLayers, layer: int, raw: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return rotate(self, layer, torch.cat(raw.chunk(2, dim=-1)[::-1], dim=-1), cos, sin)

    return wrong


def forget_the_norm(_: type[SkippingLayers]) -> Callable[..., Any]:
    def wrong(self: SkippingLayers, layer: int, hidden: Tensor) -> Tensor:
        attention: Any = self.stack.layers[layer - 1].self_attn
        return torch.cat([attention.k_proj(hidden), attention.v_proj(hidden)], dim=-1)

    return wrong


@pytest.mark.parametrize(
    ("method", "plant"),
    [
        ("rotate", forget_rotation),
        ("rotate", rotate_too_far),
        ("rotate", swap_keys_and_values),
        ("project", forget_the_norm),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_planted_bug_causes_fallback(
    family: str,
    method: str,
    plant: Callable[[type[SkippingLayers]], Callable[..., Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SkippingLayers, method, plant(SkippingLayers))
    check_it_falls_back(a_stack(family), DIFFERS.format(1))


class NormsByAnotherName(nn.Module):
    """Attention whose keys are normed by a module with an unusual name."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.real, self.key_norm = attention, attention.k_norm
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.head_dim, self.config = attention.head_dim, attention.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.real(*args, **kwargs)


def test_unknown_norm_of_keys_causes_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    module = sys.modules[type(model).__module__]
    for name in ("apply_rotary_pos_emb", "eager_attention_forward"):
        monkeypatch.setattr(sys.modules[__name__], name, getattr(module, name), raising=False)
    for layer in model.model.layers:
        layer.self_attn = NormsByAnotherName(layer.self_attn)
    check_it_falls_back(DecoderStack(model), DIFFERS.format(1))


def test_fallback_reason_names_layer_that_mixes_tokens(
    hooked: Callable[[nn.Module, Any], None],
) -> None:
    def add_what_came_before(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 0.5 * nn.functional.pad(output[:, :-1], (0, 0, 1, 0))

    hooked(a_stack("llama").layers[2].get_submodule("mlp"), add_what_came_before)
    check_it_falls_back(a_stack("llama"), DIFFERS.format(3))


def test_layer_that_rejects_packed_rows_causes_fallback(
    hooked: Callable[[nn.Module, Any], None],
) -> None:
    def insist(_: nn.Module, args: Any, output: Tensor) -> None:
        if output.shape[:2] not in ((2, 3), (2, 4), (2, 16)):
            raise RuntimeError(f"expected two rows\nnot {output.shape[0]}")

    hooked(a_stack("llama").layers[1].get_submodule("mlp"), insist)
    reason = "its layers cannot be computed for some tokens (expected two rows)"
    check_it_falls_back(a_stack("llama"), reason)


def test_attention_without_mask_per_query_is_not_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = a_stack("llama")
    monkeypatch.setattr(stack.model.config, "_attn_implementation", "flex_attention")
    assert SkippingLayers(stack).reason == (
        "its attention is flex_attention; tokens are packed for eager and sdpa attention only"
    )


def test_layers_without_rotary_positions_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = a_stack("llama")
    plan = stack.plan

    def planned_without(*args: Any, **kwargs: Any) -> Any:
        made = plan(*args, **kwargs)
        for call in made.calls:
            call.kwargs.pop("position_embeddings")
        return made

    monkeypatch.setattr(stack, "plan", planned_without)
    reason = SkippingLayers(stack).reason
    assert reason == "its layers are called without rotary position_embeddings"


@SKIPPING_FAMILIES
def test_numerical_comparison_does_not_change_model(family: str) -> None:
    stack = a_stack(family)
    before = state_of(stack)
    assert SkippingLayers(stack).skips
    assert state_of(stack) == before
