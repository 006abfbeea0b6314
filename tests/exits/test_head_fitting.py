"""Exit heads and propagation maps are fitted in closed form and record their provenance."""

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
from cascade.exits.fitted_heads import HELD_OUT, FittedHeads
from cascade.exits.head_fitting import fit_heads, rows_of
from cascade.models.stack import DecoderStack
from cascade.stats import ridge
from cascade.stats.ridge import STRENGTHS, NormalEquations


def strengths_of(heads: FittedHeads) -> dict[str, list[float]]:
    found = known(heads.provenance.strengths)
    assert found is not None
    return found


def reference_rows(
    stack: DecoderStack, blocks: TokenBlocks, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the data of a fit: normalized states, targets, and which rows are held out."""
    ids = torch.from_numpy(blocks.ids).long()
    history, final, raw = truth(stack, ids)
    size = history[layer].square().mean(dim=-1, keepdim=True).sqrt()
    if is_projected(stack):
        upper = [output for pair in raw[layer:] for output in pair]
    else:
        upper = [entry / size for entry in history[layer:LAYERS]]
    held_out = torch.arange(len(ids)).repeat_interleave(ids.shape[1]) % 10 == 9
    return history[layer] / size, torch.cat([final, *upper], dim=1), held_out


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "bloom", "cohere"])
def test_fit_matches_textbook_ridge_at_recorded_strength(family: str) -> None:
    stack, blocks, heads = a_stack(family), random_blocks(), some_heads(family)
    for layer in (1, 3):
        x, y, _ = reference_rows(stack, blocks, layer)
        strengths = strengths_of(heads)[str(layer)]
        assert len(strengths) == 1 + LAYERS - layer
        weights = torch.cat([heads.weights[layer][0], heads.maps[layer][0]], dim=1)
        biases = torch.cat([heads.weights[layer][1], heads.maps[layer][1]])
        groups = [WIDTH] + [heads.width] * (LAYERS - layer)
        fits = zip(
            strengths,
            y.split(groups, 1),
            weights.split(groups, 1),
            biases.split(groups),
            strict=True,
        )
        for strength, target, weight, bias in fits:
            expected = textbook_ridge(x, target, strength)
            # 1e-3 relative: fp32 products of 640 tokens, and the condition of the normal equations.
            assert relative(x @ weight + bias, x @ expected[0] + expected[1]) < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_sequence_in_ten_is_held_out(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[NormalEquations, NormalEquations]] = []
    fit = ridge.fit

    def recording_fit(train: NormalEquations, held_out: NormalEquations, groups: Any) -> Any:
        seen.append((train, held_out))
        return fit(train, held_out, groups)

    monkeypatch.setattr("cascade.exits.head_sums.fit", recording_fit)
    stack, blocks = a_stack(family), random_blocks(25)
    fit_heads(stack, blocks, [2], batch_size=7)
    x, y, held_out = reference_rows(stack, blocks, 2)
    assert HELD_OUT == 9
    assert held_out.sum() == 2 * 16  # sequences 9 and 19
    for equations, rows in zip(seen[0], (~held_out, held_out), strict=True):
        assert equations.count == rows.sum()
        expected = x[rows].double().T @ y[rows].double()
        # 1e-5: fp32 products of states that are rounded differently in batches of another size.
        assert (equations.xy[:-1] - expected).abs().max() < 1e-5 * expected.abs().max()
        assert equations.xx[-1, -1] == rows.sum()


def test_strengths_minimize_error_on_held_out_sequences() -> None:
    stack, blocks, heads = a_stack("llama"), random_blocks(), some_heads("llama")
    for layer in (1, 2):
        x, y, held_out = reference_rows(stack, blocks, layer)
        errors: list[Tensor] = []
        for strength in STRENGTHS:
            weight, bias = textbook_ridge(x[~held_out], y[~held_out], strength)
            errors.append((x[held_out] @ weight + bias - y[held_out]).square().mean(dim=0))
        groups = [WIDTH] + [heads.width] * (LAYERS - layer)
        by_group = [group.mean(dim=1) for group in torch.stack(errors).split(groups, dim=1)]
        for error, strength in zip(by_group, strengths_of(heads)[str(layer)], strict=True):
            # Neighbouring strengths can differ by less than fp32 resolves.
            assert error[STRENGTHS.index(strength)] <= error.min() * 1.001


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 7, 40, 1000])
def test_fit_does_not_depend_on_batch_size(family: str, batch_size: int) -> None:
    stack, expected = a_stack(family), some_heads(family)
    heads = fit_heads(stack, random_blocks(), range(1, LAYERS + 1), batch_size=batch_size)
    assert strengths_of(heads).keys() == strengths_of(expected).keys()
    history = [entry.flatten(0, 1) for entry in visited(stack, TEXT)]
    for layer in range(1, LAYERS):
        # Batch sizes change the last digits of fp32 (1e-7). The smallest penalty (1e-6) can amplify
        # this to about 1e-3 in directions that hardly occur. If two strengths perform equally well,
        # the fit may even choose the other one.
        one, other = (fitted.head(stack, layer) for fitted in (heads, expected))
        assert relative(one.normed(history[layer]), other.normed(history[layer])) < 1e-2
        a, b = (fitted.propagation(stack, layer) for fitted in (heads, expected))
        assert a is not None
        assert b is not None
        assert relative(a.predict(history[layer]), b.predict(history[layer])) < 1e-2


def test_exit_layers_are_fitted_independently_of_order() -> None:
    stack, blocks = a_stack("llama"), random_blocks()
    together = fit_heads(stack, blocks, [4, 1, 3])
    assert together.layers == [1, 3, 4]
    for layer in (1, 3, 4):
        alone = fit_heads(stack, blocks, [layer])
        for kind in ("weights", "maps"):
            one, other = getattr(together, kind).get(layer), getattr(alone, kind).get(layer)
            assert (one is None) == (other is None) == (kind == "maps" and layer == LAYERS)
            assert one is None or all(map(torch.equal, one, other))


def test_model_without_final_norm_is_fitted_to_last_entry() -> None:
    stack = DecoderStack(tiny_model("opt", do_layer_norm_before=False))
    assert not stack.has_final_norm
    states, final = rows_of(stack, TEXT.int().numpy(), [2])
    history = visited(stack, TEXT)
    assert difference(final, history[LAYERS].flatten(0, 1)) == 0.0
    assert difference(states[2], history[2].flatten(0, 1)) == 0.0
    assert set(states) == {2, LAYERS}
    assert fit_heads(stack, random_blocks(), [2]).layers == [2]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_are_exit_states_and_final_normed_states(family: str) -> None:
    stack = a_stack(family)
    states, final = rows_of(stack, TEXT.int().numpy(), [1, 3])
    history, expected, _ = truth(stack, TEXT)
    assert difference(final, expected) == 0.0
    assert difference(states[1], history[1]) == 0.0
    assert difference(states[3], history[3]) == 0.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fitting_does_not_change_model_and_reports_every_token(family: str) -> None:
    stack, blocks = a_stack(family), random_blocks(21)
    before = state_of(stack)
    counts: list[int] = []
    heads = fit_heads(stack, blocks, [1, 3], batch_size=4, progress=counts.append)
    assert state_of(stack) == before
    assert sum(counts) == blocks.tokens == 21 * 16
    assert len(counts) == 6
    assert not any(tensor.requires_grad for pair in heads.weights.values() for tensor in pair)
    with pytest.raises(KeyboardInterrupt):
        fit_heads(stack, blocks, [1], progress=interrupt)
    assert state_of(stack) == before


def test_fit_records_provenance() -> None:
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


def test_fit_on_fewer_tokens_than_hidden_size() -> None:
    ids = np.full((3, 5), 7, dtype=np.int32)
    heads = fit_heads(a_stack("gpt2"), TokenBlocks(ids, "same", "same", 1), [1, 2, 3, 4])
    for pair in (*heads.weights.values(), *heads.maps.values()):
        assert all(bool(tensor.isfinite().all()) for tensor in pair)


@pytest.mark.parametrize("layers", [[0], [5], [-1], [2, 5], [True], ["2"], [2.0]])
def test_missing_layer_error_names_range(layers: Any) -> None:
    with pytest.raises(UsageError) as error:
        fit_heads(a_stack("llama"), random_blocks(), layers)
    assert one_line(error) == f"expected an exit layer in 1..4, got {layers[-1]!r}"


def test_layers_may_be_numpy_integers() -> None:
    heads = fit_heads(a_stack("llama"), random_blocks(), list(np.arange(2, 4)))
    assert [(type(layer), layer) for layer in heads.layers] == [(int, 2), (int, 3)]


@pytest.mark.parametrize("layers", [[], [2, 2], [1, 3, 1]])
def test_duplicate_or_empty_layers_are_rejected(layers: list[int]) -> None:
    with pytest.raises(UsageError) as error:
        fit_heads(a_stack("llama"), random_blocks(), layers)
    assert one_line(error) == f"expected distinct exit layers, got {layers}"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unreadable_corpus_is_rejected(family: str) -> None:
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
    """Return a function that makes one layer of a stack output a given value during a test."""
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
def test_non_finite_states_error_names_layer(
    spoiled: Callable[[int, float], DecoderStack], layer: int, value: float
) -> None:
    with pytest.raises(ModelError) as error:
        fit_heads(spoiled(layer, value), random_blocks(), [1, 3])
    assert one_line(error) == (
        f"layer {layer} gives NaN or infinite hidden states; use a wider --dtype, or get the "
        "checkpoint again"
    )


def test_non_finite_targets_error_names_exit_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = NormalEquations.update
    calls: list[int] = []

    def overflowing(self: NormalEquations, x: Tensor, *y: Tensor) -> None:
        calls.append(1)
        original(self, x, *(target * math.inf for target in y))

    monkeypatch.setattr(NormalEquations, "update", overflowing)
    with pytest.raises(ModelError) as error:
        fit_heads(a_stack("llama"), random_blocks(), [2, 3])
    assert calls == [1]
    assert one_line(error) == (
        "exit layer 2: expected finite states, got NaN or infinite ones; use a wider --dtype"
    )
