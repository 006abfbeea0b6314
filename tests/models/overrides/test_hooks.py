"""Overrides restore the model and keep hooks and forwards that a library has set."""

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
    """Return the attributes that replacing or hooking a layer could have changed."""
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


def check_model_is_restored(stack: DecoderStack, operation: str) -> None:
    """Check that the model is unchanged after success and after an error."""
    logits = own_run(stack.model, random_ids()).logits
    before = state_of(stack)
    OPERATIONS[operation](stack)
    assert state_of(stack) == before
    # Decoding does not necessarily run a layer, but it runs the LM head.
    module = stack.lm_head if "decode" in operation else stack.layers[2]
    handle = module.register_forward_pre_hook(refuse_to_run)
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
def test_model_is_restored_also_after_an_error(family: str, operation: str) -> None:
    check_model_is_restored(a_stack(family), operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_replaced_forward_of_a_library_is_kept(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = a_stack("llama")
    for layer in (
        stack.layers[1],
        stack.layers[2],
    ):  # as accelerate does, here for two of four layers
        forward = functools.partial(type(layer).forward, layer)
        monkeypatch.setitem(vars(layer), "forward", forward)
    check_model_is_restored(stack, operation)


def test_failing_visitor_leaves_no_hook() -> None:
    stack = a_stack("llama")
    before = state_of(stack)
    with pytest.raises(AssertionError, match="must not run"):
        stack.visit(random_ids(), refuse_to_run)
    assert state_of(stack) == before


def test_step_calls_the_replaced_forward_of_a_library() -> None:
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


def test_step_calls_the_hooks_of_a_library() -> None:
    stack, ids = DecoderStack(tiny_model("llama")), random_ids()
    before = own_run(stack.model, ids).logits
    stack.layers[1].register_forward_hook(lambda _, args, output: 1.5 * output)
    after = own_run(stack.model, ids).logits
    assert difference(after, before) > 1e-3
    plan = stack.plan(ids)
    assert difference(plan.embedded, stack.model.get_input_embeddings()(ids)) == 0.0
    history = stepped(stack, plan)
    assert difference(history[2], visited(stack, ids)[0][2]) == 0.0
