"""The two sublayers of a decoder layer, and what each adds to the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cascade.core.errors import UnsupportedModelError
from cascade.models.layer_states import sharing_layer
from cascade.models.stack import DecoderStack, LayerCall
from cascade.stats.cosine import widened


@dataclass(frozen=True)
class Sublayers:
    """The two modules whose outputs a layer adds to the residual stream.

    Attributes:
        attention: The module of the last matrix product inside the attention.
        mlp: The module of the last matrix product outside the attention.
    """

    attention: nn.Module
    mlp: nn.Module


@dataclass(frozen=True)
class Update:
    """What a layer adds to its input. All tensors are `[B, T, D]`, in fp32 or wider.

    Attributes:
        hidden: The layer's input.
        attention: What the attention adds to it.
        mlp: What the MLP adds to the result.
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
    """Return the modules of the last matrix products inside and outside a layer's attention.

    Args:
        layer: A decoder layer.
        run: A function that runs the layer once.

    Returns:
        Up to two modules, the attention's first; fewer if such a product is missing.
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
    """Make modules return zeros inside the context."""
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
    """Find the two modules whose outputs a layer adds to the stream, and check them.

    Args:
        stack: The model.
        layer: 1..N.

    Raises:
        UnsupportedModelError: The layer has no attention or no MLP (Mamba), or changes its input
            even if both return zeros (post-norm layers, mixtures of experts), so its update is not
            the sum of the two; or it shares keys and values with another layer.
    """
    family = stack.model.config.model_type
    shared = sharing_layer(stack.model.config)
    if shared is not None:
        raise UnsupportedModelError(
            f"decoder layer {shared} of {family} takes the keys and values of an earlier layer, so"
            " no layer's update can be changed alone; expected layers with keys and values of"
            " their own"
        )
    ids = torch.arange(8, device=stack.device).remainder(stack.vocab_size)[None]
    plan = stack.plan(ids)
    hidden, call = plan.embedded, plan.calls[layer - 1]
    module = stack.layers[layer - 1]
    found = last_products(module, lambda: stack.step(layer, hidden, call))
    if len(found) < 2:
        raise UnsupportedModelError(
            f"decoder layer {layer} of {family} ({type(module).__name__}) has no attention next to"
            " an MLP, so its update cannot be split into the two; expected layers that have both"
        )
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
    """Run a layer and split its update into those of attention and MLP.

    The attention's update is that of the layer with a silenced MLP. The rest is the MLP's.

    Args:
        stack: The model.
        sublayers: The layer's sublayers, from `find_sublayers`.
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
