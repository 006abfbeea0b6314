"""Layers computed for some of the tokens leave the states, keys and values of computing all."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference_early_exit import (
    ALL_FAMILIES,
    CLOSE,
    LAYERS,
    SKIPPING,
    SKIPPING_FAMILIES,
    ByHand,
    a_stack,
    apart,
    by_hand,
    climb,
    difference,
    map_by_hand,
    own_logits,
    positions_of,
    some_exits,
    some_heads,
    some_mask,
    state_of,
)
from support.tiny_models import WIDTH, random_ids, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache

from cascade.decoding.early_exit import EarlyExit, Propagation
from cascade.decoding.kv_cache import KeyValueCache, Selection
from cascade.decoding.selective_layers import LayerTask, SkippingLayers
from cascade.exits.fitted_heads import FittedHeads
from cascade.models.fast_layers import FastLayers
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack, LayerCall

#: Longer than the sliding windows of 8, and than a mask that is only causal would forgive.
LONGEST = 18


@functools.cache
def some_layers(family: str, *, skip: bool = True) -> SkippingLayers:
    return SkippingLayers(a_stack(family), skip=skip)


def masks(least: int = 1) -> st.SearchStrategy[Tensor]:
    """Return active tokens `[B, T]`, `least` or more."""
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 7))
    return shapes.flatmap(
        lambda shape: st.lists(
            st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        ).map(torch.tensor)
    ).filter(lambda active: int(active.sum()) >= least)


# --- Selections and counts -------------------------------------------------------------------


@given(masks())
def test_packed_rows_find_their_sequence_and_their_way_back(active: Tensor) -> None:
    selection = Selection(active, torch.zeros_like(active))
    sequences, packed, place = selection.groups
    assert sequences.tolist() == [row for row, some in enumerate(active.any(dim=1)) if some]
    assert torch.equal(packed.flatten()[place], torch.arange(int(active.sum())))
    assert packed.shape[1] == int(active.sum(dim=1).max())
    # Every place of a group holds a token of the group's own sequence, also where it repeats one.
    assert torch.equal(selection.rows[packed], sequences[:, None].expand_as(packed))
    assert torch.equal(active.nonzero(), torch.stack([selection.rows, selection.columns], dim=1))


@given(masks(least=0), st.booleans())
def test_a_selection_is_dense_where_packing_would_gain_nothing(active: Tensor, left: bool) -> None:
    exited = ~active if left else torch.zeros_like(active)
    padded_prompt = not bool(exited.any()) and bool(active.any()) and active.shape[1] > 1
    assert Selection(active, exited).dense == (bool(active.all()) or padded_prompt)


def some_counts(start: int) -> Counts:
    a, b, c, d = (list(range(start + part, start + part + LAYERS)) for part in range(4))
    return Counts(a, b, c, d, lm_head_rows=start, head_rows={start: 5, 2: 7})


def test_counts_add_up_layer_by_layer() -> None:
    total = some_counts(0) + some_counts(10)
    assert total == Counts(
        layer_rows=[10, 12, 14, 16],
        pairs=[12, 14, 16, 18],
        key_value_rows=[14, 16, 18, 20],
        predicted_rows=[16, 18, 20, 22],
        lm_head_rows=10,
        head_rows={0: 5, 2: 14, 10: 5},
    )
    assert total + Counts.of(LAYERS) == total


def test_a_record_of_counts_is_a_copy_that_json_can_hold() -> None:
    counts = Counts.of(2)
    counts.head_rows[1] = 3
    record = counts.record()
    assert record == {
        "layer_rows": [0, 0],
        "pairs": [0, 0],
        "key_value_rows": [0, 0],
        "predicted_rows": [0, 0],
        "lm_head_rows": 0,
        "head_rows": {"1": 3},
    }
    record["pairs"][0] = 9
    assert counts.pairs == [0, 0]


def test_counts_of_nothing_share_no_list() -> None:
    counts = Counts.of(2)
    counts.layer_rows[0] += 1
    assert counts.pairs == counts.key_value_rows == counts.predicted_rows == [0, 0]


# --- The cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["without_mask", "left_padded"])
@ALL_FAMILIES
def test_a_cache_filled_in_chunks_is_what_transformers_would_hold(
    family: str, padded: bool
) -> None:
    stack, ids = a_stack(family), random_ids(2, 20)
    mask = some_mask(2, 20) if padded else None
    theirs = DynamicCache()
    plan = planned(stack, ids, mask, theirs)
    expected = stepped(stack, plan.embedded, plan.calls)
    ours = KeyValueCache(LAYERS, 2, 23)
    outputs = []
    for start, stop in ((0, 11), (11, 14), (14, 15), (15, 20)):
        ours.window(start, stop)
        assert ours.get_seq_length() == ours.get_query_offset() == start
        assert ours.get_mask_sizes(stop - start, 0) == (stop, 0)
        part = planned(stack, ids, mask, ours, start, stop)
        outputs.append(stepped(stack, part.embedded, part.calls))
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert apart(torch.cat(outputs, dim=1)[valid], expected[valid]) <= CLOSE
    for index in range(LAYERS):
        keys, values = ours.read(index)
        layer: Any = theirs.layers[index]
        assert apart(at(keys, valid), at(layer.keys, valid)) <= CLOSE
        assert apart(at(values, valid), at(layer.values, valid)) <= CLOSE


def planned(
    stack: DecoderStack,
    ids: Tensor,
    mask: Tensor | None,
    cache: Any,
    start: int = 0,
    stop: int | None = None,
) -> Any:
    positions = None if mask is None else positions_of(ids, mask)[:, start:stop]
    seen = None if mask is None else mask[:, :stop]
    return stack.plan(ids[:, start:stop], attention_mask=seen, position_ids=positions, cache=cache)


def stepped(stack: DecoderStack, hidden: Tensor, calls: tuple[LayerCall, ...]) -> Tensor:
    for layer, call in enumerate(calls, start=1):
        hidden = stack.step(layer, hidden, call)
    return hidden


def at(states: Tensor, valid: Tensor) -> Tensor:
    """Return `[n, heads, head_dim]` of a cache's `[B, heads, T, head_dim]`."""
    return states.transpose(1, 2)[valid]


def test_a_cache_writes_single_tokens_where_they_belong() -> None:
    cache = KeyValueCache(1, 2, 5)
    cache.window(2, 4)
    rows, columns = torch.tensor([0, 1]), torch.tensor([1, 0])
    keys, values = torch.rand(3, 2, 4), torch.rand(3, 2, 4)
    got = cache.put(0, rows, columns, keys, values)
    for states, put in zip(got, (keys, values), strict=True):
        assert states.shape == (2, 3, 4, 4)
        assert torch.equal(states[0, :, 3], put[:, 0])
        assert torch.equal(states[1, :, 2], put[:, 1])
        assert int((states != 0).sum()) == 2 * 3 * 4


def test_packed_updates_go_to_the_active_tokens_and_only_inside_the_block() -> None:
    cache = KeyValueCache(1, 2, 3)
    cache.window(0, 3)
    active = torch.tensor([[True, False, True], [False, True, False]])
    states = torch.arange(1.0, 4.0)[None, None, :, None].expand(1, 1, 3, 2)
    with cache.packed(Selection(active, ~active)):
        keys, _ = cache.update(states, states, 0)
    assert keys[:, 0, :, 0].tolist() == [[1, 0, 2], [0, 3, 0]]
    with pytest.raises(ArithmeticError):
        break_off(cache.packed(Selection(active, ~active)))
    whole = torch.ones(2, 1, 3, 2)
    keys, values = cache.update(whole, whole, 0)
    assert bool((keys == 1).all() & (values == 1).all())


def break_off(block: AbstractContextManager[None]) -> None:
    with block:
        raise ArithmeticError


def test_a_cache_that_keeps_nothing_takes_layers_of_any_shape() -> None:
    cache = KeyValueCache(3, 1, 2, keep=False)
    cache.window(0, 2)
    row, column = torch.tensor([0]), torch.tensor([1])
    for index, (heads, width) in enumerate(((2, 4), (2, 8), (1, 8))):
        keys = torch.full((heads, 1, width), index + 1.0)
        got, _ = cache.put(index, row, column, keys, keys)
        assert got.shape == (1, heads, 2, width)
        assert bool((got[:, :, 1] == index + 1).all())


# --- A mixture of exits, layer by layer ------------------------------------------------------


@dataclass
class Mixture:
    """Which tokens leave where, and in which chunks they come.

    Attributes:
        ids: `[B, T]`.
        mask: `[B, T]`, or None where nothing is padded.
        exit_layers: `[B, T]`, N for tokens that stay.
        cuts: Where chunks end, ascending, T last.
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
    """Return the mixture's pass by hand."""
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
    """Return what the maps say of every token that left below a layer, `[B, T, width]`."""
    table = torch.zeros((*mixture.ids.shape, heads.width))
    for below in range(1, layer):
        said = map_by_hand(heads, below, expected.states[below])[:, :, layer - below - 1]
        table = torch.where((mixture.exit_layers == below)[..., None], said, table)
    return table


def check_a_mixture(
    layers: SkippingLayers, mixture: Mixture, heads: FittedHeads
) -> tuple[Tensor, KeyValueCache, Counts]:
    """Raise AssertionError unless states and cache are those of the mixed pass by hand."""
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
def test_any_mixture_of_exits_leaves_the_states_and_the_cache_that_it_should(
    family: str, mixture: Mixture
) -> None:
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
def test_the_generic_path_leaves_the_same(family: str, mixture: Mixture) -> None:
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
def test_eager_attention_leaves_the_same(family: str, mixture: Mixture) -> None:
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
def test_layers_that_slide_beside_layers_that_do_not_leave_the_same(
    family: str, mixture: Mixture
) -> None:
    check_a_mixture(alternating_layers(family), mixture, some_heads(family))


#: Exit layers of two rows of which nobody leaves.
NOBODY = torch.full((2, 16), LAYERS)


def half_out(length: int = 16, *, ridge: bool = False) -> Mixture:
    """Return a mixture in which every other token of two rows leaves at layer 2."""
    ids = random_ids(2, length)
    exit_layers = torch.full_like(ids, LAYERS)
    exit_layers[:, ::2] = 2
    return Mixture(ids, None, exit_layers, [length], ridge)


@SKIPPING_FAMILIES
def test_the_window_of_a_sliding_family_is_kept_and_would_show(family: str) -> None:
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
        # Eight bits, four layers: the roundings of two orders of summation.
        assert difference(got, wanted) <= 0.05 * wanted.abs().max().item()


@pytest.mark.parametrize("skip", [True, False], ids=["packed", "generic"])
def test_a_cache_that_keeps_nothing_serves_a_single_chunk_alike(skip: bool) -> None:
    layers, mixture, heads = some_layers("qwen3", skip=skip), half_out(), some_heads("qwen3")
    expected = plain(layers.stack, mixture, heads)
    new_cache = functools.partial(KeyValueCache, LAYERS, keep=False)
    keeping, _, _ = run(layers, mixture, expected, heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "new_cache", new_cache)
        forgetting, _, _ = run(layers, mixture, expected, heads)
    assert torch.equal(keeping, forgetting)


@pytest.mark.parametrize("skip", [True, False], ids=["packed", "generic"])
def test_maps_that_predict_layer_inputs_serve_llamas_too(skip: bool) -> None:
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
    # A predicted input still goes through the projections.
    assert counts.key_value_rows == ([0, 0, 16, 16] if skip else [0] * LAYERS)


# --- What the cache holds, from the paper's formulas -----------------------------------------


def rotated(keys: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate `[n, heads, head_dim]` keys to their positions (RoFormer, Su et al. 2021, sec. 3.4).

    Pairs are dimension i and i + head_dim / 2, as Llama has them.
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
def test_the_cache_holds_the_exit_states_keys_and_values_normed_and_rotated(
    family: str, ridge: bool
) -> None:
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


# --- Nothing is computed for tokens that left ------------------------------------------------


@SKIPPING_FAMILIES
def test_where_every_token_left_a_layer_only_projects_keys_and_values(
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
    """Return the pass by hand, its upper layers standing still."""
    with monkeypatch.context() as patch:
        for layer in stack.layers[2:]:
            patch.setattr(layer, "forward", lambda hidden, *_, **__: hidden)
        return plain(stack, mixture, heads)


def test_attention_sees_the_active_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
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


# --- The lean way for few tokens -------------------------------------------------------------


@pytest.fixture
def hooked() -> Iterator[Callable[[nn.Module, Any], None]]:
    """Return a function that hooks a module's output for one test."""
    handles = []
    yield lambda module, hook: handles.append(module.register_forward_hook(hook))
    for handle in handles:
        handle.remove()


def own_stack(family: str) -> DecoderStack:
    """Return a stack that no other test has hooked: what is hooked is not taken apart."""
    return DecoderStack(tiny_model(family))


#: Families whose layers are Llama's and nothing else, with attention that can take the lean way.
LEAN = ("llama", "qwen2", "qwen3", "mistral", "smollm3")


def own_difference(layers: SkippingLayers, ids: Tensor) -> float:
    """Return how far all layers, run token by token, are from the model's own logits."""
    stack, cache = layers.stack, layers.new_cache(*ids.shape)
    outputs = []
    for start in range(ids.shape[1]):
        cache.window(start, start + 1)
        plan = stack.plan(ids[:, start : start + 1], cache=cache)
        hidden = plan.embedded
        everything = torch.ones(len(ids), 1).bool()
        for layer, call in enumerate(plan.calls, start=1):
            selection = Selection(everything, ~everything)
            task = LayerTask(layer, hidden, selection, call, cache, Counts.of(LAYERS))
            hidden = layers.run(task)
        outputs.append(hidden)
    return difference(stack.decode(torch.cat(outputs, dim=1)), own_logits(stack, ids))


@SKIPPING_FAMILIES
def test_only_layers_that_are_llamas_take_the_lean_way(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = FastLayers.compute

    def counting(self: FastLayers, layer: int, *args: Any) -> Tensor:
        steps.append(layer)
        return step(self, layer, *args)

    monkeypatch.setattr(FastLayers, "compute", counting)
    layers = SkippingLayers(own_stack(family))
    steps.clear()
    assert own_difference(layers, random_ids(2, 6)) <= CLOSE
    assert steps == (6 * [1, 2, 3, 4] if family in LEAN else [])


@pytest.mark.parametrize("family", LEAN)
def test_a_planted_bug_in_the_lean_way_is_caught(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = FastLayers.compute

    def wrong(self: FastLayers, layer: int, *args: Any) -> Tensor:
        assert layer <= 3
        return step(self, layer, *args) * (1.01 if layer == 3 else 1)

    monkeypatch.setattr(FastLayers, "compute", wrong)
    layers = SkippingLayers(own_stack(family))
    assert layers.skips
    assert own_difference(layers, random_ids(2, 6)) <= CLOSE


PARTS = [name for name, _ in own_stack("qwen3").layers[0].named_modules()]


def louder(output: Any) -> Any:
    """Change a module's output, also where a norm follows."""
    hidden = output[0] if isinstance(output, tuple) else output
    made = 1.5 * hidden + 0.1
    return (made, *output[1:]) if isinstance(output, tuple) else made


@pytest.mark.parametrize("part", PARTS, ids=[part or "layer" for part in PARTS])
def test_a_hook_set_later_is_heard_by_the_lean_way_too(
    part: str, hooked: Callable[[nn.Module, Any], None]
) -> None:
    layers, ids = SkippingLayers(own_stack("qwen3")), random_ids(2, 6)
    before = own_logits(layers.stack, ids)
    hooked(layers.stack.layers[1].get_submodule(part), lambda _, __, output: louder(output))
    assert difference(own_logits(layers.stack, ids), before) > 1e-3
    assert own_difference(layers, ids) <= CLOSE


@pytest.mark.parametrize("part", PARTS, ids=[part or "layer" for part in PARTS])
def test_a_forward_replaced_later_is_called_by_the_lean_way_too(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, ids = SkippingLayers(own_stack("qwen3")), random_ids(2, 6)
    before = own_logits(layers.stack, ids)
    module = layers.stack.layers[1].get_submodule(part)
    forward = module.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return louder(forward(*args, **kwargs))

    monkeypatch.setitem(vars(module), "forward", replaced)
    assert difference(own_logits(layers.stack, ids), before) > 1e-3
    assert own_difference(layers, ids) <= CLOSE


# --- The try-out -----------------------------------------------------------------------------


def check_it_falls_back(stack: DecoderStack, reason: str) -> None:
    """Raise AssertionError unless layers are not skipped, for this reason, and exits still work."""
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


DIFFERS = "layer {} computed for some of the tokens differs from the whole one"


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
def test_a_planted_bug_is_caught_by_the_try_out(
    family: str,
    method: str,
    plant: Callable[[type[SkippingLayers]], Callable[..., Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SkippingLayers, method, plant(SkippingLayers))
    check_it_falls_back(a_stack(family), DIFFERS.format(1))


class NormsByAnotherName(nn.Module):
    """Attention whose keys are normed by a module that nobody would look for."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.real, self.key_norm = attention, attention.k_norm
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.head_dim, self.config = attention.head_dim, attention.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.real(*args, **kwargs)


def test_a_norm_of_keys_that_is_not_found_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    module = sys.modules[type(model).__module__]
    for name in ("apply_rotary_pos_emb", "eager_attention_forward"):
        monkeypatch.setattr(sys.modules[__name__], name, getattr(module, name), raising=False)
    for layer in model.model.layers:
        layer.self_attn = NormsByAnotherName(layer.self_attn)
    check_it_falls_back(DecoderStack(model), DIFFERS.format(1))


def test_a_layer_that_looks_at_its_neighbours_is_caught_by_number(
    hooked: Callable[[nn.Module, Any], None],
) -> None:
    def add_what_came_before(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 0.5 * nn.functional.pad(output[:, :-1], (0, 0, 1, 0))

    hooked(a_stack("llama").layers[2].get_submodule("mlp"), add_what_came_before)
    check_it_falls_back(a_stack("llama"), DIFFERS.format(3))


def test_a_layer_that_cannot_take_packed_rows_at_all_is_caught(
    hooked: Callable[[nn.Module, Any], None],
) -> None:
    def insist(_: nn.Module, args: Any, output: Tensor) -> None:
        if output.shape[:2] not in ((2, 3), (2, 4), (2, 16)):
            raise RuntimeError(f"expected two rows\nnot {output.shape[0]}")

    hooked(a_stack("llama").layers[1].get_submodule("mlp"), insist)
    reason = "its layers cannot be run for some of the tokens (expected two rows)"
    check_it_falls_back(a_stack("llama"), reason)


def test_attention_that_takes_no_mask_per_query_is_not_packed(
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
def test_the_try_out_leaves_the_model_as_it_was(family: str) -> None:
    stack = a_stack(family)
    before = state_of(stack)
    assert SkippingLayers(stack).skips
    assert state_of(stack) == before
