"""Distillation keeps a head only if it improves on the held-out sequences."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from support.reference_early_exit import (
    LAYERS,
    a_stack,
    difference,
    one_line,
    own_logits,
    random_blocks,
    state_of,
)
from support.tiny_models import WIDTH, random_ids, tiny_model
from torch import Tensor

from cascade.core.errors import CascadeError, CorpusError, ModelError, UsageError
from cascade.core.schema import UNSET, known
from cascade.corpora.blocks import TokenBlocks
from cascade.exits import distillation
from cascade.exits.distillation import distill
from cascade.exits.fitted_heads import FittedHeads, load_heads
from cascade.exits.head_fitting import fit_heads
from cascade.models.stack import DecoderStack

EXITS = [1, 3]
EPOCHS = 3


@functools.cache
def sharp_stack(family: str = "llama") -> DecoderStack:
    """Return a stack whose logits are as far apart as those of real models.

    The distributions of a tiny random model are nearly uniform. KL is then almost a squared error,
    and the closed form is nearly the best head.
    """
    model = tiny_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10.0)
    return DecoderStack(model)


#: Sequences of 15 tokens, so that no batch has a multiple of 64 rows (the model's positions).
@functools.cache
def some_blocks(sequences: int = 200) -> TokenBlocks:
    return random_blocks(sequences, 15)


@functools.cache
def closed_form(family: str = "llama") -> FittedHeads:
    return fit_heads(sharp_stack(family), some_blocks(), EXITS)


@functools.cache
def distilled(family: str = "llama") -> FittedHeads:
    return distill(
        sharp_stack(family), closed_form(family), some_blocks(), epochs=EPOCHS, batch_size=8
    )


def losses_of(heads: FittedHeads) -> dict[int, list[float]]:
    distillation = known(heads.provenance.distillation)
    assert distillation is not None
    return {int(layer): kl for layer, kl in distillation.kl_on_sequences_kept_aside.items()}


@torch.no_grad()
def reference_kl(stack: DecoderStack, heads: FittedHeads, layer: int, ids: Tensor) -> float:
    """Return the mean KL(full || head) per token, in nats, in float64."""
    states: dict[int, Tensor] = {}
    stack.visit(ids, states.__setitem__)
    size = states[layer].square().mean(dim=-1, keepdim=True).sqrt()
    weight, bias = heads.weights[layer]
    student = stack.decode_normed(states[layer] / size @ weight + bias).double().log_softmax(-1)
    teacher = own_logits(stack, ids).double().log_softmax(-1)
    return float((teacher.exp() * (teacher - student)).sum(dim=-1).mean())


def kept_aside(blocks: TokenBlocks) -> Tensor:
    return torch.from_numpy(blocks.ids[9::10]).long()


# --- Improvement over the closed form --------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "bloom"])
def test_distilling_lowers_kl_on_held_out_sequences(family: str) -> None:
    for layer, losses in losses_of(distilled(family)).items():
        assert len(losses) == 1 + EPOCHS
        assert min(losses) < 0.99 * losses[0], f"the head of layer {layer} did not improve"


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "bloom"])
def test_losses_match_reference_and_best_head_is_kept(family: str) -> None:
    stack, aside = sharp_stack(family), kept_aside(some_blocks())
    for layer, losses in losses_of(distilled(family)).items():
        before = reference_kl(stack, closed_form(family), layer, aside)
        after = reference_kl(stack, distilled(family), layer, aside)
        # 1e-4: logits are computed in fp32, in batches of a different size.
        assert losses[0] == pytest.approx(before, rel=1e-4)
        assert min(losses) == pytest.approx(after, rel=1e-4)


def test_distilled_heads_improve_on_unseen_text() -> None:
    stack, ids = sharp_stack("opt"), random_ids(40, 15, seed=99)
    for layer in EXITS:
        before, after = (
            reference_kl(stack, heads, layer, ids)
            for heads in (closed_form("opt"), distilled("opt"))
        )
        assert after < 0.9 * before


@pytest.mark.parametrize("learning_rate", [10.0, 1e30, math.inf])
def test_diverging_training_keeps_closed_form(learning_rate: float) -> None:
    heads = distill(
        sharp_stack(), closed_form(), some_blocks(), epochs=2, learning_rate=learning_rate
    )
    for layer, losses in losses_of(heads).items():
        assert not any(later < losses[0] for later in losses[1:])
        assert all(map(torch.equal, heads.weights[layer], closed_form().weights[layer]))


def test_each_head_is_replaced_independently() -> None:
    # At the last layer the closed form equals the full model, so no head can be better.
    heads = fit_heads(sharp_stack(), some_blocks(), [1, LAYERS])
    learnt = distill(sharp_stack(), heads, some_blocks(), epochs=2, batch_size=8)
    assert losses_of(learnt)[LAYERS][0] < 1e-4
    assert all(map(torch.equal, learnt.weights[LAYERS], heads.weights[LAYERS]))
    assert not torch.equal(learnt.weights[1][0], heads.weights[1][0])
    assert not torch.equal(learnt.weights[1][1], heads.weights[1][1])


def test_best_epoch_is_kept_instead_of_last(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([[5.0, 5.0], [3.0, 6.0], [4.0, 7.0]])
    seen: list[dict[int, Tensor]] = []

    def validate(_: Any, heads: Any, *__: Any) -> dict[int, float]:
        seen.append({layer: head.weight.detach().clone() for layer, head in heads.items()})
        return dict(zip(EXITS, next(losses), strict=True))

    monkeypatch.setattr(distillation, "validation_losses", validate)
    heads = distill(sharp_stack(), closed_form(), some_blocks(40), epochs=2)
    assert torch.equal(heads.weights[1][0], seen[1][1])
    assert torch.equal(heads.weights[3][0], seen[0][3])
    assert losses_of(heads) == {1: [5.0, 3.0, 4.0], 3: [5.0, 6.0, 7.0]}


def test_held_out_sequences_are_not_trained_on() -> None:
    blocks, stack = some_blocks(), sharp_stack()
    other_ids = blocks.ids.copy()
    other_ids[9::10] = random_ids(20, 15, seed=50).numpy()
    others = dataclasses.replace(blocks, ids=other_ids)
    one, other = (
        distill(stack, closed_form(), text, epochs=1, batch_size=8) for text in (blocks, others)
    )
    assert losses_of(one)[1] != losses_of(other)[1]
    for layer in EXITS:
        assert losses_of(one)[layer][1] < losses_of(one)[layer][0]
        assert all(map(torch.equal, one.weights[layer], other.weights[layer]))
    changed = blocks.ids.copy()
    changed[8::10] = random_ids(20, 15, seed=50).numpy()
    third = distill(
        stack, closed_form(), dataclasses.replace(blocks, ids=changed), epochs=1, batch_size=8
    )
    assert not torch.equal(third.weights[1][0], one.weights[1][0])


@pytest.mark.parametrize("batch_size", [1, 8, 200])
def test_every_epoch_changes_heads_at_any_batch_size(batch_size: int) -> None:
    blocks = some_blocks(40)
    heads = distill(sharp_stack(), closed_form(), blocks, epochs=4, batch_size=batch_size)
    for losses in losses_of(heads).values():
        assert len(set(losses)) == 5


@pytest.mark.parametrize(
    ("sequences", "batch_size", "length"), [(36, 1, 15), (36, 36, 128), (35, 16, 100), (180, 8, 15)]
)
def test_step_count_matches_actual_steps(sequences: int, batch_size: int, length: int) -> None:
    steps = 0
    for start in range(0, sequences, batch_size):
        rows = len(range(sequences)[start : start + batch_size]) * length
        steps += len(torch.arange(rows).split(distillation.STEP_ROWS))
    assert distillation.step_count(sequences, batch_size, length) == steps


def test_heads_train_independently_of_each_other() -> None:
    heads = closed_form()
    alone = dataclasses.replace(heads, weights={3: heads.weights[3]}, maps={3: heads.maps[3]})
    learnt = distill(sharp_stack(), alone, some_blocks(), epochs=EPOCHS, batch_size=8)
    assert learnt.layers == [3]
    assert all(map(torch.equal, learnt.weights[3], distilled().weights[3]))


def test_seed_determines_distilled_heads() -> None:
    results = [
        distill(sharp_stack(), closed_form(), some_blocks(), epochs=1, batch_size=8, seed=seed)
        for seed in (0, 0, 1)
    ]
    weights = [heads.weights[3][0] for heads in results]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert results[0].provenance == results[1].provenance


def test_distilling_does_not_change_global_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    distill(sharp_stack(), closed_form(), some_blocks(20), epochs=1)
    assert torch.equal(torch.rand(2), expected)


def test_batches_larger_than_step_and_positions() -> None:
    blocks, stack = some_blocks(200), sharp_stack()
    assert stack.max_positions == 64
    assert 2 * distillation.STEP_ROWS < 180 * 15
    heads = distill(stack, closed_form(), blocks, epochs=1, batch_size=1000)
    losses = losses_of(heads)
    for layer in EXITS:
        # A batch of all sequences takes three steps. The reference divergence needs no padding.
        by_hand = reference_kl(stack, closed_form(), layer, kept_aside(blocks))
        assert losses[layer][0] == pytest.approx(by_hand, rel=1e-4)
        assert losses[layer][1] != losses[layer][0]


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_log_probabilities_of_rows_match_single_rows(family: str, count: int) -> None:
    stack = a_stack(family)
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))
    expected = stack.decode_normed(rows[:, None])[:, 0].log_softmax(dim=-1)
    with torch.no_grad():
        got = distillation.log_probabilities(stack, rows)
    # 1e-5: kernels may sum a row of a batch in a different order than a single row.
    assert difference(got, expected) < 1e-5


# --- Side effects ----------------------------------------------------------------------------


def weights_hash(stack: DecoderStack) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(stack.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def flags(stack: DecoderStack) -> list[bool]:
    return [parameter.requires_grad for parameter in stack.model.parameters()]


def with_mixed_flags(family: str = "llama") -> DecoderStack:
    stack = DecoderStack(tiny_model(family))
    for number, parameter in enumerate(stack.model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    assert len(set(flags(stack))) == 2
    return stack


def check_untouched(stack: DecoderStack, heads: FittedHeads, **settings: Any) -> None:
    """Raise AssertionError if distillation changes the model or the given heads."""
    model = (weights_hash(stack), flags(stack), state_of(stack))
    before = {layer: [part.clone() for part in pair] for layer, pair in heads.weights.items()}
    provenance = heads.provenance
    try:
        distill(stack, heads, some_blocks(40), **settings)
    finally:
        assert (weights_hash(stack), flags(stack), state_of(stack)) == model
        assert all(parameter.grad is None for parameter in stack.model.parameters())
        for layer, pair in heads.weights.items():
            assert all(map(torch.equal, pair, before[layer]))
            assert not any(part.requires_grad for part in pair)
        assert heads.provenance == provenance


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_distilling_does_not_change_model(family: str) -> None:
    stack = with_mixed_flags(family)
    heads = fit_heads(stack, some_blocks(40), EXITS)
    check_untouched(stack, heads, epochs=2)
    with torch.no_grad():
        check_untouched(stack, heads, epochs=1)


class StoppedError(Exception):
    pass


def test_distilling_restores_model_after_exception() -> None:
    stack = with_mixed_flags()
    heads = fit_heads(stack, some_blocks(40), EXITS)

    def stop(_: Any) -> None:
        assert not any(flags(stack)), "gradients are computed for the model's weights"
        raise StoppedError

    with pytest.raises(StoppedError):
        check_untouched(stack, heads, progress=stop)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise StoppedError

    handle = stack.layers[2].register_forward_hook(fail)
    try:
        with pytest.raises(StoppedError):
            check_untouched(stack, heads, batch_size=4)
    finally:
        handle.remove()
    assert calls == [1] * 3


def test_distilled_heads_keep_maps_and_record_distillation(tmp_path: Any) -> None:
    heads = distilled()
    for layer in EXITS:
        assert all(map(torch.equal, heads.maps[layer], closed_form().maps[layer]))
    distillation = known(heads.provenance.distillation)
    assert distillation is not None
    got = (distillation.epochs, distillation.learning_rate, distillation.seed)
    assert got == (EPOCHS, 1e-3, 0)
    assert replace(heads.provenance, distillation=UNSET) == closed_form().provenance
    heads.save(tmp_path / "heads.safetensors")
    loaded = load_heads(tmp_path / "heads.safetensors", sharp_stack())
    assert loaded.provenance == heads.provenance
    assert torch.equal(loaded.weights[1][0], heads.weights[1][0])
    assert not any(part.requires_grad for part in heads.weights[1])


def test_progress_counts_every_training_token() -> None:
    counts: list[int] = []
    distill(sharp_stack(), closed_form(), some_blocks(40), epochs=2, progress=counts.append)
    assert sum(counts) == 2 * 36 * 15


def test_distilling_bfloat16_model() -> None:
    stack = DecoderStack(tiny_model("llama").bfloat16())
    heads = fit_heads(stack, some_blocks(40), [2])
    learnt = distill(stack, heads, some_blocks(40), epochs=1)
    assert learnt.weights[2][0].dtype == torch.float32
    assert all(math.isfinite(loss) for loss in losses_of(learnt)[2])


# --- Invalid arguments -----------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [1, 9])
def test_fewer_than_ten_sequences_are_rejected(sequences: int) -> None:
    with pytest.raises(CorpusError) as error:
        distill(sharp_stack(), closed_form(), some_blocks(sequences))
    assert one_line(error) == (
        "expected at least 10 sequences, one of them to validate distilled heads on, got "
        f"{sequences}; use a larger corpus"
    )


def test_distilling_accepts_ten_sequences() -> None:
    heads = distill(sharp_stack(), closed_form(), some_blocks(10), epochs=1)
    assert all(len(losses) == 2 for losses in losses_of(heads).values())


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"epochs": -1}, {"learning_rate": 0.0}])
def test_invalid_epochs_and_learning_rates_are_rejected(settings: dict[str, Any]) -> None:
    for wrong in (settings, settings | {"learning_rate": -1e-3}, {"learning_rate": math.nan}):
        with pytest.raises(UsageError) as error:
            distill(sharp_stack(), closed_form(), some_blocks(), **wrong)
        assert one_line(error) == (
            "expected at least one epoch and a positive learning rate, got "
            f"{wrong.get('epochs', 3)} and {wrong.get('learning_rate', 1e-3)}"
        )


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_seed_out_of_range_is_rejected(seed: int) -> None:
    with pytest.raises(UsageError) as error:
        distill(sharp_stack(), closed_form(), some_blocks(), seed=seed)
    assert one_line(error) == f"expected a seed in 0..{2**63 - 1}, got {seed}"


def test_heads_of_another_model_are_rejected() -> None:
    stack = DecoderStack(tiny_model("llama"), provenance={"weights_hash": "sha256:other"})
    with pytest.raises(ModelError, match=r"is llama \(weights_hash sha256:other\)"):
        distill(stack, closed_form(), some_blocks())


@pytest.mark.parametrize(
    ("ids", "batch_size", "message"),
    [
        (np.full((20, 65), 5), 8, "sequences of 65 tokens exceed the model's 64 positions"),
        (np.full((20, 8), 97), 8, "the tokenizer gave token id 97"),
        (np.full((20, 8), 5), 0, "expected --batch-size of at least 1, got 0"),
    ],
)
def test_unreadable_corpus_is_rejected(ids: Any, batch_size: int, message: str) -> None:
    blocks = TokenBlocks(ids.astype(np.int32), "other", "other", 20)
    with pytest.raises(CascadeError, match=message):
        distill(sharp_stack(), closed_form(), blocks, batch_size=batch_size)
