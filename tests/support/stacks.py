"""Stacks of tiny models, and what their model computes by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.core.errors import CascadeError
from cascade.models.stack import DecoderStack, Plan
from support.tiny_models import FAMILIES, random_ids, tiny_model

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


def refuse_to_run(*_: Any, **__: Any) -> Any:
    raise AssertionError("this must not run")
