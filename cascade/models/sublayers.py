"""The two sublayers of a decoder layer: what its attention and what its MLP adds to the stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cascade.core.errors import UnsupportedModelError
from cascade.models.stack import DecoderStack, LayerCall
from cascade.stats.cosine import widened


@dataclass(frozen=True)
class Sublayers:
    """The two modules by which a layer writes to the residual stream.

    Attributes:
        attention: The last matrix product inside the attention.
        mlp: The last matrix product outside of it.
    """

    attention: nn.Module
    mlp: nn.Module


@dataclass(frozen=True)
class Update:
    """What a layer adds to its input; all tensors are `[B, T, D]`, in fp32 or wider.

    Attributes:
        hidden: The layer's input.
        attention: What its attention adds.
        mlp: What its MLP adds, given what the attention has added.
    """

    hidden: Tensor
    attention: Tensor
    mlp: Tensor

    @property
    def whole(self) -> Tensor:
        """The layer's output minus its input."""
        return self.attention + self.mlp

    @property
    def output(self) -> Tensor:
        """The layer's output."""
        return self.hidden + self.whole


def last_products(layer: nn.Module, run: Callable[[], Any]) -> list[nn.Module]:
    """Return the last matrix product inside a layer's attention, and the last one outside of it.

    Args:
        layer: A decoder layer.
        run: Runs the layer once.

    Returns:
        Up to two modules, the attention's first; fewer where there is no such product.
    """
    used: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        used.append(module)

    products = [module for module in layer.modules() if _is_product(module)]
    handles = [module.register_forward_hook(note) for module in products]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    inside = {id(module) for child in attention_modules(layer) for module in child.modules()}
    return [
        module
        for where in (True, False)
        for module in [module for module in used if (id(module) in inside) == where][-1:]
    ]


def _is_product(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def attention_modules(layer: nn.Module) -> list[nn.Module]:
    """Return a layer's direct children that compute attention."""
    return [child for child in layer.children() if "Attention" in type(child).__name__]


@contextlib.contextmanager
def silenced(*modules: nn.Module) -> Iterator[None]:
    """Let modules return zeros inside the context."""
    handles = [
        module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def find_sublayers(stack: DecoderStack, layer: int) -> Sublayers:
    """Find the two modules by which a layer writes to the stream, and check them.

    Args:
        stack: The model.
        layer: 1..N.

    Raises:
        UnsupportedModelError: With both silenced the layer still changes its input (post-norm
            layers, mixtures of experts), so that its update is not the sum of the two.
    """
    family = stack.model.config.model_type
    ids = torch.arange(8, device=stack.device).remainder(stack.vocab_size)[None]
    plan = stack.plan(ids)
    hidden, call = plan.embedded, plan.calls[layer - 1]
    module = stack.layers[layer - 1]
    found = last_products(module, lambda: stack.step(layer, hidden, call))
    if len(found) == 2:
        with silenced(*found):
            if torch.equal(stack.step(layer, hidden, call), hidden):
                return Sublayers(*found)
    raise UnsupportedModelError(
        f"a layer of {family} changes its input even with attention and MLP silenced, so its "
        "update cannot be split into the two; expected layers that add both to the stream"
    )


@torch.no_grad()
def split_update(
    stack: DecoderStack, sublayers: Sublayers, layer: int, hidden: Tensor, call: LayerCall
) -> tuple[Tensor, Update]:
    """Run a layer, and split its update into what attention and what the MLP adds.

    The attention's share is the update with the MLP silenced; the rest is the MLP's.

    Args:
        stack: The model.
        sublayers: The layer's, from `find_sublayers`.
        layer: 1..N.
        hidden: The layer's input, `[B, T, D]`.
        call: The layer's entry of `Plan.calls`.

    Returns:
        The layer's output, `[B, T, D]` in the model's dtype, and its update.
    """
    output = stack.step(layer, hidden, call)
    with silenced(sublayers.mlp):
        between = widened(stack.step(layer, hidden, call))
    start = widened(hidden)
    return output, Update(start, between - start, widened(output) - between)
