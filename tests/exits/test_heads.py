"""Exit heads and propagation maps say what the model will, and serve no other model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.disk import contents, largest_file
from support.reference_early_exit import (
    ALL_FAMILIES,
    LAYERS,
    a_stack,
    difference,
    one_line,
    own_logits,
    random_blocks,
    some_heads,
    state_of,
    visited,
)
from support.textbook_ridge import textbook_ridge
from support.tiny_models import FAMILIES, VOCABULARY, WIDTH, random_ids, tiny_model
from torch import Tensor, nn

from cascade.core.errors import CorpusError, ModelError, OutputError, RecordError, UsageError
from cascade.core.provenance import provenance_of
from cascade.core.schema import known, to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import EarlyExit, make_exit
from cascade.evaluation.calibration import confidences
from cascade.evaluation.operating_points import Evaluator
from cascade.exits.fitted_heads import CHECKED, FittedHeads, heads_provenance, load_heads
from cascade.exits.head_fitting import fit_heads, rows_of
from cascade.exits.heads import LogitLens
from cascade.exits.records import HeadsProvenance
from cascade.models.stack import DecoderStack
from cascade.stats import ridge
from cascade.stats.ridge import STRENGTHS, NormalEquations

#: Final norms that divide by the root mean square alone: an affine map of what a head sees.
RMS_NORMED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "smollm3", "granite")
#: Keys and values by projections of their own: maps predict them; elsewhere layer inputs.
PROJECTED = (*RMS_NORMED, "cohere", "opt")
OF_STATES = tuple(family for family in FAMILIES if family not in (*PROJECTED, "gpt_neo"))

#: What an affine map that is there is found to: the least penalty is 1e-6 of the states' square.
FOUND = 2e-3

TEXT = random_ids(6, 20, seed=11)


def is_projected(stack: DecoderStack) -> bool:
    return all(hasattr(getattr(layer, "self_attn", None), "k_proj") for layer in stack.layers)


@torch.no_grad()
def with_idle_layers(family: str, above: int) -> DecoderStack:
    """Return a stack whose layers above one add nothing to the stream; they still have keys."""
    model = tiny_model(family)
    stack = DecoderStack(model)
    last = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "out_proj", "fc_out", "fc2")
    for layer in stack.layers[above:]:
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in last:
                for parameter in module.parameters():
                    parameter.zero_()
    history = visited(stack, TEXT)
    assert all(difference(entry, history[above]) == 0.0 for entry in history[above:])
    assert difference(history[above], history[above - 1]) > 0.1
    return stack


@functools.cache
def idle_upper_half(family: str) -> tuple[DecoderStack, FittedHeads]:
    stack = with_idle_layers(family, 2)
    return stack, fit_heads(stack, random_blocks(), [1, 2, LAYERS])


@torch.no_grad()
def truth(stack: DecoderStack, ids: Tensor) -> tuple[list[Tensor], Tensor, list[list[Tensor]]]:
    """Run the model; return layer inputs and outputs, final states, and each layer's k and v.

    All `[B * T, ...]`, by hooks of our own on modules by name; nothing that the fit has found out.
    """
    stack = copy.deepcopy(stack)  # `output_hidden_states` leaves hooks of its own behind
    kept: dict[str, Tensor] = {}
    handles = []
    for number, layer in enumerate(stack.layers, start=1):
        for name in ("k_proj", "v_proj"):
            attention = getattr(layer, "self_attn", None)
            if hasattr(attention, name):
                key = f"{number}.{name}"
                hook: Any = lambda _, __, out, key=key: kept.__setitem__(key, out)  # noqa: E731
                handles.append(getattr(attention, name).register_forward_hook(hook))
    own: Any = stack.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    history = visited(stack, ids)
    raw = [
        [kept[f"{number}.{name}"].flatten(0, 1) for name in ("k_proj", "v_proj")]
        for number in range(1, LAYERS + 1)
        if is_projected(stack)
    ]
    return [entry.flatten(0, 1) for entry in history], own.hidden_states[-1].flatten(0, 1), raw


def strengths_of(heads: FittedHeads) -> dict[str, list[float]]:
    found = known(heads.provenance.strengths)
    assert found is not None
    return found


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units of the expected values' root mean square."""
    return difference(got, expected) / expected.square().mean().sqrt().item()


# --- Heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", RMS_NORMED)
def test_the_head_of_the_last_layer_is_the_models_own_norm(family: str) -> None:
    stack = a_stack(family)
    history, final, _ = truth(stack, TEXT)
    head = some_heads(family).head(stack, LAYERS)
    assert relative(head.normed(history[LAYERS]), final) < FOUND
    logits = own_logits(stack, TEXT).flatten(0, 1)
    got = head.logits(history[LAYERS][:60])
    assert relative(got, logits[:60]) < FOUND * 10  # soft-capping and scaling change the unit
    agrees = got.argmax(dim=-1) == logits[:60].argmax(dim=-1)
    assert agrees.float().mean().item() > 0.97


@pytest.mark.parametrize("family", RMS_NORMED)
def test_below_layers_that_do_nothing_the_head_is_the_full_model(family: str) -> None:
    stack, heads = idle_upper_half(family)
    history, final, _ = truth(stack, TEXT)
    assert relative(heads.head(stack, 2).normed(history[2]), final) < FOUND
    assert relative(heads.head(stack, 1).normed(history[1]), final) > 10 * FOUND


@ALL_FAMILIES
def test_a_head_beats_the_logit_lens_on_what_it_was_fitted_on(family: str) -> None:
    stack, blocks = a_stack(family), random_blocks()
    history, final, _ = truth(stack, torch.from_numpy(blocks.ids).long())
    for layer in range(1, LAYERS):
        head = some_heads(family).head(stack, layer)
        fitted = (head.normed(history[layer]) - final).square().mean().item()
        constant = (final.mean(dim=0) - final).square().mean().item()
        assert fitted < constant


@ALL_FAMILIES
def test_a_heads_logits_are_the_models_own_of_its_normed_state(family: str) -> None:
    stack, hidden = a_stack(family), torch.randn(9, WIDTH)
    head = some_heads(family).head(stack, 2)
    normed = hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt() @ head.weight + head.bias
    # 1e-5: the same sums in another order.
    assert difference(head.normed(hidden), normed) < 1e-5 * normed.abs().max().item()
    expected = stack.decode_normed(head.normed(hidden)[:, None])[:, 0]
    assert difference(head.logits(hidden), expected) < 1e-4


@ALL_FAMILIES
def test_the_logit_lens_of_the_last_layer_is_the_full_model(family: str) -> None:
    stack = a_stack(family)
    history = visited(stack, TEXT)
    logits = LogitLens(stack).logits(history[LAYERS][0])
    # 1e-5: kernels may sum one row of a batch otherwise than the row alone.
    assert difference(logits, own_logits(stack, TEXT)[0]) < 1e-5


def test_heads_say_what_they_cost() -> None:
    stack = a_stack("llama")
    assert LogitLens(stack).multiplications == 0
    assert some_heads("llama").head(stack, 2).multiplications == WIDTH * WIDTH
    assert (LogitLens.name, some_heads("llama").head(stack, 2).name) == ("logit_lens", "ridge")


# --- Propagation maps ------------------------------------------------------------------------


def check_maps(stack: DecoderStack, heads: FittedHeads, layer: int, upper: range) -> None:
    """Raise AssertionError unless a layer's map says what these upper layers are given."""
    history, _, raw = truth(stack, TEXT)
    found = heads.propagation(stack, layer)
    assert found is not None
    assert found.first == layer + 1
    predicted = found.predict(history[layer])
    assert predicted.shape == (TEXT.numel(), LAYERS - layer, heads.width)
    for number in upper:
        given = [history[number - 1]] if heads.of_states else raw[number - 1]
        expected = torch.cat(given, dim=-1)
        error = relative(predicted[:, number - layer - 1], expected)
        assert error < FOUND, f"layer {number}'s part is not what layer {number} is given"


@pytest.mark.parametrize("family", [*RMS_NORMED, *OF_STATES])
def test_the_next_layer_is_given_just_what_it_would_make_itself(family: str) -> None:
    stack, heads = a_stack(family), some_heads(family)
    check_maps(stack, heads, LAYERS - 1, range(LAYERS, LAYERS + 1))
    check_maps(stack, heads, 1, range(2, 3))
    with pytest.raises(AssertionError, match="layer 4's part"):  # three layers on, it must err
        check_maps(stack, heads, 1, range(4, 5))


@pytest.mark.parametrize("family", [*RMS_NORMED, *OF_STATES])
def test_every_upper_layer_has_its_own_part_of_the_map(family: str) -> None:
    stack, heads = idle_upper_half(family)
    check_maps(stack, heads, 2, range(3, 5))


def swapped(heads: FittedHeads, order: Callable[[Tensor], Tensor]) -> FittedHeads:
    """Return heads whose maps' outputs are in another order."""
    maps = {
        layer: (
            order(weight.unflatten(-1, (-1, heads.width))).flatten(-2),
            order(bias.unflatten(-1, (-1, heads.width))).flatten(-2),
        )
        for layer, (weight, bias) in heads.maps.items()
    }
    return dataclasses.replace(heads, maps=maps)


@pytest.mark.parametrize(
    ("wrong", "layers"),
    [
        (lambda parts: parts.flip(-2), "3"),  # the highest layer first
        (lambda parts: parts.roll(1, dims=-2), "3"),
        (lambda parts: parts.roll(parts.shape[-1] // 2, dims=-1), "3"),  # values before keys
    ],
)
def test_parts_in_another_order_are_caught(wrong: Callable[[Tensor], Tensor], layers: str) -> None:
    stack, heads = idle_upper_half("llama")
    with pytest.raises(AssertionError, match=f"layer {layers}'s part"):
        check_maps(stack, swapped(heads, wrong), 2, range(3, 5))


@ALL_FAMILIES
def test_maps_predict_keys_and_values_where_they_are_projected_and_inputs_elsewhere(
    family: str,
) -> None:
    stack, heads = a_stack(family), some_heads(family)
    assert heads.of_states == (not is_projected(stack))
    config = stack.model.config
    if heads.of_states:
        assert heads.width == WIDTH
    else:
        groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
        size = getattr(config, "head_dim", None) or WIDTH // config.num_attention_heads
        assert heads.width == 2 * groups * size
    assert heads.layers == [1, 2, 3, 4]
    assert sorted(heads.maps) == [1, 2, 3]
    assert heads.propagation(stack, LAYERS) is None


# --- Fitting ---------------------------------------------------------------------------------


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
        for error, strength in zip(
            by_group, strengths_of(heads)[str(layer)], strict=True
        ):
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


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


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


@pytest.mark.parametrize(
    ("fitted", "measured", "expected"),
    [
        (("embedded", "embedded-train"), ("embedded", "embedded-held-out"), False),
        (("embedded", "embedded-train"), ("embedded", "embedded-train-fit"), True),
        (("embedded", "embedded-train"), ("embedded", "embedded"), True),
        (("embedded", "embedded"), ("embedded", "embedded-held-out-confirm"), True),
        (("a/text.jsonl", "text"), ("a/text.jsonl", "text"), True),
        (("a/text.jsonl", "text"), ("b/text.jsonl", "text"), False),
        (("org/text", "text-a"), ("org/text", "text-ab"), False),
    ],
)
def test_heads_know_the_text_they_were_fitted_on(
    fitted: tuple[str, str], measured: tuple[str, str], expected: bool
) -> None:
    # Other tokens each: the same source can be cut otherwise.
    corpora = [
        TokenBlocks(random_blocks(3 + part).ids, source, name, 3)
        for part, (source, name) in enumerate((fitted, measured))
    ]
    heads = dataclasses.replace(
        some_heads("llama"), provenance=HeadsProvenance(corpus=corpora[0].provenance())
    )
    assert heads.saw(corpora[1]) is expected
    assert heads_provenance(heads, corpora[1])["heads_saw_corpus"] is expected
    assert heads.saw(dataclasses.replace(corpora[0], name="copy", source="elsewhere"))
    assert heads_provenance(None, corpora[0])["heads_saw_corpus"] is False


# --- Files -----------------------------------------------------------------------------------


def check_equal(got: FittedHeads, expected: FittedHeads, *, half: bool = False) -> None:
    """Raise AssertionError unless two heads are the same, or the same but for 16 bits."""
    for kind in ("weights", "maps"):
        one, other = getattr(got, kind), getattr(expected, kind)
        assert one.keys() == other.keys()
        for layer, pair in one.items():
            for part, right in zip(pair, other[layer], strict=True):
                assert part.dtype == torch.float32
                assert torch.equal(part, right.half().float() if half else right)
    assert (got.width, got.of_states) == (expected.width, expected.of_states)
    assert got.provenance == expected.provenance


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_come_back_as_they_were_saved(family: str, half: bool, tmp_path: Path) -> None:
    heads, path = some_heads(family), tmp_path / "new" / "heads.safetensors"
    heads.save(path, half=half)
    assert list(contents(tmp_path)) == ["new", "new/heads.safetensors"]
    check_equal(load_heads(path, a_stack(family)), heads, half=half)


def test_half_takes_half_the_room(tmp_path: Path) -> None:
    heads = some_heads("gpt2")
    sizes = []
    for half in (False, True):
        heads.save(tmp_path / "heads.safetensors", half=half)
        with safe_open(tmp_path / "heads.safetensors", framework="pt") as file:
            parts = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        sizes.append(sum(part.nbytes for part in parts))
    assert sizes[0] == 2 * sizes[1]


def test_loaded_heads_score_as_those_that_were_saved(tmp_path: Path) -> None:
    stack, heads = a_stack("llama"), some_heads("llama")
    heads.save(tmp_path / "heads.safetensors")
    logits = []
    for fitted in (heads, load_heads(tmp_path / "heads.safetensors", stack)):
        early = EarlyExit(
            stack, layer=2, rule="top2_gap", threshold=0.2, heads=fitted, propagation="ridge"
        )
        logits.append(early.score(TEXT, keep_logits=True).logits)
    assert logits[0] is not None
    assert logits[1] is not None
    assert torch.equal(logits[0], logits[1])


def test_weights_that_16_bits_do_not_hold_are_refused(tmp_path: Path) -> None:
    heads = copy.deepcopy(some_heads("llama"))
    heads.maps[2][0][3, 4] = 70_000
    with pytest.raises(UsageError) as error:
        heads.save(tmp_path / "heads.safetensors", half=True)
    assert one_line(error) == (
        "the weights of exit layer 2 reach 7e+04, more than 16 bits hold; save them without half"
    )
    assert contents(tmp_path) == {}
    heads.save(tmp_path / "heads.safetensors")


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_full_disk_leaves_what_was_there(size: int, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new"):
        path = folder / "heads.safetensors"
        if folder == tmp_path:
            path.write_text("what was there before")
        before = contents(tmp_path)
        with largest_file(size), pytest.raises(OutputError) as error:
            some_heads("llama").save(path)
        said = one_line(error)
        assert said.startswith(f"cannot write {path}: ")
        assert "File too large" in said
        assert said.endswith(
            "free some space or choose another place (what was there before is unharmed)"
        )
        assert contents(tmp_path) == before


def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safetensors.torch.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        some_heads("llama").save(tmp_path / "new" / "heads.safetensors")
    assert contents(tmp_path) == {}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "heads.safetensors"
    some_heads("llama").save(path)
    return path


@pytest.mark.parametrize("kept", [0, 7, 100, 2000, -1], ids=str)
def test_a_torn_file_is_refused(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(RecordError) as error:
        load_heads(saved, a_stack("llama"))
    assert one_line(error).startswith(f"{saved} is no readable safetensors file (")
    assert str(error.value).endswith("); make it anew with `cascade fit-heads`")


@pytest.mark.parametrize("content", [b"{}", b"\x00" * 64, b"layer,weight\n1,0.5\n"])
def test_a_file_of_another_kind_is_refused(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    with pytest.raises(RecordError, match="is no readable safetensors file"):
        load_heads(saved, a_stack("llama"))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is a folder, expected the"):
        load_heads(tmp_path, a_stack("llama"))


def test_a_missing_file_is_refused_with_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(RecordError) as error:
        load_heads(tmp_path / "none.safetensors", a_stack("llama"))
    assert one_line(error) == (
        f"no exit heads at {tmp_path / 'none.safetensors'}; make them with `cascade fit-heads`"
    )


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """Change what a file holds and save it as safetensors again."""
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["cascade"])
    tensors = load_file(path)
    change(tensors, about)
    save_file(tensors, path, metadata={"cascade": json.dumps(about)})


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"cascade": "null"}, {"cascade": "[1]"}, {"cascade": "{}"}]
)
def test_other_safetensors_files_are_refused(saved: Path, metadata: dict[str, str] | None) -> None:
    save_file(load_file(saved), saved, metadata=metadata)
    with pytest.raises(RecordError) as error:
        load_heads(saved, a_stack("llama"))
    assert one_line(error) == (f"{saved} holds no exit heads; make them with `cascade fit-heads`")


def test_metadata_that_is_no_json_is_refused(saved: Path) -> None:
    save_file(load_file(saved), saved, metadata={"cascade": "{"})
    with pytest.raises(RecordError, match="is no readable safetensors file"):
        load_heads(saved, a_stack("llama"))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: about.update(schema=2),
        lambda tensors, about: about.update(kind="calibration"),
        lambda tensors, about: about.pop("kind"),
    ],
)
def test_another_schema_or_kind_is_refused(saved: Path, change: Callable[..., Any]) -> None:
    rewrite(saved, change)
    with pytest.raises(RecordError, match="holds no exit heads"):
        load_heads(saved, a_stack("llama"))


def spoil(name: str, value: float) -> Callable[..., Any]:
    return lambda tensors, about: tensors[name].view(-1)[3].fill_(value)


def of_model(**changes: Any) -> Callable[..., Any]:
    return lambda tensors, about: about["provenance"]["model"].update(changes)


def without(*names: str) -> Callable[..., Any]:
    return lambda tensors, about: [tensors.pop(name) for name in names]


def instead(name: str, *shape: int) -> Callable[..., Any]:
    return lambda tensors, about: tensors.update({name: torch.ones(shape)})


#: What is done to a file with heads of all four layers (hidden size 32, maps 32 wide), and the
#: words that say so.
SPOILED: dict[str, tuple[Callable[..., Any], str]] = {
    "no bias": (without("head.2.bias"), "lacks head.2.bias"),
    "no weight": (without("head.2.weight"), "lacks head.2.weight"),
    "no bias of a map": (without("propagation.3.bias"), "lacks propagation.3.bias"),
    "no map": (
        without("propagation.1.weight", "propagation.1.bias"),
        "lacks propagation.1.bias, propagation.1.weight",
    ),
    "no head": (without("head.2.weight", "head.2.bias"), "lacks head.2.bias, head.2.weight"),
    "nothing": (lambda tensors, about: tensors.clear(), "lacks heads altogether"),
    "another tensor": (instead("lm_head", 2), "has lm_head, which is no part of exit heads"),
    "a layer that is no number": (instead("head.last.weight", 2), "has head.last.weight"),
    "another part": (instead("head.2.scale", 2), "has head.2.scale"),
    "a layer of another model": (instead("head.5.weight", 32, 32), "has head.5.weight"),
    "layer 0": (instead("head.0.weight", 32, 32), "has head.0.weight"),
    "a map of the last layer": (instead("propagation.4.bias", 0), "has propagation.4.bias"),
    "a head too small": (
        instead("head.2.weight", 16, 32),
        "expected head.2.weight of shape [32, 32], got [16, 32]",
    ),
    "a bias too long": (instead("head.2.bias", 33), "head.2.bias of shape [32], got [33]"),
    "a bias of two dimensions": (instead("head.2.bias", 1, 32), "shape [32], got [1, 32]"),
    "a map too narrow": (
        instead("propagation.2.weight", 32, 32),
        "expected propagation.2.weight of shape [32, 64], got [32, 32]",
    ),
    "NaN in a head": (spoil("head.2.weight", math.nan), "head.2.weight holds NaN or infinite"),
    "infinity in a bias": (spoil("head.1.bias", math.inf), "head.1.bias holds NaN or infinite"),
    "NaN in a map": (spoil("propagation.1.weight", math.nan), "propagation.1.weight holds NaN"),
    "no width": (
        lambda tensors, about: about.pop("width"),
        "expected width, got nothing",
    ),
    "another width": (lambda tensors, about: about.update(width=8), "of shape [32, 24], got"),
    "a width in words": (lambda tensors, about: about.update(width="32"), 'at width, got "32"'),
    "a flag that is none": (
        lambda tensors, about: about.update(of_states="no"),
        'expected true or false at of_states, got "no"',
    ),
    "states of another width": (
        lambda tensors, about: about.update(of_states=True, width=16),
        "expected a width of 32 where layer inputs are predicted, got 16",
    ),
    "no provenance": (
        lambda tensors, about: about.pop("provenance"),
        "expected provenance, got nothing",
    ),
    "a provenance that is none": (
        lambda tensors, about: about.update(provenance=[]),
        "expected an object at provenance, got []",
    ),
    "a model that is none": (
        lambda tensors, about: about["provenance"].update(model="ours"),
        'expected an object at provenance.model, got "ours"',
    ),
    "layers in words": (of_model(num_layers="4"), 'at provenance.model.num_layers, got "4"'),
    "no model": (
        lambda tensors, about: about["provenance"].pop("model"),
        "expected provenance.model, got nothing",
    ),
    "a model without layers": (
        lambda tensors, about: about["provenance"]["model"].pop("num_layers"),
        "expected provenance.model.num_layers, got nothing",
    ),
    "a model without a size": (
        lambda tensors, about: about["provenance"]["model"].pop("hidden_size"),
        "expected provenance.model.hidden_size, got nothing",
    ),
    "a size that is none": (
        of_model(hidden_size=None),
        "at provenance.model.hidden_size, got null",
    ),
    "a corpus that is none": (
        lambda tensors, about: about["provenance"].update(corpus=["embedded"]),
        'expected an object at provenance.corpus, got ["embedded"]',
    ),
    "a corpus without tokens": (
        lambda tensors, about: about["provenance"]["corpus"].pop("tokens"),
        "expected provenance.corpus.tokens, got nothing",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_file_that_is_not_whole_is_refused_with_what_is_wrong(saved: Path, case: str) -> None:
    change, words = SPOILED[case]
    rewrite(saved, change)
    with pytest.raises(RecordError) as error:
        load_heads(saved, a_stack("llama"))
    said = one_line(error)
    assert said.startswith(f"{saved} is torn or edited (")
    assert words in said
    assert said.endswith("); make it anew with `cascade fit-heads`")


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_the_last_layer_alone_need_no_map(family: str, tmp_path: Path) -> None:
    heads = fit_heads(a_stack(family), random_blocks(), [LAYERS])
    heads.save(tmp_path / "heads.safetensors")
    assert load_heads(tmp_path / "heads.safetensors", a_stack(family)).layers == [LAYERS]


# --- Other models ----------------------------------------------------------------------------

OURS: dict[str, Any] = {"name": "ours", "weights_hash": "sha256:1", "revision": "main"}


def named_stack(**changes: Any) -> DecoderStack:
    return DecoderStack(tiny_model("llama"), provenance=OURS | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"name": "theirs", "weights_hash": "sha256:2"},
            "ours (weights_hash sha256:1), but the model is theirs (weights_hash sha256:2)",
        ),
        ({"revision": None}, "ours (revision main), but the model is ours (revision None)"),
        (
            {"name": None, "dtype": "bfloat16"},
            "ours (dtype float32), but the model is llama (dtype bfloat16)",
        ),
        (
            {"num_layers": 30, "hidden_size": 576},
            "ours (num_layers 4, hidden_size 32), but the model is ours (num_layers 30, "
            "hidden_size 576)",
        ),
    ],
)
def test_heads_of_another_model_are_refused_with_both_named(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    heads = fit_heads(named_stack(), random_blocks(), [2])
    heads.save(tmp_path / "heads.safetensors")
    other = named_stack(**changes)
    expected = f"these exit heads belong to {said}; make them anew for this model"
    for use in (
        lambda: heads.check(other),
        lambda: load_heads(tmp_path / "heads.safetensors", other),
        lambda: EarlyExit(other, layer=2, threshold=0.5, heads=heads),
    ):
        with pytest.raises(ModelError) as error:
            use()
        assert one_line(error) == expected
    load_heads(tmp_path / "heads.safetensors", named_stack(device="elsewhere"))


def uses_of(heads: FittedHeads, stack: DecoderStack, saved: Path) -> list[Callable[[], object]]:
    """Return every way in which heads can come to serve a model."""
    return [
        lambda: heads.check(stack),
        lambda: heads.head(stack, 2),
        lambda: heads.propagation(stack, 2),
        lambda: make_exit(stack, 2, "cosine", 0.5, heads=heads),
        lambda: EarlyExit(stack, layer=2, threshold=0.5, heads=heads),
        lambda: EarlyExit(stack, heads=heads),
        lambda: Evaluator(stack, {2: ["cosine"]}, heads=heads),
        lambda: confidences(stack, random_blocks(), 2, "cosine", heads=heads),
        lambda: load_heads(saved, stack),
    ]


def test_heads_of_a_model_in_memory_serve_its_weights_and_no_others(tmp_path: Path) -> None:
    saved = tmp_path / "heads.safetensors"
    heads = fit_heads(DecoderStack(tiny_model("llama")), random_blocks(), [2])
    heads.save(saved)
    for use in uses_of(heads, DecoderStack(tiny_model("llama")), saved):
        use()
    trained = DecoderStack(tiny_model("llama"))
    trained.lm_head.weight.data[3, 4] += 1e-3
    for stack in (DecoderStack(tiny_model("llama", seed=1)), trained):
        model = known(heads.provenance.model)
        assert model is not None
        hashes = (model.weights_hash, stack.weights_hash())
        for use in uses_of(heads, stack, saved):
            with pytest.raises(ModelError) as error:
                use()
            assert one_line(error) == (
                f"these exit heads belong to llama (weights_hash {hashes[0]}), but the model is "
                f"llama (weights_hash {hashes[1]}); make them anew for this model"
            )


def test_what_else_is_known_of_an_origin_does_not_hide_the_weights() -> None:
    stack, blocks = a_stack("llama"), random_blocks()
    origin = provenance_of(stack, blocks, "by hand")
    before = copy.deepcopy(origin)
    heads = fit_heads(stack, blocks, [2], provenance=origin)
    heads.check(stack)
    assert origin == before


def test_heads_of_the_same_weights_in_another_dtype_are_refused() -> None:
    stack = DecoderStack(tiny_model("llama").bfloat16())
    with pytest.raises(ModelError, match=r"llama \(dtype float32\), but .* \(dtype bfloat16\)"):
        some_heads("llama").check(stack)


def test_heads_without_provenance_serve_no_model() -> None:
    heads = dataclasses.replace(some_heads("llama"), provenance=HeadsProvenance())
    with pytest.raises(ModelError, match="belong to an unknown model"):
        heads.check(a_stack("llama"))


@pytest.mark.parametrize("layer", [3, 5, 0])
def test_a_layer_that_was_not_fitted_is_refused_with_those_that_were(layer: int) -> None:
    heads, stack = fit_heads(a_stack("llama"), random_blocks(), [2, 4]), a_stack("llama")
    for use in (heads.head, heads.propagation):
        with pytest.raises(UsageError) as error:
            use(stack, layer)
        assert one_line(error) == (
            f"these heads were fitted for the layers 2, 4, got layer {layer}; fit it with "
            "`cascade fit-heads --layers`"
        )
