"""Passes give the model's states, features and logits for branches of several rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.engines import BEST, KINDS
from support.tiny_models import random_ids, tiny_model
from torch import Tensor

from cascade.decoding.engine.engine import DecodingEngine, EngineKind
from cascade.decoding.engine.passes import EnginePasses, OwnPasses
from cascade.decoding.lossless import Branch
from cascade.models.stack import DecoderStack

#: fp32 rounding of sums in another order, for states below 100.
CLOSE = 1e-4

FEATURES = (1, 3, 4)


def stack_of(family: str = "llama", dtype: torch.dtype = torch.float32) -> DecoderStack:
    return DecoderStack(copy.deepcopy(tiny_model(family)).to(dtype))


def passes_of(
    stack: DecoderStack, features: Sequence[int] = (), kind: EngineKind = BEST, rows: int = 2
) -> EnginePasses:
    engine = DecodingEngine(stack, "auto" if stack.dtype == torch.bfloat16 else kind)
    assert engine.obstacle is None
    return EnginePasses(engine, rows, 40, [1.0], features)


def hidden_states(stack: DecoderStack, tokens: Sequence[int]) -> tuple[Tensor, ...]:
    """Return what `transformers` calls hidden states: each layer's input, and the normed state."""
    model: Any = stack.model
    with torch.no_grad():
        made = model(torch.tensor([tokens]), output_hidden_states=True)
    return tuple(states[0] for states in made.hidden_states)


def own_features(stack: DecoderStack, tokens: Sequence[int]) -> Tensor:
    states = hidden_states(stack, tokens)
    return torch.stack([*(states[layer - 1] for layer in FEATURES), states[-1]], dim=1)


def own_logits(stack: DecoderStack, tokens: Sequence[int]) -> Tensor:
    model: Any = stack.model
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def tokens_of(length: int, seed: int = 0) -> list[int]:
    return random_ids(1, length, seed=seed)[0].tolist()


def chain(row: int, column: int, tokens: Sequence[int]) -> Branch:
    return Branch(row, column, tokens, list(range(-1, len(tokens) - 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_layer_inputs_and_the_normed_last_state(kind: EngineKind) -> None:
    stack, text = stack_of(), tokens_of(15)
    passes = passes_of(stack, FEATURES, kind)
    last, features = passes.prefill(1, [text[:9]])
    assert features is not None
    expected = own_features(stack, text)
    assert features.shape == (1, 9, len(FEATURES) + 1, stack.hidden_size)
    assert (features[0] - expected[:9]).abs().max() <= CLOSE
    assert (last - own_logits(stack, text)[8:9]).abs().max() <= CLOSE
    logits, features = passes.run([chain(1, 9, text[9:])])
    assert features is not None
    assert (features - expected[9:]).abs().max() <= CLOSE
    assert (logits - own_logits(stack, text)[9:]).abs().max() <= CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_one_length_are_computed_together(kind: EngineKind) -> None:
    stack, texts = stack_of(), [tokens_of(9, seed=seed) for seed in range(2)]
    together, alone = passes_of(stack, FEATURES, kind, rows=3), passes_of(stack, kind=kind, rows=3)
    assert together.joins
    logits, features = together.prefill(1, texts)
    assert together.counts.layer_rows == [18] * 4
    assert features is not None
    for place, text in enumerate(texts):
        assert (logits[place] - own_logits(stack, text)[-1]).abs().max() <= CLOSE
        assert (features[place] - own_features(stack, text)).abs().max() <= CLOSE
        alone.prefill(1 + place, [text])
    branches = [chain(1, 9, [5, 6]), chain(2, 9, [7])]
    assert (together.run(branches)[0] - alone.run(branches)[0]).abs().max() <= CLOSE


def test_prompts_in_half_precision_are_computed_one_by_one() -> None:
    assert not passes_of(stack_of(dtype=torch.bfloat16)).joins


def test_features_in_half_precision() -> None:
    stack, text = stack_of(dtype=torch.bfloat16), tokens_of(12)
    passes, one = passes_of(stack, FEATURES), passes_of(stack)
    passes.prefill(0, [text[:9]])
    one.prefill(0, [text[:9]])
    logits, features = passes.run([chain(0, 9, text[9:])])
    assert features is not None
    # Layers run in parts give the same, bit for bit.
    assert torch.equal(logits, one.run([chain(0, 9, text[9:])])[0])
    # The last feature is what the LM head reads.
    assert torch.equal(stack.decode_normed(features[None, :, -1])[0].float(), logits)
    assert logits.dtype == torch.float32


def test_without_feature_layers_there_are_no_features() -> None:
    passes = passes_of(stack_of())
    assert passes.prefill(0, [tokens_of(5)])[1] is None
    assert passes.run([chain(0, 5, [3, 4])])[1] is None


def test_features_of_a_tree_are_those_of_its_paths() -> None:
    stack, text = stack_of("qwen3"), tokens_of(7)
    passes = passes_of(stack, FEATURES)
    passes.prefill(0, [text])
    # 20 with the children 21 and 22, and 23 behind 22.
    logits, features = passes.run([Branch(0, 7, [20, 21, 22, 23], [-1, 0, 0, 2])])
    assert features is not None
    paths = ([20], [20, 21], [20, 22], [20, 22, 23])
    for place, path in enumerate(paths):
        expected = own_features(stack, [*text, *path])[-1]
        assert (features[place] - expected).abs().max() <= CLOSE
    own = torch.stack([own_logits(stack, [*text, *path])[-1] for path in paths])
    assert (logits - own).abs().max() <= CLOSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_accepted_path_of_a_tree_is_moved_to_its_columns(family: str, kind: EngineKind) -> None:
    stack = stack_of(family)
    passes = passes_of(stack, kind=kind)
    texts = {0: tokens_of(11), 1: tokens_of(6, seed=1)}
    for row, text in texts.items():
        passes.prefill(row, [text])
    tree = [-1, 0, 0, 2, 1, 3]
    passes.run(
        [
            Branch(0, 11, [20, 21, 22, 23, 24, 25], tree),
            Branch(1, 6, [30, 31, 32, 33, 34, 35], tree),
        ]
    )
    before = [buffer.clone() for buffer in passes.cache.buffers(0)]
    # In row 0, the path over the places 0, 2, 3 and 5 is right.
    passes.move(0, {13: 12, 14: 13, 16: 14})
    for buffer, old in zip(passes.cache.buffers(0), before, strict=True):
        assert torch.equal(buffer[0, :, 11:15], old[0, :, [11, 13, 14, 16]])
        assert torch.equal(buffer[1], old[1])
    logits, _ = passes.run([chain(0, 15, [40, 41])])
    expected = own_logits(stack, [*texts[0], 20, 22, 23, 25, 40, 41])[-2:]
    assert (logits - expected).abs().max() <= CLOSE


def test_branches_of_several_rows_follow_each_other() -> None:
    stack = stack_of()
    passes = passes_of(stack, rows=3)
    texts = {row: tokens_of(5 + 3 * row, seed=row) for row in range(3)}
    for row, text in texts.items():
        passes.prefill(row, [text])
    branches = [chain(2, 11, [7, 8]), chain(0, 5, [9])]
    logits, _ = passes.run(branches)
    expected = torch.cat(
        [own_logits(stack, [*texts[2], 7, 8])[-2:], own_logits(stack, [*texts[0], 9])[-1:]]
    )
    assert (logits - expected).abs().max() <= CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_fused_trees_need_fp32(kind: EngineKind) -> None:
    assert DecodingEngine(stack_of(), kind).supports_trees
    engine = DecodingEngine(stack_of(dtype=torch.bfloat16), kind)
    assert engine.supports_trees is (kind == "compiled" and engine.obstacle is None)


def test_work_is_counted() -> None:
    stack = stack_of()
    for passes in (passes_of(stack), OwnPasses(stack, 1, 40, [1.0], reason="a test")):
        passes.prefill(0, [tokens_of(6)])
        assert passes.counts.layer_rows == [6] * 4
        passes.run([chain(0, 6, [3, 4, 5])])
        assert passes.counts.layer_rows == [9] * 4
        assert passes.counts.pairs == [6 * 6 + 3 * 9] * 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_models_own_modules_give_its_logits(family: str) -> None:
    stack, text = stack_of(family), tokens_of(14)
    passes = OwnPasses(stack, 1, 14, [1.0], reason="a test")
    assert not passes.trees
    assert passes.description == "model (a test)"
    last, features = passes.prefill(0, [text[:8]])
    assert features is None
    expected = own_logits(stack, text)
    assert (last - expected[7:8]).abs().max() <= CLOSE
    # A wrong draft is overwritten by the next branch.
    passes.run([chain(0, 8, [text[8], 90, 91])])
    passes.move(0, {})
    logits, _ = passes.run([chain(0, 9, text[9:])])
    assert (logits - expected[9:]).abs().max() <= CLOSE
