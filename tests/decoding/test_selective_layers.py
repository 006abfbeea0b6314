"""Layers that compute only active tokens give the same states, keys and values."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layer_probes import at, planned, stepped
from support.reference_early_exit import (
    ALL_FAMILIES,
    CLOSE,
    LAYERS,
    SKIPPING,
    SKIPPING_FAMILIES,
    ByHand,
    a_stack,
    apart,
    climb,
    difference,
    map_by_hand,
    positions_of,
    some_heads,
    some_mask,
)
from support.tiny_models import WIDTH, random_ids, tiny_model
from torch import Tensor, nn

from cascade.decoding.kv_cache import KeyValueCache, Selection
from cascade.decoding.selective_layers import LayerTask, SkippingLayers
from cascade.exits.fitted_heads import FittedHeads
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack, LayerCall

#: Longer than the sliding windows of 8, so that a purely causal mask would be detected.
LONGEST = 18


@functools.cache
def some_layers(family: str, *, skip: bool = True) -> SkippingLayers:
    return SkippingLayers(a_stack(family), skip=skip)


# --- A mixture of exits, layer by layer -------------------------------------------------------


@dataclass
class Mixture:
    """Which tokens exit at which layer, and in which chunks they are computed.

    Attributes:
        ids: `[B, T]`.
        mask: `[B, T]`, or None without padding.
        exit_layers: `[B, T]`; N for tokens that do not exit.
        cuts: Ends of the chunks, ascending; the last is T.
        ridge: Whether upper layers get predictions.
    """

    ids: Tensor
    mask: Tensor | None
    exit_layers: Tensor
    cuts: list[int]
    ridge: bool

    @property
    def valid(self) -> Tensor:
        return torch.ones_like(self.ids).bool() if self.mask is None else self.mask.bool()


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, LONGEST))
    lefts = [draw(st.integers(0, min(length - 1, 4))) for _ in range(batch)]
    mask = torch.tensor([[0] * left + [1] * (length - left) for left in lefts])
    drawn = st.lists(st.integers(1, LAYERS), min_size=batch * length, max_size=batch * length)
    cuts = draw(st.sets(st.integers(1, length), max_size=3)) | {length}
    return Mixture(
        random_ids(batch, length, seed=draw(st.integers(0, 99))),
        mask if any(lefts) else None,
        torch.tensor(draw(drawn)).view(batch, length),
        sorted(cuts),
        draw(st.booleans()),
    )


def plain(stack: DecoderStack, mixture: Mixture, heads: FittedHeads) -> ByHand:
    """Return the reference pass of a mixture."""
    return climb(
        stack,
        mixture.ids,
        mixture.mask,
        lambda layer, _, undecided: undecided & (mixture.exit_layers == layer),
        propagation="ridge" if mixture.ridge else "frozen",
        heads=heads if mixture.ridge else None,
    )


def run(
    layers: SkippingLayers, mixture: Mixture, expected: ByHand, heads: FittedHeads
) -> tuple[Tensor, KeyValueCache, Counts]:
    """Run a mixture chunk by chunk; return the last states, the cache and the counts."""
    stack, (batch, length) = layers.stack, mixture.ids.shape
    cache, counts = layers.new_cache(batch, length), Counts.of(LAYERS)
    outputs, start = [], 0
    for stop in mixture.cuts:
        cache.window(start, stop)
        plan = planned(stack, mixture.ids, mixture.mask, cache, start, stop)
        hidden = plan.embedded
        valid, left = mixture.valid[:, start:stop], mixture.exit_layers[:, start:stop]
        for layer in range(1, LAYERS + 1):
            selection = Selection(valid & (left >= layer), valid & (left < layer))
            predicted = None
            if mixture.ridge and bool(selection.exited.any()):
                table = predictions(mixture, expected, heads, layer)[:, start:stop]
                predicted = table[selection.exited_rows, selection.exited_columns]
            task = LayerTask(
                layer,
                hidden,
                selection,
                plan.calls[layer - 1],
                cache,
                counts,
                predicted=predicted,
                predicts_states=heads.of_states,
            )
            hidden = layers.run(task)
        outputs.append(hidden)
        start = stop
    return torch.cat(outputs, dim=1), cache, counts


def predictions(mixture: Mixture, expected: ByHand, heads: FittedHeads, layer: int) -> Tensor:
    """Return the maps' predictions for tokens that exited below a layer, `[B, T, width]`."""
    table = torch.zeros((*mixture.ids.shape, heads.width))
    for below in range(1, layer):
        predicted = map_by_hand(heads, below, expected.states[below])[:, :, layer - below - 1]
        table = torch.where((mixture.exit_layers == below)[..., None], predicted, table)
    return table


def check_a_mixture(
    layers: SkippingLayers, mixture: Mixture, heads: FittedHeads
) -> tuple[Tensor, KeyValueCache, Counts]:
    """Raise AssertionError unless states and cache match the reference pass."""
    expected, valid = plain(layers.stack, mixture, heads), mixture.valid
    hidden, cache, counts = run(layers, mixture, expected, heads)
    assert apart(hidden[valid], expected.states[-1][valid]) <= CLOSE
    for index, layer in enumerate(expected.cache.layers):
        theirs: Any = layer
        keys, values = cache.read(index)
        assert apart(at(keys, valid), at(theirs.keys, valid)) <= CLOSE, f"keys of {index}"
        assert apart(at(values, valid), at(theirs.values, valid)) <= CLOSE
    return hidden, cache, counts


@ALL_FAMILIES
@settings(max_examples=25)
@given(mixtures())
def test_any_mixture_of_exits_matches_reference(family: str, mixture: Mixture) -> None:
    layers, heads = some_layers(family), some_heads(family)
    assert layers.skips == (family in SKIPPING)
    _, _, counts = check_a_mixture(layers, mixture, heads)
    if layers.skips:
        left = torch.where(mixture.valid, mixture.exit_layers, 0)
        exited = [int(((left > 0) & (left < layer)).sum()) for layer in range(1, LAYERS + 1)]
        of_exited = counts.predicted_rows if mixture.ridge else counts.key_value_rows
        assert of_exited == exited


@SKIPPING_FAMILIES
@settings(max_examples=6)
@given(mixtures())
def test_generic_path_matches_reference(family: str, mixture: Mixture) -> None:
    layers, heads = some_layers(family, skip=False), some_heads(family)
    assert not layers.skips
    _, _, counts = check_a_mixture(layers, mixture, heads)
    assert counts.layer_rows == [mixture.ids.numel()] * LAYERS


@functools.cache
def eager_layers(family: str) -> SkippingLayers:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    layers = SkippingLayers(DecoderStack(model))
    assert layers.skips
    return layers


@SKIPPING_FAMILIES
@settings(max_examples=6)
@given(mixtures())
def test_eager_attention_matches_reference(family: str, mixture: Mixture) -> None:
    check_a_mixture(eager_layers(family), mixture, some_heads(family))


@functools.cache
def alternating_layers(family: str) -> SkippingLayers:
    kinds = ["sliding_attention", "full_attention"] * 2
    changes: dict[str, Any] = {"layer_types": kinds}
    if family == "qwen2":
        changes |= {"use_sliding_window": True, "sliding_window": 8}
    layers = SkippingLayers(DecoderStack(tiny_model(family, **changes)))
    assert layers.skips
    return layers


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2"])
@settings(max_examples=8)
@given(mixtures())
def test_mixed_sliding_and_full_attention_layers_match_reference(
    family: str, mixture: Mixture
) -> None:
    check_a_mixture(alternating_layers(family), mixture, some_heads(family))


#: Exit layers of two rows in which no token exits.
NOBODY = torch.full((2, 16), LAYERS)


def half_out(length: int = 16, *, ridge: bool = False) -> Mixture:
    """Return a mixture in which every other token of two rows exits at layer 2."""
    ids = random_ids(2, length)
    exit_layers = torch.full_like(ids, LAYERS)
    exit_layers[:, ::2] = 2
    return Mixture(ids, None, exit_layers, [length], ridge)


@SKIPPING_FAMILIES
def test_sliding_window_is_respected(family: str) -> None:
    stack, mixture = a_stack(family), half_out()
    check_a_mixture(some_layers(family), mixture, some_heads(family))
    if not getattr(stack.model.config, "sliding_window", None):
        return
    plan = stack.plan(mixture.ids)
    full = plain(stack, dataclasses.replace(mixture, exit_layers=NOBODY), some_heads(family))
    causal = torch.ones(1, 1, 16, 16).tril().bool()
    if stack.model.config._attn_implementation == "eager":
        causal = torch.zeros(1, 1, 16, 16).masked_fill(~causal, torch.finfo().min)
    calls = [LayerCall(call.args, call.kwargs | {"attention_mask": causal}) for call in plan.calls]
    without_window = stepped(stack, plan.embedded, tuple(calls))
    assert apart(without_window[:, :8], full.states[-1][:, :8]) <= CLOSE
    assert difference(without_window[:, 8:], full.states[-1][:, 8:]) > 1e-3


@SKIPPING_FAMILIES
def test_bfloat16_mixtures_agree(family: str) -> None:
    layers = SkippingLayers(DecoderStack(tiny_model(family).bfloat16()))
    assert layers.skips
    mixture, heads = half_out(), some_heads(family)
    expected = plain(layers.stack, mixture, heads)
    hidden, cache, _ = run(layers, mixture, expected, heads)
    assert hidden.dtype == cache.read(3)[0].dtype == torch.bfloat16
    pairs = [(hidden, expected.states[-1])]
    for index, layer in enumerate(expected.cache.layers):
        theirs: Any = layer
        pairs += zip(cache.read(index), (theirs.keys, theirs.values), strict=True)
    for got, wanted in pairs:
        # Two orders of summation over four layers, in bfloat16 with eight bits.
        assert difference(got, wanted) <= 0.05 * wanted.abs().max().item()


@pytest.mark.parametrize("skip", [True, False], ids=["packed", "generic"])
def test_cache_without_keep_gives_same_single_chunk(skip: bool) -> None:
    layers, mixture, heads = some_layers("qwen3", skip=skip), half_out(), some_heads("qwen3")
    expected = plain(layers.stack, mixture, heads)
    new_cache = functools.partial(KeyValueCache, LAYERS, keep=False)
    keeping, _, _ = run(layers, mixture, expected, heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "new_cache", new_cache)
        forgetting, _, _ = run(layers, mixture, expected, heads)
    assert torch.equal(keeping, forgetting)


@pytest.mark.parametrize("skip", [True, False], ids=["packed", "generic"])
def test_maps_of_layer_inputs_work_for_llama(skip: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = {
        layer: (
            torch.randn((WIDTH, (LAYERS - layer) * WIDTH), generator=generator),
            torch.randn((LAYERS - layer) * WIDTH, generator=generator),
        )
        for layer in range(1, LAYERS)
    }
    heads = FittedHeads({}, maps, width=WIDTH, of_states=True)
    _, _, counts = check_a_mixture(some_layers("llama", skip=skip), half_out(ridge=True), heads)
    assert counts.predicted_rows == [0, 0, 16, 16]
    # A predicted layer input still passes through the projections.
    assert counts.key_value_rows == ([0, 0, 16, 16] if skip else [0] * LAYERS)


# --- Contents of the cache, by the formulas of the papers -------------------------------------


def rotated(keys: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate `[n, heads, head_dim]` keys to their positions (RoFormer, Su et al. 2021, sec. 3.4).

    As in Llama, dimensions i and i + head_dim / 2 form a pair.
    """
    half = keys.shape[-1] // 2
    angles = positions[:, None].double() * base ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    first, second = keys[..., :half], keys[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return states * (states.pow(2).mean(dim=-1, keepdim=True) + epsilon).rsqrt() * weight


@pytest.mark.parametrize("ridge", [False, True], ids=["frozen", "ridge"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
@torch.no_grad()
def test_cache_has_normed_and_rotated_keys_of_exit_states(family: str, ridge: bool) -> None:
    layers, heads, mixture = some_layers(family), some_heads(family), half_out(ridge=ridge)
    mixture.mask = some_mask(2, 16, left=3)
    mixture.exit_layers[mixture.mask == 0] = LAYERS
    config = layers.stack.model.config
    expected = plain(layers.stack, mixture, heads)
    _, cache, _ = run(layers, mixture, expected, heads)
    out = mixture.exit_layers == 2
    states, positions = expected.states[2][out], positions_of(mixture.ids, mixture.mask)[out]
    rotates = {"smollm3": [True, True, True, False]}.get(family, [True] * LAYERS)
    for number in (3, 4):
        layer: Any = layers.stack.layers[number - 1]
        if ridge:
            weight, bias = heads.maps[2]
            size = states.pow(2).mean(dim=-1, keepdim=True).sqrt()
            raw = ((states / size) @ weight + bias).view(len(states), 2, -1)[:, number - 3]
            raw_keys, raw_values = raw.chunk(2, dim=-1)
        else:
            normed = rms(states, layer.input_layernorm.weight, config.rms_norm_eps)
            raw_keys, raw_values = (
                nn.functional.linear(normed, projection.weight, projection.bias)
                for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
            )
        keys = raw_keys.unflatten(-1, (2, 8))
        if family == "qwen3":
            keys = rms(keys, layer.self_attn.k_norm.weight, config.rms_norm_eps)
        if rotates[number - 1]:
            keys = rotated(keys, positions, config.rope_parameters["rope_theta"])
        held_keys, held_values = cache.read(number - 1)
        assert apart(at(held_keys, out), keys) <= CLOSE
        assert apart(at(held_values, out), raw_values.unflatten(-1, (2, 8))) <= CLOSE
        hard = mixture.valid & ~out
        assert apart(at(held_keys, hard), at(expected_keys(expected, number), hard)) <= CLOSE


def expected_keys(expected: ByHand, number: int) -> Tensor:
    layer: Any = expected.cache.layers[number - 1]
    keys: Tensor = layer.keys
    return keys


# --- No work for exited tokens ----------------------------------------------------------------


@SKIPPING_FAMILIES
def test_layer_projects_only_keys_and_values_if_all_tokens_exited(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = some_layers(family)

    def refuse_to_run(*_: Any, **__: Any) -> Any:
        raise AssertionError("this must not run")

    for layer in layers.stack.layers[2:]:
        for name in ("mlp", "self_attn.q_proj", "self_attn.o_proj"):
            monkeypatch.setattr(layer.get_submodule(name), "forward", refuse_to_run)
    mixture, heads = half_out(), some_heads(family)
    mixture.exit_layers[:] = 2
    expected = plain_without(layers.stack, mixture, heads, monkeypatch)
    hidden, _, counts = run(layers, mixture, expected, heads)
    assert apart(hidden, expected.states[2]) <= CLOSE
    assert counts.layer_rows == [32, 32, 0, 0]
    assert counts.key_value_rows == [0, 0, 32, 32]
    assert counts.pairs == [32 * 16, 32 * 16, 0, 0]


def plain_without(
    stack: DecoderStack, mixture: Mixture, heads: FittedHeads, monkeypatch: pytest.MonkeyPatch
) -> ByHand:
    """Return the reference pass in which upper layers do not change the states."""
    with monkeypatch.context() as patch:
        for layer in stack.layers[2:]:
            patch.setattr(layer, "forward", lambda hidden, *_, **__: hidden)
        return plain(stack, mixture, heads)


def test_attention_computes_only_active_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    layers, mixture, heads = some_layers("llama"), half_out(), some_heads("llama")
    handles = [
        layer.get_submodule("self_attn.q_proj").register_forward_hook(
            lambda _, args, __: seen.append(args[0].shape[0] * args[0].shape[1])
        )
        for layer in layers.stack.layers
    ]
    expected = plain(layers.stack, mixture, heads)
    seen.clear()
    run(layers, mixture, expected, heads)
    for handle in handles:
        handle.remove()
    assert seen == [32, 32, 16, 16]
