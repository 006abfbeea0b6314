"""A model is left as it was, and what a library has set on it stays in force."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.stacks import (
    ALL_FAMILIES,
    a_stack,
    difference,
    own_run,
    refuse_to_run,
    stepped,
    visited,
)
from support.tiny_models import WIDTH, random_ids, tiny_model

from cascade.models.stack import DecoderStack


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
