"""Decoder stacks compute the same bits as their model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.stacks import (
    AFTER_THE_HEAD,
    ALL_FAMILIES,
    LAYERS,
    a_stack,
    check_capture_contract,
    difference,
    differences,
    final_norm_of,
    layers_of,
    logits_of,
    own_run,
    raw_logits,
    refuse_to_run,
    stepped,
    visited,
)
from support.tiny_models import WIDTH, random_ids, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache

from cascade.core.schema import to_plain
from cascade.models.stack import DecoderStack


@ALL_FAMILIES
def test_entries_are_layer_outputs_and_entry_n_is_before_the_final_norm(family: str) -> None:
    check_capture_contract(a_stack(family))


class ReadsEntryNBehindTheNorm(DecoderStack):
    def visit(self, input_ids: Tensor, visitor: Callable[[int, Tensor], None]) -> Tensor | None:
        def wrong(entry: int, hidden: Tensor) -> None:
            norm = final_norm_of(self.model)
            visitor(entry, norm(hidden) if entry == self.num_layers else hidden)

        return super().visit(input_ids, wrong)


class ShowsEveryLayersInput(DecoderStack):
    def visit(self, input_ids: Tensor, visitor: Callable[[int, Tensor], None]) -> Tensor | None:
        seen: list[Tensor] = []

        def wrong(entry: int, hidden: Tensor) -> None:
            seen.append(hidden)
            visitor(entry, seen[max(0, entry - 1)])

        return super().visit(input_ids, wrong)


class ReturnsTheResidualStream(DecoderStack):
    def visit(self, input_ids: Tensor, visitor: Callable[[int, Tensor], None]) -> Tensor | None:
        seen: list[Tensor] = []

        def keeping(entry: int, hidden: Tensor) -> None:
            seen.append(hidden)
            visitor(entry, hidden)

        super().visit(input_ids, keeping)
        return seen[-1]


class NormsTwice(DecoderStack):
    def decode(self, hidden: Tensor) -> Tensor:
        return super().decode(final_norm_of(self.model)(hidden))


class SkipsTheNorm(DecoderStack):
    def decode(self, hidden: Tensor) -> Tensor:
        return logits_of(self.model, hidden)


class OmitsSoftCappingAndScaling(DecoderStack):
    def decode(self, hidden: Tensor) -> Tensor:
        return raw_logits(self.model, final_norm_of(self.model)(hidden))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ReadsEntryNBehindTheNorm, "entry 4 is not layer 4's"),
        (ShowsEveryLayersInput, "entry 1 is not layer 1's"),
        (ReturnsTheResidualStream, "the returned state is not the normed one"),
        (NormsTwice, "decode is not the model's"),
        (SkipsTheNorm, "decode is not the model's"),
    ],
)
@ALL_FAMILIES
def test_contract_check_catches_planted_bugs(
    family: str, wrong: type[DecoderStack], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_capture_contract(wrong(a_stack(family).model))


@pytest.mark.parametrize("family", AFTER_THE_HEAD)
def test_contract_check_catches_missing_soft_capping_and_scaling(family: str) -> None:
    with pytest.raises(AssertionError, match="decode is not the model's"):
        check_capture_contract(OmitsSoftCappingAndScaling(a_stack(family).model))


@ALL_FAMILIES
def test_steps_give_the_same_history_as_one_pass(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    history, _ = visited(stack, ids)
    own = own_run(stack.model, ids)
    steps = stepped(stack, stack.plan(ids))
    assert differences(steps, history) == [0.0] * (LAYERS + 1)
    assert differences(steps[:-1], list(own.hidden_states[:-1])) == [0.0] * LAYERS
    assert difference(stack.decode(steps[-1]), own.logits) == 0.0


@ALL_FAMILIES
def test_every_layer_changes_the_stream(family: str) -> None:
    history, _ = visited(a_stack(family), random_ids())
    for layer in range(1, LAYERS + 1):
        assert difference(history[layer], history[layer - 1]) > 0.1


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (2, 64)])
@ALL_FAMILIES
def test_decode_applies_norm_and_head_to_any_states(family: str, batch: int, length: int) -> None:
    stack = a_stack(family)
    generator = torch.Generator().manual_seed(batch)
    hidden = 5 * torch.randn((batch, length, WIDTH), generator=generator)
    with torch.no_grad():
        expected = logits_of(stack.model, final_norm_of(stack.model)(hidden))
    assert difference(stack.decode(hidden), expected) == 0.0


@pytest.mark.parametrize("family", AFTER_THE_HEAD)
def test_soft_capping_and_scaling_change_the_logits(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    history, normed = visited(stack, ids)
    assert normed is not None
    assert difference(stack.decode(history[-1]), raw_logits(stack.model, normed)) > 0.1


@ALL_FAMILIES
def test_plan_computes_no_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = a_stack(family)
    for layer in stack.layers:
        for child in layer.children():
            monkeypatch.setattr(child, "forward", refuse_to_run)
    plan = stack.plan(random_ids())
    assert len(plan.calls) == LAYERS
    with pytest.raises(AssertionError, match="must not run"):
        stack.step(1, plan.embedded, plan.calls[0])


@pytest.mark.parametrize("padded", [False, True], ids=["without_mask", "left_padded"])
@ALL_FAMILIES
def test_steps_fill_a_cache_like_the_model(family: str, padded: bool) -> None:
    stack, ids = a_stack(family), random_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # the first row is three tokens shorter, padded on the left
    ours, theirs = (DynamicCache(config=stack.model.config) for _ in range(2))
    for start, end in ((0, 8), (8, 12)):
        masked: dict[str, Any] = {"attention_mask": mask[:, :end]} if padded else {}
        part = ids[:, start:end]
        own = own_run(stack.model, part, past_key_values=theirs, use_cache=True, **masked)
        history = stepped(stack, stack.plan(part, cache=ours, **masked))
        assert differences(history[:-1], list(own.hidden_states[:-1])) == [0.0] * LAYERS
        assert difference(stack.decode(history[-1]), own.logits) == 0.0
        assert ours.get_seq_length() == theirs.get_seq_length() == end
    assert len(ours.layers) == len(theirs.layers) == LAYERS
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert difference(one.keys, other.keys) == 0.0
        assert difference(one.values, other.values) == 0.0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
def test_cache_and_mask_change_the_result(
    family: str,
) -> None:
    stack, ids = a_stack(family), random_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole = stepped(stack, stack.plan(ids))[-1]
    padded = stepped(stack, stack.plan(ids, attention_mask=mask))[-1]
    forgetful = stepped(stack, stack.plan(ids[:, 8:]))[-1]
    assert difference(whole[0, 3:], padded[0, 3:]) > 1e-3
    assert difference(whole[:, 8:], forgetful) > 1e-3


@pytest.mark.parametrize("layer", [-1, 0, LAYERS + 1])
def test_step_rejects_a_layer_outside_the_stack(layer: int) -> None:
    stack = a_stack("llama")
    plan = stack.plan(random_ids())
    with pytest.raises(ValueError, match=rf"^expected a layer in 1\.\.4, got {layer}$"):
        stack.step(layer, plan.embedded, plan.calls[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "cohere"])
def test_bfloat16_is_exact(family: str) -> None:
    stack = DecoderStack(tiny_model(family).to(torch.bfloat16))
    assert stack.dtype == torch.bfloat16
    assert stack.provenance.dtype == "bfloat16"
    check_capture_contract(stack)
    ids = random_ids()
    assert differences(stepped(stack, stack.plan(ids)), visited(stack, ids)[0]) == [0.0] * 5


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_eager_attention_is_exact(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    stack, ids = DecoderStack(model), random_ids()
    assert stack.provenance.attention == "eager"
    check_capture_contract(stack)
    assert differences(stepped(stack, stack.plan(ids)), visited(stack, ids)[0]) == [0.0] * 5


def own_positions(family: str, positions: Tensor) -> dict[str, Tensor]:
    """Return the arguments of the model's forward; BLOOM derives positions from its mask."""
    return {} if family == "bloom" else {"position_ids": positions}


@ALL_FAMILIES
def test_plan_uses_position_ids_like_the_model(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = (mask.cumsum(dim=1) - 1).clamp_min(0)
    spread = 3 * torch.arange(12).expand_as(ids)
    # Without a mask `transformers` interprets gaps between positions as packed sequences.
    for positions, seen in ((padded, mask), (spread, torch.ones_like(ids))):
        own = own_run(stack.model, ids, attention_mask=seen, **own_positions(family, positions))
        steps = stepped(stack, stack.plan(ids, attention_mask=seen, position_ids=positions))
        assert differences(steps[:-1], list(own.hidden_states[:-1])) == [0.0] * LAYERS
        assert difference(stack.decode(steps[-1]), own.logits) == 0.0
    plain = stepped(stack, stack.plan(ids))
    if family == "bloom":
        assert difference(steps[-1], plain[-1]) == 0.0
    else:
        assert difference(steps[-1], plain[-1]) > 1e-3, "lost positions would not be noticed"


@ALL_FAMILIES
def test_plan_uses_position_ids_with_a_cache(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    positions = 2 * torch.arange(12).expand_as(ids)
    ours, theirs = (DynamicCache(config=stack.model.config) for _ in range(2))
    for start, end in ((0, 8), (8, 9), (9, 12)):
        part, at = ids[:, start:end], positions[:, start:end]
        own = own_run(
            stack.model, part, past_key_values=theirs, use_cache=True, **own_positions(family, at)
        )
        steps = stepped(stack, stack.plan(part, position_ids=at, cache=ours))
        assert differences(steps[:-1], list(own.hidden_states[:-1])) == [0.0] * LAYERS


def test_position_ids_are_dropped_for_a_model_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, ids = a_stack("bloom"), random_ids()
    forward = stack.decoder.forward

    def strict(**kwargs: Any) -> Any:
        assert "position_ids" not in kwargs
        return forward(**kwargs)

    monkeypatch.setattr(stack.decoder, "forward", strict)
    assert len(stack.plan(ids, position_ids=torch.zeros_like(ids)).calls) == LAYERS


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_consecutive_position_ids_equal_the_default(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    counted = stepped(stack, stack.plan(ids, position_ids=torch.arange(12).expand_as(ids)))
    assert differences(counted, stepped(stack, stack.plan(ids))) == [0.0] * (LAYERS + 1)


@ALL_FAMILIES
def test_visit_runs_no_lm_head_and_creates_no_cache(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, ids = a_stack(family), random_ids()
    monkeypatch.setattr(stack.model.get_output_embeddings(), "forward", refuse_to_run)
    with pytest.raises(AssertionError, match="must not run"):
        own_run(stack.model, ids)
    monkeypatch.setattr(DynamicCache, "__init__", refuse_to_run)
    with pytest.raises(AssertionError, match="must not run"):
        stack.decoder(input_ids=ids, use_cache=True)
    assert len(visited(stack, ids)[0]) == LAYERS + 1
    assert len(stack.plan(ids).calls) == LAYERS


@ALL_FAMILIES
def test_visit_keeps_no_entries(family: str) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def visitor(entry: int, hidden: Tensor) -> None:
        # The model's own forward holds the embeddings and the input of the current layer.
        assert [ref() for ref in seen[1 : entry - 1]] == [None] * max(0, entry - 2)
        seen.append(weakref.ref(hidden))

    a_stack(family).visit(random_ids(), visitor)
    assert len(seen) == LAYERS + 1


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_return_value_of_the_visitor_is_ignored(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    history, normed = visited(stack, ids)
    again: list[Tensor] = []

    def careless(_: int, hidden: Tensor) -> Any:
        again.append(hidden)
        return 2 * hidden

    other = stack.visit(ids, careless)
    assert other is not None
    assert normed is not None
    assert differences([*again, other], [*history, normed]) == [0.0] * (LAYERS + 2)


def test_results_require_no_gradient() -> None:
    stack, ids = a_stack("llama"), random_ids()
    history, normed = visited(stack, ids)
    steps = stepped(stack, stack.plan(ids))
    assert normed is not None
    assert not any(one.requires_grad for one in (*history, *steps, normed, stack.decode(steps[-1])))


def test_model_is_set_to_evaluation_mode() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    with torch.no_grad():
        assert difference(model(random_ids()).logits, model(random_ids()).logits) > 0.1
    check_capture_contract(DecoderStack(model))
    assert not any(module.training for module in model.modules())


@ALL_FAMILIES
def test_attributes_of_a_stack(family: str) -> None:
    stack = a_stack(family)
    assert stack.layers is layers_of(stack.model)
    assert (stack.num_layers, stack.hidden_size, stack.vocab_size) == (LAYERS, WIDTH, 97)
    assert stack.has_final_norm
    assert stack.layer_labels == ["1", "2", "3", "4", "4+norm"]
    # ALiBi has no limit; Falcon's default is 2,048.
    assert stack.max_positions == {"bloom": None, "falcon": 2048}.get(family, 64)
    assert to_plain(stack.provenance) == {
        "family": family,
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "dtype": "float32",
        "device": "cpu",
        "attention": stack.model.config._attn_implementation,
    }


@pytest.mark.parametrize("width", [16, WIDTH], ids=["projected", "same_width"])
def test_model_without_final_norm_has_no_norm_row(width: int) -> None:
    # OPT-350m has post-norm layers and projects from and to narrower embeddings.
    model = tiny_model("opt", do_layer_norm_before=False, word_embed_proj_dim=width)
    stack, ids = DecoderStack(model), random_ids()
    own = own_run(model, ids)
    history, normed = visited(stack, ids)
    assert own.hidden_states[-1].shape[-1] == width
    assert stack.layer_labels == ["1", "2", "3", "4"]
    assert normed is None
    assert differences(history[:-1], list(own.hidden_states[:-1])) == [0.0] * LAYERS
    assert differences(stepped(stack, stack.plan(ids)), history) == [0.0] * (LAYERS + 1)
    assert difference(stack.decode(history[-1]), own.logits) == 0.0


def test_other_list_of_the_same_length_is_not_mistaken_for_the_layers() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    del model.model.layers
    model.model.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))
    model.model.layers = layers
    assert [name for name, _ in model.model.named_children()][-2:] == ["adapters", "layers"]
    assert DecoderStack(model).layers is layers


@pytest.mark.saturation
def test_steps_of_the_reference_model_are_exact(reference_model: DecoderStack) -> None:
    stack = reference_model
    assert stack.tokenizer is not None
    text = "Early exit asks of every token how many layers it needs. " * 8
    ids = torch.tensor([stack.tokenizer(text).input_ids[:64]])
    assert ids.shape == (1, 64)
    own = own_run(stack.model, ids)
    history, normed = visited(stack, ids)
    steps = stepped(stack, stack.plan(ids))
    assert normed is not None
    assert stack.num_layers == 30
    assert stack.layer_labels[-2:] == ["30", "30+norm"]
    assert differences(steps, history) == [0.0] * 31
    assert differences([*history[:-1], normed], list(own.hidden_states)) == [0.0] * 31
    assert difference(stack.decode(steps[-1]), own.logits) == 0.0
    assert stack.provenance.quantization == "Q4_1"
    assert stack.provenance.name == "smollm2-135m-instruct-q4_1"
    assert stack.provenance.weights_hash.startswith("sha256:b179c9523d0e6a0f98a330c7562b6827")


def test_repr_is_one_readable_line() -> None:
    assert repr(a_stack("llama")) == "<DecoderStack: llama, 4 layers, float32 on cpu>"
