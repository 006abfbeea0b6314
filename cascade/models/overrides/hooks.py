"""Temporary hooks on decoder layers, and temporary forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` answer for a module's own; the module is restored in any case."""
    # `forward` as an instance attribute hides the class's; some libraries set one themselves.
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = before


@contextlib.contextmanager
def replaced_layers(
    layers: nn.ModuleList, stand_in: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """Let `stand_in(index, args, kwargs)` answer for the forward of every layer.

    Args:
        layers: The decoder layers; they are restored in any case.
        stand_in: Gets the layer's index from 0, and the arguments of its call.
    """

    def forward_of(number: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: stand_in(number, args, kwargs)

    with contextlib.ExitStack() as restored:
        for number, layer in enumerate(layers):
            restored.enter_context(replaced_forward(layer, forward_of(number)))
        yield


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let gradients pass through a model without being computed for its weights."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def hidden_of(output: Any) -> Any:
    """Return the hidden states of a layer's output."""
    return output[0] if isinstance(output, tuple) else output


def as_output(hidden: Tensor, size: int) -> Any:
    """Return hidden states in the form in which a layer returns its output.

    Args:
        hidden: `[B, T, D]`.
        size: The length of the tuple that the layer returns; 0 for a plain tensor.
    """
    return (hidden,) + (None,) * (size - 1) if size else hidden


def split_output(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Separate a layer's hidden states from the rest of its call."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


@contextlib.contextmanager
def layer_hooks(
    layers: Iterable[nn.Module], hook: Callable[[nn.Module, Any], None]
) -> Iterator[None]:
    """Call `hook(layer, output)` after each layer while the context is open."""

    def call(module: nn.Module, _: Any, output: Any) -> None:
        hook(module, output)  # what it returns, if anything, would take the output's place

    handles = [layer.register_forward_hook(call) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def layer_pre_hook(layer: nn.Module, hook: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `hook(hidden)` with a layer's input while the context is open."""

    def call(_: nn.Module, args: Any, kwargs: Any) -> None:
        hook(split_output(args, kwargs)[0])

    handle = layer.register_forward_pre_hook(call, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
