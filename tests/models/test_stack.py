"""Decoder stacks compute what their model computes, bit by bit, and refuse what they cannot."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import FAMILIES, WIDTH, random_ids, save_checkpoint, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from cascade.core.errors import CascadeError, DeviceError, ModelError, UnsupportedModelError
from cascade.core.schema import UNSET, to_plain
from cascade.models.architecture import check_config
from cascade.models.loading import load, resolve_device
from cascade.models.stack import DecoderStack, Plan

ALL_FAMILIES = pytest.mark.parametrize("family", FAMILIES)
LAYERS = 4

#: Where each family keeps its decoder layers and its final norm: what `DecoderStack` finds out.
ANATOMY = {
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "opt": ("model.decoder.layers", "model.decoder.final_layer_norm"),
} | dict.fromkeys(
    ("gpt2", "gpt_neo", "gptj", "bloom", "falcon"), ("transformer.h", "transformer.ln_f")
)
LLAMA_ANATOMY = ("model.layers", "model.norm")

#: What each family does to the LM head's output, by its paper, with the settings of FAMILIES.
AFTER_THE_HEAD: dict[str, Callable[[Tensor], Tensor]] = {
    "gemma2": lambda raw: torch.tanh(raw / 3.0) * 3.0,
    "gemma3_text": lambda raw: torch.tanh(raw / 3.0) * 3.0,
    "granite": lambda raw: raw / 2.0,
    "cohere": lambda raw: raw * 0.25,
}


@functools.cache
def a_stack(family: str) -> DecoderStack:
    """Return one stack per family, made once; for tests that leave it as it is."""
    return DecoderStack(tiny_model(family))


def layers_of(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(ANATOMY.get(model.config.model_type, LLAMA_ANATOMY)[0])


def final_norm_of(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(ANATOMY.get(model.config.model_type, LLAMA_ANATOMY)[1])


@torch.no_grad()
def raw_logits(model: PreTrainedModel, normed: Tensor) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(normed)
    return logits


def logits_of(model: PreTrainedModel, normed: Tensor) -> Tensor:
    change = AFTER_THE_HEAD.get(model.config.model_type, lambda raw: raw)
    return change(raw_logits(model, normed))


def visited(stack: DecoderStack, ids: Tensor) -> tuple[list[Tensor], Tensor | None]:
    history: dict[int, Tensor] = {}
    normed = stack.visit(ids, history.__setitem__)
    assert list(history) == list(range(stack.num_layers + 1))
    return list(history.values()), normed


def stepped(stack: DecoderStack, plan: Plan) -> list[Tensor]:
    history = [plan.embedded]
    for layer, call in enumerate(plan.calls, start=1):
        history.append(stack.step(layer, history[-1], call))
    return history


@torch.no_grad()
def own_run(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Any:
    """Run the model as its users do, without anything of ours."""
    kwargs.setdefault("use_cache", False)
    return model(input_ids=ids, output_hidden_states=True, **kwargs)


def difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference; NaN where there is a NaN, so never 0 then."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    return (got - expected).abs().max().item()


def differences(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [difference(one, other) for one, other in zip(got, expected, strict=True)]


def one_line(error: pytest.ExceptionInfo[CascadeError]) -> str:
    """Return a refusal's text, which a user must be able to read as one line."""
    text = str(error.value)
    assert text == text.strip()
    assert "\n" not in text
    return text


# --- What is captured ------------------------------------------------------------------------


@torch.no_grad()
def check_capture_contract(stack: DecoderStack) -> None:
    """Raise AssertionError unless history and logits are those that the model's modules make.

    The truth comes from hooks of our own on modules named by ANATOMY, from the model's
    `output_hidden_states`, and from its logits; from nothing that the stack has found out.
    """
    model, ids = stack.model, random_ids()
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers_of(model)]
    own = own_run(model, ids)
    for handle in handles:
        handle.remove()

    history, normed = visited(stack, ids)
    assert len(history) == len(outputs) + 1 == LAYERS + 1
    assert difference(history[0], inputs[0]) == 0.0, "entry 0 is not what enters layer 1"
    for layer, output in enumerate(outputs, start=1):
        assert difference(history[layer], output) == 0.0, f"entry {layer} is not layer {layer}'s"
    assert differences(history[:-1], list(own.hidden_states[:-1])) == [0.0] * LAYERS

    last = own.hidden_states[-1]
    assert difference(final_norm_of(model)(history[-1]), last) == 0.0, "entry N is not before norm"
    assert normed is not None
    assert difference(normed, last) == 0.0, "the returned state is not the normed one"
    assert difference(history[-1], last) > 0.1, "entry N is the normed state"

    assert difference(logits_of(model, normed), own.logits) == 0.0
    assert difference(stack.decode(history[-1]), own.logits) == 0.0, "decode is not the model's"


@ALL_FAMILIES
def test_entry_n_is_before_the_final_norm_and_every_entry_is_its_layers(family: str) -> None:
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


class ForgetsWhatFollowsTheHead(DecoderStack):
    def decode(self, hidden: Tensor) -> Tensor:
        return raw_logits(self.model, final_norm_of(self.model)(hidden))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (ReadsEntryNBehindTheNorm, "entry 4 is not layer 4's"),
        (ShowsEveryLayersInput, "entry 1 is not layer 1's"),
        (ReturnsTheResidualStream, "the returned state is not the normed one"),
        (NormsTwice, "decode is not the model's"),
        (SkipsTheNorm, "decode is not the model's"),
    ],
)
@ALL_FAMILIES
def test_the_contract_catches_a_planted_bug(
    family: str, wrong: type[DecoderStack], said: str
) -> None:
    with pytest.raises(AssertionError, match=said):
        check_capture_contract(wrong(a_stack(family).model))


@pytest.mark.parametrize("family", AFTER_THE_HEAD)
def test_the_contract_catches_forgotten_soft_capping_and_scaling(family: str) -> None:
    with pytest.raises(AssertionError, match="decode is not the model's"):
        check_capture_contract(ForgetsWhatFollowsTheHead(a_stack(family).model))


# --- Plan, step, decode ----------------------------------------------------------------------


@ALL_FAMILIES
def test_steps_make_the_history_of_one_pass(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    history, _ = visited(stack, ids)
    own = own_run(stack.model, ids)
    steps = stepped(stack, stack.plan(ids))
    assert differences(steps, history) == [0.0] * (LAYERS + 1)
    assert differences(steps[:-1], list(own.hidden_states[:-1])) == [0.0] * LAYERS
    assert difference(stack.decode(steps[-1]), own.logits) == 0.0


@ALL_FAMILIES
def test_every_layer_changes_the_stream_so_that_a_missing_one_would_show(family: str) -> None:
    history, _ = visited(a_stack(family), random_ids())
    for layer in range(1, LAYERS + 1):
        assert difference(history[layer], history[layer - 1]) > 0.1


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (2, 64)])
@ALL_FAMILIES
def test_any_hidden_states_decode_as_norm_and_head_would(
    family: str, batch: int, length: int
) -> None:
    stack = a_stack(family)
    generator = torch.Generator().manual_seed(batch)
    hidden = 5 * torch.randn((batch, length, WIDTH), generator=generator)
    with torch.no_grad():
        expected = logits_of(stack.model, final_norm_of(stack.model)(hidden))
    assert difference(stack.decode(hidden), expected) == 0.0


@pytest.mark.parametrize("family", AFTER_THE_HEAD)
def test_soft_capping_and_scaling_are_large_enough_to_be_seen(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    history, normed = visited(stack, ids)
    assert normed is not None
    assert difference(stack.decode(history[-1]), raw_logits(stack.model, normed)) > 0.1


@ALL_FAMILIES
def test_planning_computes_no_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_steps_fill_a_cache_as_the_model_itself_does(family: str, padded: bool) -> None:
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
def test_the_cache_and_the_mask_change_the_result_so_that_losing_them_would_show(
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
def test_a_layer_outside_the_stack_is_refused(layer: int) -> None:
    stack = a_stack("llama")
    plan = stack.plan(random_ids())
    with pytest.raises(ValueError, match=rf"^expected a layer in 1\.\.4, got {layer}$"):
        stack.step(layer, plan.embedded, plan.calls[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "cohere"])
def test_bfloat16_is_as_exact_as_fp32(family: str) -> None:
    stack = DecoderStack(tiny_model(family).to(torch.bfloat16))
    assert stack.dtype == torch.bfloat16
    assert stack.provenance.dtype == "bfloat16"
    check_capture_contract(stack)
    ids = random_ids()
    assert differences(stepped(stack, stack.plan(ids)), visited(stack, ids)[0]) == [0.0] * 5


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_eager_attention_is_exact_too(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    stack, ids = DecoderStack(model), random_ids()
    assert stack.provenance.attention == "eager"
    check_capture_contract(stack)
    assert differences(stepped(stack, stack.plan(ids)), visited(stack, ids)[0]) == [0.0] * 5


# --- Positions -------------------------------------------------------------------------------


def own_positions(family: str, positions: Tensor) -> dict[str, Tensor]:
    """Return the argument that the model's own run takes; BLOOM counts from its mask."""
    return {} if family == "bloom" else {"position_ids": positions}


@ALL_FAMILIES
def test_a_plan_takes_positions_as_the_model_itself_does(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = (mask.cumsum(dim=1) - 1).clamp_min(0)
    spread = 3 * torch.arange(12).expand_as(ids)
    # Without a mask `transformers` takes positions that jump for sequences packed into one row.
    for positions, seen in ((padded, mask), (spread, torch.ones_like(ids))):
        own = own_run(stack.model, ids, attention_mask=seen, **own_positions(family, positions))
        steps = stepped(stack, stack.plan(ids, attention_mask=seen, position_ids=positions))
        assert differences(steps[:-1], list(own.hidden_states[:-1])) == [0.0] * LAYERS
        assert difference(stack.decode(steps[-1]), own.logits) == 0.0
    plain = stepped(stack, stack.plan(ids))
    if family == "bloom":
        assert difference(steps[-1], plain[-1]) == 0.0
    else:
        assert difference(steps[-1], plain[-1]) > 1e-3, "positions that are lost would not show"


@ALL_FAMILIES
def test_a_plan_takes_positions_behind_a_cache_too(family: str) -> None:
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


def test_a_model_that_takes_no_positions_is_given_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, ids = a_stack("bloom"), random_ids()
    forward = stack.decoder.forward

    def strict(**kwargs: Any) -> Any:
        assert "position_ids" not in kwargs
        return forward(**kwargs)

    monkeypatch.setattr(stack.decoder, "forward", strict)
    assert len(stack.plan(ids, position_ids=torch.zeros_like(ids)).calls) == LAYERS


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_positions_that_only_count_are_those_of_a_plan_without(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    counted = stepped(stack, stack.plan(ids, position_ids=torch.arange(12).expand_as(ids)))
    assert differences(counted, stepped(stack, stack.plan(ids))) == [0.0] * (LAYERS + 1)


# --- Logits of normed states -----------------------------------------------------------------


@ALL_FAMILIES
def test_a_normed_state_decodes_to_the_models_own_logits(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    normed = visited(stack, ids)[1]
    assert normed is not None
    assert difference(stack.decode_normed(normed), own_run(stack.model, ids).logits) == 0.0


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (2, 64)])
@ALL_FAMILIES
def test_any_normed_states_go_through_the_head_and_what_follows_it_alone(
    family: str, batch: int, length: int
) -> None:
    stack = a_stack(family)
    generator = torch.Generator().manual_seed(batch)
    normed = 5 * torch.randn((batch, length, WIDTH), generator=generator)
    before = normed.clone()
    logits = stack.decode_normed(normed)
    assert difference(logits, logits_of(stack.model, normed)) == 0.0
    assert torch.equal(normed, before)
    assert difference(logits, stack.decode(normed)) > 0.1, "a norm more would not show"


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_decoding_normed_states_in_bfloat16_is_as_exact(family: str) -> None:
    stack, ids = DecoderStack(tiny_model(family).bfloat16()), random_ids()
    normed = visited(stack, ids)[1]
    assert normed is not None
    assert difference(stack.decode_normed(normed), own_run(stack.model, ids).logits) == 0.0


@ALL_FAMILIES
def test_gradients_pass_to_normed_states_where_they_ask_for_them(family: str) -> None:
    stack = a_stack(family)
    normed = torch.randn((2, 5, WIDTH), generator=torch.Generator().manual_seed(1))
    gradients: list[Tensor] = []
    for decode in (stack.decode_normed, functools.partial(differentiable_logits, stack.model)):
        asking = normed.clone().requires_grad_()
        logits = decode(asking)
        gradients += torch.autograd.grad(logits.square().sum(), asking)
    assert gradients[0].abs().max() > 0.1
    # Gradients of hundreds: 1e-6 of the largest, for another order of the same sums.
    assert difference(gradients[0], gradients[1]) <= 1e-6 * gradients[1].abs().max().item()
    assert not stack.decode_normed(normed).requires_grad
    with torch.no_grad():
        assert not stack.decode_normed(normed.clone().requires_grad_()).requires_grad
    assert torch.is_grad_enabled()


def differentiable_logits(model: PreTrainedModel, normed: Tensor) -> Tensor:
    change = AFTER_THE_HEAD.get(model.config.model_type, lambda raw: raw)
    head: nn.Module = model.get_output_embeddings()
    raw: Tensor = head(normed)
    return change(raw)


@ALL_FAMILIES
def test_decoding_computes_no_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = a_stack(family)
    for layer in stack.layers:
        for child in layer.children():
            monkeypatch.setattr(child, "forward", refuse_to_run)
    for decode in (stack.decode, stack.decode_normed):
        assert decode(torch.ones((2, 3, WIDTH))).shape == (2, 3, 97)


# --- What a visit costs, and what it leaves behind -------------------------------------------


def refuse_to_run(*_: Any, **__: Any) -> Any:
    raise AssertionError("this must not run")


@ALL_FAMILIES
def test_a_visit_runs_no_lm_head_and_makes_no_cache(
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
def test_a_visit_keeps_no_entry_that_the_visitor_let_go(family: str) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def visitor(entry: int, hidden: Tensor) -> None:
        # The embeddings and the running layer's input are held by the model's own forward.
        assert [ref() for ref in seen[1 : entry - 1]] == [None] * max(0, entry - 2)
        seen.append(weakref.ref(hidden))

    a_stack(family).visit(random_ids(), visitor)
    assert len(seen) == LAYERS + 1


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_what_a_visitor_returns_changes_nothing(family: str) -> None:
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


def test_no_result_carries_a_gradient() -> None:
    stack, ids = a_stack("llama"), random_ids()
    history, normed = visited(stack, ids)
    steps = stepped(stack, stack.plan(ids))
    assert normed is not None
    assert not any(one.requires_grad for one in (*history, *steps, normed, stack.decode(steps[-1])))


def test_a_model_in_training_mode_is_put_into_evaluation_mode() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    with torch.no_grad():
        assert difference(model(random_ids()).logits, model(random_ids()).logits) > 0.1
    check_capture_contract(DecoderStack(model))
    assert not any(module.training for module in model.modules())


def state_of(stack: DecoderStack) -> list[dict[str, Any]]:
    """Return all that replacing and hooking a layer could have left behind."""
    return [
        {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(layer).items()
            if name == "forward" or "hook" in name
        }
        for layer in (*stack.layers, stack.lm_head)
    ]


OPERATIONS: dict[str, Callable[[DecoderStack], Any]] = {
    "visit": lambda stack: stack.visit(random_ids(), lambda entry, hidden: None),
    "plan": lambda stack: stack.plan(random_ids()),
    "decode": lambda stack: stack.decode(torch.ones((2, 3, WIDTH))),
    "decode_normed": lambda stack: stack.decode_normed(torch.ones((2, 3, WIDTH))),
}


def check_it_leaves_no_trace(stack: DecoderStack, operation: str) -> None:
    """Raise AssertionError unless the model is as before, whether or not a part of it raises."""
    logits = own_run(stack.model, random_ids()).logits
    before = state_of(stack)
    OPERATIONS[operation](stack)
    assert state_of(stack) == before
    # Decoding may leave the layers alone, but not the LM head.
    part = stack.lm_head if "decode" in operation else stack.layers[2]
    handle = part.register_forward_pre_hook(refuse_to_run)
    try:
        before = state_of(stack)
        with pytest.raises(AssertionError, match="must not run"):
            OPERATIONS[operation](stack)
        assert state_of(stack) == before
    finally:
        handle.remove()
    assert difference(own_run(stack.model, random_ids()).logits, logits) == 0.0


@pytest.mark.parametrize("operation", OPERATIONS)
@ALL_FAMILIES
def test_the_model_is_left_as_it_was_also_when_something_raises(
    family: str, operation: str
) -> None:
    check_it_leaves_no_trace(a_stack(family), operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_forward_that_a_library_has_set_is_left_in_its_place(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = a_stack("llama")
    for layer in (stack.layers[1], stack.layers[2]):  # as accelerate does, here to two of four
        forward = functools.partial(type(layer).forward, layer)
        monkeypatch.setitem(vars(layer), "forward", forward)
    check_it_leaves_no_trace(stack, operation)


def test_a_visitor_that_raises_leaves_no_hook() -> None:
    stack = a_stack("llama")
    before = state_of(stack)
    with pytest.raises(AssertionError, match="must not run"):
        stack.visit(random_ids(), refuse_to_run)
    assert state_of(stack) == before


def test_a_forward_that_a_library_has_set_is_what_a_step_calls() -> None:
    stack = DecoderStack(tiny_model("llama"))
    layer, calls = stack.layers[1], []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = counting
    plan = stack.plan(random_ids())
    stack.decode(plan.embedded)
    assert calls == []
    stepped(stack, plan)
    assert calls == [0]


def test_a_hook_that_a_library_has_set_is_heard_by_a_step_as_by_the_model() -> None:
    stack, ids = DecoderStack(tiny_model("llama")), random_ids()
    before = own_run(stack.model, ids).logits
    stack.layers[1].register_forward_hook(lambda _, args, output: 1.5 * output)
    after = own_run(stack.model, ids).logits
    assert difference(after, before) > 1e-3
    plan = stack.plan(ids)
    assert difference(plan.embedded, stack.model.get_input_embeddings()(ids)) == 0.0
    history = stepped(stack, plan)
    assert difference(history[2], visited(stack, ids)[0][2]) == 0.0


# --- What a stack says of itself -------------------------------------------------------------


@ALL_FAMILIES
def test_a_stack_knows_its_layers_by_number_and_its_norm_by_name(family: str) -> None:
    stack = a_stack(family)
    assert stack.layers is layers_of(stack.model)
    assert (stack.num_layers, stack.hidden_size, stack.vocab_size) == (LAYERS, WIDTH, 97)
    assert stack.has_final_norm
    assert stack.layer_labels == ["1", "2", "3", "4", "4+norm"]
    # ALiBi has no last position; falcon's default is 2,048.
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
def test_a_model_without_a_final_norm_has_no_norm_row(width: int) -> None:
    # OPT-350m's shape: post-norm layers, and a projection to narrower embeddings and back.
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


def test_a_list_as_long_as_the_layers_is_not_taken_for_them() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    del model.model.layers
    model.model.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))
    model.model.layers = layers
    assert [name for name, _ in model.model.named_children()][-2:] == ["adapters", "layers"]
    assert DecoderStack(model).layers is layers


# --- Refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mamba", "linear_attention"),
        ("mamba2", "linear_attention"),
        ("rwkv", "a recurrent state"),
        ("jamba", "linear_attention"),
        ("recurrent_gemma", "linear_attention"),
        ("qwen3_next", "linear_attention"),
        ("lfm2", "conv"),
    ],
)
def test_recurrent_layers_are_refused_by_name(family: str, kind: str) -> None:
    settings = {"layer_types": ["conv", "full_attention"] * 16} if family == "lfm2" else {}
    with pytest.raises(UnsupportedModelError) as error:
        check_config(AutoConfig.for_model(family, **settings))
    assert one_line(error).startswith(f"{family} has recurrent layers ({kind}): ")
    assert "expected attention in every layer" in str(error.value)


def test_one_recurrent_layer_among_others_is_enough_to_refuse() -> None:
    types = ["full_attention"] * 4
    config = AutoConfig.for_model("qwen3", num_hidden_layers=4, layer_types=types)
    check_config(config)
    config.layer_types = [*types[:2], "linear_attention", types[3]]
    with pytest.raises(UnsupportedModelError, match=r"qwen3 has recurrent layers \(linear_att"):
        check_config(config)


def test_a_recurrent_model_is_refused_before_anything_of_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = AutoConfig.for_model(
        "mamba", hidden_size=WIDTH, num_hidden_layers=2, vocab_size=97, state_size=4
    )
    model = AutoModelForCausalLM.from_config(config)
    monkeypatch.setattr(type(model), "forward", refuse_to_run)
    with pytest.raises(UnsupportedModelError, match="mamba has recurrent layers"):
        DecoderStack(model)


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        check_config(AutoConfig.for_model("t5"))
    assert one_line(error) == (
        "t5 is an encoder-decoder; expected a decoder-only causal language model"
    )


def test_a_family_without_a_causal_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        check_config(AutoConfig.for_model("distilbert"))
    assert one_line(error).startswith("distilbert is not a causal language model")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 48}),
        ("roberta", {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 48}),
        ("xlm", {"emb_dim": WIDTH, "n_heads": 4}),
    ],
)
def test_a_model_that_looks_ahead_is_refused(family: str, settings: dict[str, Any]) -> None:
    config = AutoConfig.for_model(
        family, num_hidden_layers=2, vocab_size=97, pad_token_id=1, **settings
    )
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(AutoModelForCausalLM.from_config(config))
    assert one_line(error).startswith(f"the layers of {family} look ahead")


def test_the_same_bert_is_taken_when_it_is_a_decoder() -> None:
    config = AutoConfig.for_model(
        "bert",
        num_hidden_layers=2,
        vocab_size=97,
        is_decoder=True,
        hidden_size=WIDTH,
        num_attention_heads=4,
        intermediate_size=48,
    )
    assert DecoderStack(AutoModelForCausalLM.from_config(config)).layer_labels == ["1", "2"]


def test_a_model_whose_layers_cannot_be_found_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert one_line(error).startswith("llama has no list of 7 decoder layers; expected")


class WrongShape(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states[:, :1]


class NoTensor(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        return Stream(hidden_states)


class Stream(list[Tensor]):
    """What a layer might return that is neither a tensor nor a tuple."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__([hidden])

    def to(self, *_: Any) -> Stream:
        return self


def test_a_layer_that_returns_another_shape_is_refused_by_number() -> None:
    model = tiny_model("llama")
    model.model.layers[3] = WrongShape()
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert one_line(error) == (
        "decoder layer 4 of llama returns (2, 1, 32), expected hidden states (2, 3, 32)"
    )


def test_a_layer_that_returns_no_tensor_is_refused_by_number() -> None:
    model = tiny_model("llama")
    model.model.layers[3] = NoTensor()
    model.model.norm = nn.Identity()
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert one_line(error) == (
        "decoder layer 4 of llama returns Stream, expected hidden states (2, 3, 32)"
    )


def test_a_stack_that_runs_one_layer_twice_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert "ran 6 of its 4 decoder layers, expected each of them once" in one_line(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.2.mlp.up_proj.weight", "decoder layer 3"),
        ("model.layers.0.input_layernorm.weight", "decoder layer 1"),
        ("model.embed_tokens.weight", "outside the decoder layers"),
        ("model.norm.weight", "outside the decoder layers"),
        ("lm_head.weight", "outside the decoder layers"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(name: str, where: str, value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    with pytest.raises(ModelError) as error:
        DecoderStack(model)
    assert error.type is ModelError
    assert f"NaN or infinite values ({where}: {name})" in one_line(error)


def test_weights_that_float16_is_too_narrow_for_ask_for_a_wider_dtype() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = 1e5
    name = "model.layers.2.mlp.up_proj.weight"
    DecoderStack(model)
    with pytest.raises(ModelError) as error:
        DecoderStack(model.half())
    assert one_line(error) == (
        f"the weights are infinite in float16 (decoder layer 3: {name}), which holds numbers up to "
        "65504; use --dtype bfloat16 or float32"
    )
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="get the checkpoint again"):
        DecoderStack(model)


# --- Devices ---------------------------------------------------------------------------------


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_auto_is_the_processor_where_nothing_faster_is_at_hand(name: str) -> None:
    assert resolve_device(name, torch.bfloat16) == torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps")],
)
def test_auto_prefers_an_accelerator(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.device, torch.dtype]] = []
    ones = torch.ones

    def ones_here(*args: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        asked.append((device, dtype))
        return ones(*args, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "ones", ones_here)
    assert resolve_device("auto", torch.bfloat16) == torch.device(expected)
    assert asked == [(torch.device(expected), torch.bfloat16)]


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu cpu"])
def test_a_name_that_is_no_device_is_refused_with_the_names_that_are(name: str) -> None:
    with pytest.raises(DeviceError) as error:
        resolve_device(name, torch.float32)
    assert str(error.value) == f"expected a device among auto, cpu, got {name}"


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "meta"])
def test_an_absent_device_is_refused_with_what_is_there(name: str) -> None:
    with pytest.raises(DeviceError) as error:
        resolve_device(name, torch.float32)
    assert one_line(error) == f"no {name} device on this machine; use --device cpu"


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'\nand a stack of frames"),
        TypeError("BFloat16 is not supported on MPS"),
        RuntimeError(""),
    ],
)
def test_a_device_that_lacks_the_dtype_is_refused_with_both_names(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def matmul(*_: Any) -> Tensor:
        raise failure

    monkeypatch.setattr(Tensor, "__matmul__", matmul)
    with pytest.raises(DeviceError) as error:
        resolve_device("cpu", torch.float16)
    assert one_line(error).startswith("cpu cannot compute in float16 (")
    assert str(error.value).endswith("; use --dtype float32 or another --device")
    assert (str(failure).split("\n")[0] or "RuntimeError") in str(error.value)


# --- Loading ---------------------------------------------------------------------------------


@ALL_FAMILIES
def test_a_checkpoint_loads_as_the_model_that_was_saved(family: str, tmp_path: Path) -> None:
    loaded = load(str(save_checkpoint(tmp_path / family, family)))
    check_capture_contract(loaded)
    ids = random_ids()
    expected = own_run(a_stack(family).model, ids).logits
    assert difference(own_run(loaded.model, ids).logits, expected) == 0.0


def test_loading_records_where_the_weights_come_from(saved: Path) -> None:
    stack = load(str(saved), dtype="bfloat16")
    assert stack.dtype == torch.bfloat16
    assert stack.tokenizer is not None
    assert stack.tokenizer.convert_ids_to_tokens(stack.tokenizer("a b").input_ids) == [*"a b"]
    provenance = to_plain(stack.provenance)
    hashes = {provenance.pop("weights_hash"), provenance.pop("tokenizer_hash")}
    assert {name.split(":")[0] for name in hashes} == {"sha256"}
    assert len(hashes) == 2
    assert provenance == {
        "family": "llama",
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "dtype": "bfloat16",
        "device": "cpu",
        "attention": "sdpa",
        "source": str(saved),
        "name": "tiny",
        "revision": None,
        "quantization": None,
    }


def test_loaded_weights_are_known_by_their_file_and_not_read_again(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = load(str(saved))
    monkeypatch.setattr(type(stack.model), "state_dict", None)
    assert stack.weights_hash() == stack.provenance.weights_hash


@ALL_FAMILIES
def test_weights_in_memory_are_known_by_every_one_of_them(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    before = stack.weights_hash()
    assert before.startswith("in-memory-sha256:")
    assert before == DecoderStack(tiny_model(family)).weights_hash()
    assert before != DecoderStack(tiny_model(family, seed=1)).weights_hash()
    for parameter in stack.model.parameters():
        kept = parameter.data.flatten()[-1].item()
        parameter.data.view(-1)[-1] += 1e-3  # past what torch counts as a change
        assert stack.weights_hash() != before
        parameter.data.view(-1)[-1] = kept
    assert stack.weights_hash() == before
    own_run(stack.model, random_ids())
    assert stack.weights_hash() == before
    assert stack.provenance.weights_hash is UNSET


def test_weights_of_several_tensors_are_known_by_each() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    def hash_of(scales: float) -> str:
        stack = DecoderStack(tiny_model("llama"))
        weight = stack.lm_head.weight
        assert isinstance(weight, Tensor)
        both = TwoTensor(weight.detach(), torch.full_like(weight, scales))
        stack.lm_head.weight = nn.Parameter(both, requires_grad=False)
        return stack.weights_hash()

    assert hash_of(1.0) == hash_of(1.0)
    assert hash_of(1.0) != hash_of(2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_memory_of_any_dtype_have_a_hash_of_their_own(dtype: torch.dtype) -> None:
    hashes = {
        DecoderStack(tiny_model("llama").to(kind)).weights_hash() for kind in (dtype, torch.float32)
    }
    assert len(hashes) == 2


def test_another_tokenizer_has_another_hash(folder: Path) -> None:
    before = load(str(folder)).provenance
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    vocabulary = json.loads(text)
    tokens = vocabulary["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    after = load(str(folder)).provenance
    assert after["tokenizer_hash"] != before["tokenizer_hash"]
    assert after["weights_hash"] == before["weights_hash"]


def test_an_unknown_dtype_is_refused_with_the_known_ones(saved: Path) -> None:
    with pytest.raises(DeviceError) as error:
        load(str(saved), dtype="float8")
    assert one_line(error) == "expected --dtype among float32, bfloat16, float16, got float8"


def test_missing_weights_are_counted_and_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.2.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error) == (
        f"{folder} lacks 2 of its weights, model.layers.2.mlp.up_proj.weight first; "
        "get the checkpoint again"
    )


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(f"cannot read the weights of {folder}: ")


def test_a_weight_that_is_not_finite_is_refused_on_loading(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.3.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"decoder layer 4: model\.layers\.3\.self_attn\.q_proj"):
        load(str(folder))


@pytest.mark.parametrize("kept", [0, 7, 100, -1], ids=["empty", "no_header", "torn", "one_less"])
def test_truncated_weights_are_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(f"cannot read the weights of {folder}: ")
    assert str(error.value).endswith("; get the checkpoint again")


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    tiny = save_checkpoint(tmp_path / "sharded")
    (tiny / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(tiny, max_shard_size="40KB")
    shards = sorted(tiny.glob("*.safetensors"))
    assert len(shards) > 2
    load(str(tiny))
    shards[1].unlink()
    with pytest.raises(ModelError) as error:
        load(str(tiny))
    assert one_line(error).startswith(f"cannot read the weights of {tiny}: ")
    assert shards[1].name in str(error.value)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(
        f"cannot read the tokenizer of {folder} (expected tokenizer.json or its like in {folder})"
    )


def test_a_torn_tokenizer_is_refused(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(f"cannot read the tokenizer of {folder}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type": "llama",', "config.json is not JSON ("),
        ("", "config.json is not JSON ("),
        ("\x80", "config.json is not JSON ("),
        ("[]", "config.json is no model config"),
        ("null", "config.json is no model config"),
        ('{"quantization_config": 4}', "config.json is no model config"),
        ("{}", "cannot read the config of "),
        ('{"model_type": "nonsense"}', "cannot read the config of "),
    ],
)
def test_a_broken_config_is_refused(folder: Path, text: str, said: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert said in one_line(error)
    assert str(error.value).endswith("; get the checkpoint again")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        load(str(tmp_path))
    assert (
        one_line(error) == f"{tmp_path} holds no config.json; expected a saved transformers model"
    )


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert one_line(error).startswith(f"{folder} holds no weights (*.safetensors or *.bin)")


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "t5", "distilbert"])
def test_an_unsupported_family_is_refused_before_any_weight_is_read(
    family: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"unreadable")
    with pytest.raises(UnsupportedModelError, match=f"^{family} "):
        load(str(tmp_path))


def test_a_revision_of_a_local_folder_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="--revision belongs to hub models"):
        load(str(saved), revision="main")


def test_an_absent_device_is_refused_before_the_weights_are_looked_for() -> None:
    with pytest.raises(DeviceError, match="expected a device among"):
        load("/no/such/folder", device="nonsense")


# --- The real model --------------------------------------------------------------------------


@pytest.mark.saturation
def test_the_reference_model_steps_exactly_as_it_runs(reference_model: DecoderStack) -> None:
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
