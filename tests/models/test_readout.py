"""States decode to the model's logits and gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from support.stacks import (
    AFTER_THE_HEAD,
    ALL_FAMILIES,
    a_stack,
    difference,
    logits_of,
    own_run,
    refuse_to_run,
    visited,
)
from support.tiny_models import WIDTH, random_ids, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.models.stack import DecoderStack


@ALL_FAMILIES
def test_normed_states_decode_to_the_models_logits(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    normed = visited(stack, ids)[1]
    assert normed is not None
    assert difference(stack.decode_normed(normed), own_run(stack.model, ids).logits) == 0.0


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (2, 64)])
@ALL_FAMILIES
def test_decode_normed_applies_the_head_without_a_norm(
    family: str, batch: int, length: int
) -> None:
    stack = a_stack(family)
    generator = torch.Generator().manual_seed(batch)
    normed = 5 * torch.randn((batch, length, WIDTH), generator=generator)
    before = normed.clone()
    logits = stack.decode_normed(normed)
    assert difference(logits, logits_of(stack.model, normed)) == 0.0
    assert torch.equal(normed, before)
    assert difference(logits, stack.decode(normed)) > 0.1, "an additional norm would not be noticed"


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_decode_normed_in_bfloat16_is_exact(family: str) -> None:
    stack, ids = DecoderStack(tiny_model(family).bfloat16()), random_ids()
    normed = visited(stack, ids)[1]
    assert normed is not None
    assert difference(stack.decode_normed(normed), own_run(stack.model, ids).logits) == 0.0


@ALL_FAMILIES
def test_gradients_flow_to_normed_states_that_require_them(family: str) -> None:
    stack = a_stack(family)
    normed = torch.randn((2, 5, WIDTH), generator=torch.Generator().manual_seed(1))
    gradients: list[Tensor] = []
    for decode in (stack.decode_normed, functools.partial(differentiable_logits, stack.model)):
        leaf = normed.clone().requires_grad_()
        logits = decode(leaf)
        gradients += torch.autograd.grad(logits.square().sum(), leaf)
    assert gradients[0].abs().max() > 0.1
    # Gradients are in the hundreds; sums in another order change 1e-6 of the largest.
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
def test_decode_computes_no_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = a_stack(family)
    for layer in stack.layers:
        for child in layer.children():
            monkeypatch.setattr(child, "forward", refuse_to_run)
    for decode in (stack.decode, stack.decode_normed):
        assert decode(torch.ones((2, 3, WIDTH))).shape == (2, 3, 97)
