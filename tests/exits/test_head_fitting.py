"""Heads and maps are fitted in closed form, and say where they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.head_probes import TEXT, interrupt, is_projected, relative, truth
from support.reference_early_exit import (
    LAYERS,
    a_stack,
    difference,
    one_line,
    random_blocks,
    some_heads,
    state_of,
    visited,
)
from support.textbook_ridge import textbook_ridge
from support.tiny_models import VOCABULARY, WIDTH, tiny_model
from torch import Tensor, nn

from cascade.core.errors import CorpusError, ModelError, UsageError
from cascade.core.provenance import provenance_of
from cascade.core.schema import known, to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.exits.fitted_heads import CHECKED, FittedHeads
from cascade.exits.head_fitting import fit_heads, rows_of
from cascade.models.stack import DecoderStack
from cascade.stats import ridge
from cascade.stats.ridge import STRENGTHS, NormalEquations


def strengths_of(heads: FittedHeads) -> dict[str, list[float]]:
    found = known(heads.provenance.strengths)
    assert found is not None
    return found


def rows_by_hand(
    stack: DecoderStack, blocks: TokenBlocks, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a fit sees: normalized states, targets, and which rows are kept aside."""
    ids = torch.from_numpy(blocks.ids).long()
    history, final, raw = truth(stack, ids)
    size = history[layer].square().mean(dim=-1, keepdim=True).sqrt()
    if is_projected(stack):
        upper = [part for pair in raw[layer:] for part in pair]
    else:
        upper = [entry / size for entry in history[layer:LAYERS]]
    kept_aside = torch.arange(len(ids)).repeat_interleave(ids.shape[1]) % 10 == 9
    return history[layer] / size, torch.cat([final, *upper], dim=1), kept_aside


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "bloom", "cohere"])
def test_fits_are_the_textbooks_ridge_at_the_strength_they_name(family: str) -> None:
    stack, blocks, heads = a_stack(family), random_blocks(), some_heads(family)
    for layer in (1, 3):
        x, y, _ = rows_by_hand(stack, blocks, layer)
        strengths = strengths_of(heads)[str(layer)]
        assert len(strengths) == 1 + LAYERS - layer
        weights = torch.cat([heads.weights[layer][0], heads.maps[layer][0]], dim=1)
        biases = torch.cat([heads.weights[layer][1], heads.maps[layer][1]])
        groups = [WIDTH] + [heads.width] * (LAYERS - layer)
        parts = zip(
            strengths,
            y.split(groups, 1),
            weights.split(groups, 1),
            biases.split(groups),
            strict=True,
        )
        for strength, target, weight, bias in parts:
            expected = textbook_ridge(x, target, strength)
            # fp32 products of 640 tokens, and the sums' condition: 1e-3 of the outputs' size.
            assert relative(x @ weight + bias, x @ expected[0] + expected[1]) < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_sequence_in_ten_is_kept_aside_to_choose_the_strength(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[NormalEquations, NormalEquations]] = []
    fit = ridge.fit

    def keeping(train: NormalEquations, check: NormalEquations, groups: Any) -> Any:
        seen.append((train, check))
        return fit(train, check, groups)

    monkeypatch.setattr("cascade.exits.head_fitting.fit", keeping)
    stack, blocks = a_stack(family), random_blocks(25)
    fit_heads(stack, blocks, [2], batch_size=7)
    x, y, kept_aside = rows_by_hand(stack, blocks, 2)
    assert CHECKED == 9
    assert kept_aside.sum() == 2 * 16  # sequences 9 and 19
    for equations, rows in zip(seen[0], (~kept_aside, kept_aside), strict=True):
        assert equations.count == rows.sum()
        expected = x[rows].double().T @ y[rows].double()
        # 1e-5: products in fp32, of states that a batch of another size rounds otherwise.
        assert (equations.xy[:-1] - expected).abs().max() < 1e-5 * expected.abs().max()
        assert equations.xx[-1, -1] == rows.sum()


def test_the_strengths_are_those_that_do_best_on_the_sequences_kept_aside() -> None:
    stack, blocks, heads = a_stack("llama"), random_blocks(), some_heads("llama")
    for layer in (1, 2):
        x, y, aside = rows_by_hand(stack, blocks, layer)
        errors: list[Tensor] = []
        for strength in STRENGTHS:
            weight, bias = textbook_ridge(x[~aside], y[~aside], strength)
            errors.append((x[aside] @ weight + bias - y[aside]).square().mean(dim=0))
        groups = [WIDTH] + [heads.width] * (LAYERS - layer)
        by_group = [part.mean(dim=1) for part in torch.stack(errors).split(groups, dim=1)]
        for error, strength in zip(by_group, strengths_of(heads)[str(layer)], strict=True):
            # Neighbours can be as good to fp32's last digits.
            assert error[STRENGTHS.index(strength)] <= error.min() * 1.001


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 7, 40, 1000])
def test_batches_of_any_size_fit_the_same(family: str, batch_size: int) -> None:
    stack, expected = a_stack(family), some_heads(family)
    heads = fit_heads(stack, random_blocks(), range(1, LAYERS + 1), batch_size=batch_size)
    assert strengths_of(heads).keys() == strengths_of(expected).keys()
    history = [entry.flatten(0, 1) for entry in visited(stack, TEXT)]
    for layer in range(1, LAYERS):
        # Batches differ in the last digits of fp32 (1e-7), which the least penalty (1e-6) can
        # magnify to some 1e-3 in directions that hardly occur, and where two strengths do as well
        # as each other even choose the other one.
        one, other = (fitted.head(stack, layer) for fitted in (heads, expected))
        assert relative(one.normed(history[layer]), other.normed(history[layer])) < 1e-2
        a, b = (fitted.propagation(stack, layer) for fitted in (heads, expected))
        assert a is not None
        assert b is not None
        assert relative(a.predict(history[layer]), b.predict(history[layer])) < 1e-2


def test_exit_layers_are_fitted_independently_and_in_any_order() -> None:
    stack, blocks = a_stack("llama"), random_blocks()
    together = fit_heads(stack, blocks, [4, 1, 3])
    assert together.layers == [1, 3, 4]
    for layer in (1, 3, 4):
        alone = fit_heads(stack, blocks, [layer])
        for kind in ("weights", "maps"):
            one, other = getattr(together, kind).get(layer), getattr(alone, kind).get(layer)
            assert (one is None) == (other is None) == (kind == "maps" and layer == LAYERS)
            assert one is None or all(map(torch.equal, one, other))


def test_a_model_without_a_final_norm_is_fitted_to_its_last_entry() -> None:
    stack = DecoderStack(tiny_model("opt", do_layer_norm_before=False))
    assert not stack.has_final_norm
    states, final = rows_of(stack, TEXT.int().numpy(), [2])
    history = visited(stack, TEXT)
    assert difference(final, history[LAYERS].flatten(0, 1)) == 0.0
    assert difference(states[2], history[2].flatten(0, 1)) == 0.0
    assert set(states) == {2, LAYERS}
    assert fit_heads(stack, random_blocks(), [2]).layers == [2]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_are_the_exit_states_and_the_normed_ones(family: str) -> None:
    stack = a_stack(family)
    states, final = rows_of(stack, TEXT.int().numpy(), [1, 3])
    history, expected, _ = truth(stack, TEXT)
    assert difference(final, expected) == 0.0
    assert difference(states[1], history[1]) == 0.0
    assert difference(states[3], history[3]) == 0.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fitting_leaves_the_model_as_it_was_and_reports_every_token(family: str) -> None:
    stack, blocks = a_stack(family), random_blocks(21)
    before = state_of(stack)
    told: list[int] = []
    heads = fit_heads(stack, blocks, [1, 3], batch_size=4, progress=told.append)
    assert state_of(stack) == before
    assert sum(told) == blocks.tokens == 21 * 16
    assert len(told) == 6
    assert not any(part.requires_grad for pair in heads.weights.values() for part in pair)
    with pytest.raises(KeyboardInterrupt):
        fit_heads(stack, blocks, [1], progress=interrupt)
    assert state_of(stack) == before


def test_fits_have_a_provenance() -> None:
    stack, blocks = a_stack("llama"), random_blocks(21)
    heads = fit_heads(stack, blocks, [4])
    model = to_plain(stack.provenance) | {"weights_hash": stack.weights_hash()}
    expected = {
        "strengths": strengths_of(heads),
        "model": model,
        "corpus": to_plain(blocks.provenance()),
    }
    assert to_plain(heads.provenance) == expected
    assert set(strengths_of(heads)) == {"4"}
    origin = provenance_of(stack, blocks, "cascade fit-heads")
    heads = fit_heads(stack, blocks, [4], provenance=origin)
    assert to_plain(heads.provenance) == expected | to_plain(origin) | {"model": model}
    assert list(to_plain(heads.provenance))[:3] == ["strengths", "model", "corpus"]


def test_fewer_tokens_than_the_states_are_wide_still_fit() -> None:
    ids = np.full((3, 5), 7, dtype=np.int32)
    heads = fit_heads(a_stack("gpt2"), TokenBlocks(ids, "same", "same", 1), [1, 2, 3, 4])
    for pair in (*heads.weights.values(), *heads.maps.values()):
        assert all(bool(part.isfinite().all()) for part in pair)


@pytest.mark.parametrize("layers", [[0], [5], [-1], [2, 5], [True], ["2"], [2.0]])
def test_a_layer_that_is_not_there_is_refused_with_the_range(layers: Any) -> None:
    with pytest.raises(UsageError) as error:
        fit_heads(a_stack("llama"), random_blocks(), layers)
    assert one_line(error) == f"expected an exit layer in 1..4, got {layers[-1]!r}"


def test_layers_may_be_whole_numbers_of_numpy() -> None:
    heads = fit_heads(a_stack("llama"), random_blocks(), list(np.arange(2, 4)))
    assert [(type(layer), layer) for layer in heads.layers] == [(int, 2), (int, 3)]


@pytest.mark.parametrize("layers", [[], [2, 2], [1, 3, 1]])
def test_layers_that_come_twice_or_not_at_all_are_refused(layers: list[int]) -> None:
    with pytest.raises(UsageError) as error:
        fit_heads(a_stack("llama"), random_blocks(), layers)
    assert one_line(error) == f"expected distinct exit layers, got {layers}"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_corpus_that_the_model_cannot_read_is_refused(family: str) -> None:
    stack = a_stack(family)
    long = TokenBlocks(np.full((2, 65), 5, dtype=np.int32), "long", "long", 2)
    with pytest.raises(CorpusError) as error:
        fit_heads(stack, long, [2])
    assert one_line(error).startswith("sequences of 65 tokens exceed the model's 64 positions")
    foreign = TokenBlocks(np.full((2, 8), VOCABULARY, dtype=np.int32), "other", "other", 2)
    with pytest.raises(ModelError, match="the tokenizer gave token id 97"):
        fit_heads(stack, foreign, [2])
    with pytest.raises(CorpusError, match="expected --batch-size of at least 1, got 0"):
        fit_heads(stack, random_blocks(), [2], batch_size=0)


@pytest.fixture
def spoiled() -> Iterator[Callable[[int, float], DecoderStack]]:
    """Return a stack one layer of which gives a number that is none, for one test."""
    handles = []

    def spoil(layer: int, value: float) -> DecoderStack:
        stack = a_stack("llama")

        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[0, 3, 5] = value
            return changed

        handles.append(stack.layers[layer - 1].register_forward_hook(hook))
        return stack

    yield spoil
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_states_that_are_not_finite_are_refused_with_their_layer(
    spoiled: Callable[[int, float], DecoderStack], layer: int, value: float
) -> None:
    with pytest.raises(ModelError) as error:
        fit_heads(spoiled(layer, value), random_blocks(), [1, 3])
    assert one_line(error) == (
        f"layer {layer} gives NaN or infinite hidden states; use a wider --dtype, or get the "
        "checkpoint again"
    )


def test_targets_that_are_not_finite_are_refused_with_the_exit_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = NormalEquations.update
    calls: list[int] = []

    def overflowing(self: NormalEquations, x: Tensor, *y: Tensor) -> None:
        calls.append(1)
        original(self, x, *(part * math.inf for part in y))

    monkeypatch.setattr(NormalEquations, "update", overflowing)
    with pytest.raises(ModelError) as error:
        fit_heads(a_stack("llama"), random_blocks(), [2, 3])
    assert calls == [1]
    assert one_line(error) == (
        "exit layer 2: expected finite states, got NaN or infinite ones; use a wider --dtype"
    )
