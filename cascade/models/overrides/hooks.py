"""Temporary hooks and temporary forwards of decoder layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward inside the context, and restore it at the end."""
    # An instance attribute `forward` hides the method; some libraries set one themselves.
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
    """Replace the forward of every layer by `stand_in(index, args, kwargs)` inside the context.

    Args:
        layers: The decoder layers, restored at the end.
        stand_in: Called with the index of the layer, from 0, and the arguments of the call.
    """

    def forward_of(number: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: stand_in(number, args, kwargs)

    with contextlib.ExitStack() as restored:
        for number, layer in enumerate(layers):
            restored.enter_context(replaced_forward(layer, forward_of(number)))
        yield


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disable gradients of a model's weights inside the context; others still flow through it."""
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
    return output[0] if isinstance(output, (tuple, list)) else output


def as_output(hidden: Tensor, size: int) -> Any:
    """Return hidden states in the same form as a layer's output.

    Args:
        hidden: `[B, T, D]`.
        size: The length of the tuple or list that the layer returns; 0 for a plain tensor.
    """
    return (hidden,) + (None,) * (size - 1) if size else hidden


def split_output(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Separate the hidden states from the other arguments of a layer's call."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


@contextlib.contextmanager
def layer_hooks(
    layers: Iterable[nn.Module], hook: Callable[[nn.Module, Any], None]
) -> Iterator[None]:
    """Call `hook(layer, output)` after each layer inside the context."""

    def call(module: nn.Module, _: Any, output: Any) -> None:
        hook(module, output)  # drop the result, which would replace the output

    handles = [layer.register_forward_hook(call) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def changed_outputs(
    layers: Iterable[nn.Module], change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Replace the hidden states that each layer returns by `change(hidden)` inside the context."""

    def call(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = change(hidden_of(output))
        if not isinstance(output, (tuple, list)):
            return hidden
        made = getattr(output, "_make", type(output))  # named tuples take their entries apart
        return made((hidden, *output[1:]))

    handles = [layer.register_forward_hook(call) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def call_hooks(
    layers: Iterable[nn.Module], hook: Callable[[tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Call `hook(args, kwargs)` before each layer inside the context."""

    def call(_: nn.Module, args: Any, kwargs: Any) -> None:
        hook(args, kwargs)

    handles = [layer.register_forward_pre_hook(call, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def layer_pre_hook(layer: nn.Module, hook: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `hook(hidden)` with a layer's input inside the context."""
    with call_hooks([layer], lambda args, kwargs: hook(split_output(args, kwargs)[0])):
        yield
