"""Effects of generation: KV cache, counts, and an unchanged model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.generating import (
    INF,
    MASK,
    NEW,
    PROMPT,
    Recorder,
    generated,
    generator,
    longer,
)
from support.reference_early_exit import (
    ALL_FAMILIES,
    ALL_PROPAGATIONS,
    CLOSE,
    LAYERS,
    SKIPPING,
    a_stack,
    apart,
    by_hand,
    positions_of,
    some_heads,
    state_of,
)
from torch import Tensor
from transformers import DynamicCache

from cascade.decoding.early_exit import EarlyExit, Propagation
from cascade.decoding.kv_cache import KeyValueCache
from cascade.decoding.selective_layers import SkippingLayers
from cascade.models.stack import DecoderStack

# --- KV cache ---------------------------------------------------------------------------------


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[KeyValueCache]:
    """Return a list that collects the caches that generation creates."""
    made: list[KeyValueCache] = []
    new_cache = SkippingLayers.new_cache

    def keeping(self: SkippingLayers, *args: Any, **kwargs: Any) -> KeyValueCache:
        made.append(new_cache(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(SkippingLayers, "new_cache", keeping)
    return made


def valid_states(states: Tensor, valid: Tensor) -> Tensor:
    """Return the valid columns `[n, heads, head_dim]` of a cache's `[B, heads, T, head_dim]`."""
    return states[:, :, : valid.shape[1]].transpose(1, 2)[valid]


@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
@ALL_FAMILIES
def test_cache_of_frozen_and_ridge_generation_matches_reference(
    family: str, propagation: Propagation, caches: list[KeyValueCache]
) -> None:
    early = generator(family, propagation)
    result = generated(early, PROMPT, MASK)
    seen = result.sequences[:, :-1]  # the last token has not been computed yet
    mask = longer(MASK, seen)
    expected = by_hand(
        early.stack, seen, early.exits, mask, propagation=propagation, heads=some_heads(family)
    )
    assert int((expected.exit_layers < LAYERS).sum()) > 20
    for ours, theirs in zip(caches[-1].layers, expected.cache.layers, strict=True):
        for name in ("keys", "values"):
            got, wanted = (
                valid_states(getattr(layer, name), mask.bool()) for layer in (ours, theirs)
            )
            assert apart(got, wanted) <= CLOSE


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@ALL_FAMILIES
def test_cache_of_exact_generation_matches_full_model(
    family: str, verify: bool, caches: list[KeyValueCache]
) -> None:
    early = generator(family, "exact", settled=True)
    result = generated(early, PROMPT, MASK, verify=verify)
    seen, mask = result.sequences[:, :-1], longer(MASK, result.sequences[:, :-1])
    theirs = full_cache(early.stack, seen, mask)
    hard = (result.exit_layers == LAYERS).any(dim=0).nonzero()
    # A token that does not exit completes all earlier columns, and verification completes all.
    least = seen.shape[1] if verify else 9 + int(hard.max()) if len(hard) else 0
    for number, (ours, full) in enumerate(zip(caches[-1].layers, theirs.layers, strict=True), 1):
        states: Any = ours
        keys = states.keys
        written = [] if keys is None else keys.abs().amax(dim=(0, 1, 3)).nonzero()[:, 0].tolist()
        done = max(written, default=-1) + 1
        assert done >= (seen.shape[1] if number == 1 else min(least, seen.shape[1]))
        valid = mask.bool()[:, :done]
        for name in ("keys", "values") if done else ():
            got, wanted = (valid_states(getattr(layer, name), valid) for layer in (ours, full))
            assert apart(got, wanted) <= CLOSE


@torch.no_grad()
def full_cache(stack: DecoderStack, ids: Tensor, mask: Tensor) -> DynamicCache:
    """Return the cache of the model after a single forward pass."""
    cache = DynamicCache()
    model: Any = stack.model
    padded: dict[str, Any] = {"attention_mask": mask}
    if model.config.model_type != "bloom":
        padded["position_ids"] = positions_of(ids, mask)
    model(input_ids=ids, past_key_values=cache, use_cache=True, **padded)
    return cache


# --- Counts -----------------------------------------------------------------------------------


@pytest.fixture
def rows_seen() -> Iterator[Callable[[DecoderStack], dict[str, list[int]]]]:
    """Return a function that counts the token rows that a stack's modules compute, per layer."""
    handles = []

    def watch(stack: DecoderStack) -> dict[str, list[int]]:
        seen = {name: [0] * LAYERS for name in ("mlp", "self_attn.o_proj", "self_attn.k_proj")}
        seen["lm_head"] = [0]

        def counting(name: str, index: int) -> Callable[..., None]:
            def hook(_: Any, args: Any, __: Any) -> None:
                seen[name][index] += args[0].numel() // args[0].shape[-1]

            return hook

        for index, layer in enumerate(stack.layers):
            for name in ("mlp", "self_attn.o_proj", "self_attn.k_proj"):
                hook = counting(name, index)
                handles.append(layer.get_submodule(name).register_forward_hook(hook))
        handles.append(stack.lm_head.register_forward_hook(counting("lm_head", 0)))
        return seen

    yield watch
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@ALL_PROPAGATIONS
@pytest.mark.parametrize("family", SKIPPING)
def test_counts_of_generation_match_rows_of_modules(
    family: str,
    propagation: Propagation,
    verify: bool,
    rows_seen: Callable[[DecoderStack], dict[str, list[int]]],
) -> None:
    if verify and propagation != "exact":
        return
    early = generator(family, propagation)
    seen = rows_seen(early.stack)
    result = generated(early, PROMPT, verify=verify)
    counts = result.counts
    assert seen["mlp"] == seen["self_attn.o_proj"] == counts.layer_rows
    projected = [a + b for a, b in zip(counts.layer_rows, counts.key_value_rows, strict=True)]
    assert seen["self_attn.k_proj"] == projected
    assert seen["lm_head"] == [counts.lm_head_rows]
    assert result.layers_per_token == sum(counts.layer_rows) / result.passed
    if verify:
        return
    assert result.passed == counts.layer_rows[0] == 3 * (9 + NEW - 1)
    if propagation != "exact":
        exit_layers = early.score(result.sequences[:, :-1]).exit_layers
        above = [int((exit_layers >= layer).sum()) for layer in range(1, LAYERS + 1)]
        assert counts.layer_rows == above
        assert result.layers_per_token == pytest.approx(exit_layers.double().mean().item())


def test_exact_generation_defers_upper_layers_until_needed() -> None:
    stack = a_stack("llama")
    early = EarlyExit(stack, layer=2, rule="cosine", threshold=-INF, propagation="exact")
    counts = generated(early, PROMPT).counts
    assert counts.layer_rows == [3 * 18, 3 * 18, 0, 0]
    full = EarlyExit(stack, propagation="exact")
    assert generated(full, PROMPT).counts.layer_rows == [3 * 18] * 4


# --- Side effects -----------------------------------------------------------------------------


def raise_it(*_: Any, **__: Any) -> Any:
    raise ArithmeticError("planted")


class Raising(Recorder):
    def put(self, value: Tensor) -> None:
        super().put(value)
        if len(self.given) == 4:
            raise_it()


@pytest.mark.parametrize("place", ["layer", "projection", "lm_head", "streamer"])
@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@ALL_PROPAGATIONS
def test_generation_restores_model_after_exception(
    propagation: Propagation, verify: bool, place: str
) -> None:
    if verify and propagation != "exact":
        return
    early = generator("llama", propagation)
    before = state_of(early.stack)
    expected = generated(early, PROMPT[:1], verify=verify)
    assert state_of(early.stack) == before
    if place == "streamer":
        with pytest.raises(ArithmeticError, match="planted"):
            generated(early, PROMPT[:1], verify=verify, streamer=Raising())
    else:
        modules = {
            "layer": early.stack.layers[3],
            "projection": early.stack.layers[3].get_submodule("self_attn.o_proj"),
            "lm_head": early.stack.lm_head,
        }
        handle = modules[place].register_forward_pre_hook(raise_it)
        try:
            with pytest.raises(ArithmeticError, match="planted"):
                generated(early, PROMPT[:1], verify=verify)
        finally:
            handle.remove()
    assert state_of(early.stack) == before
    assert torch.equal(generated(early, PROMPT[:1], verify=verify).sequences, expected.sequences)


def test_generation_has_no_gradient_and_shares_no_memory() -> None:
    early, ids = generator("llama"), PROMPT.clone()
    result = generated(early, ids)
    assert not result.sequences.requires_grad
    result.sequences.zero_()
    assert torch.equal(ids, PROMPT)
