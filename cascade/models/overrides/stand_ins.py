"""Running a model with stand-ins for its decoder layers, without changing the model.

Other threads may run the same model at the same time. Layers are therefore replaced in shallow
copies of the modules that hold them (see `cascade.models.overrides.views`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from cascade.models.overrides.hooks import replaced_layers
from cascade.models.overrides.views import (
    can_be_copied,
    holders,
    paths_of,
    with_children,
    with_descendants,
    with_own_hooks,
)

#: Called as `stand_in(index, args, kwargs)` with the layer's index from 0.
StandIn = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


class StandIns:
    """Copies of a model and of its decoder in which other modules replace the layers.

    A copy cannot run where a library replaces the model's calls (`accelerate`, `Module.compile`).
    There, the model's own layers are changed and restored, and only one thread at a time may use
    the model.

    Args:
        model: The model.
        decoder: Its base model, which holds the decoder layers.
        layers: The decoder layers.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, layers: nn.ModuleList) -> None:
        self.layers = layers
        self._paths = {root: paths_of(layers, root) for root in (model, decoder)}

    def can_be_copied(self, root: nn.Module) -> bool:
        """Return whether a copy of the model or its decoder runs independently of the original."""
        holding = [module for path in self._paths[root] for module in holders(root, path)]
        compiled = any("_compiled_call_impl" in layer.__dict__ for layer in self.layers)
        return not compiled and all(map(can_be_copied, holding))

    def with_layers(self, root: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
        """Return a copy of the model or its decoder with other decoder layers."""
        names = map(str, range(len(self.layers)))
        made = with_children(self.layers, dict(zip(names, layers, strict=True)))
        return with_descendants(root, dict.fromkeys(self._paths[root], made))

    def for_hooks(self, root: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
        """Return a model or decoder, and its layers, to which hooks can be added safely."""
        if not self.can_be_copied(root):
            return root, list(self.layers)
        layers = [with_own_hooks(layer) for layer in self.layers]
        return self.with_layers(root, layers), layers

    @contextlib.contextmanager
    def standing_in(self, root: nn.Module, stand_in: StandIn) -> Iterator[nn.Module]:
        """Yield a model in which `stand_in` replaces the forward of every layer.

        Args:
            root: The model or its decoder.
            stand_in: Called with the index of the layer, from 0, and the arguments of the call.
        """
        if not self.can_be_copied(root):
            with replaced_layers(self.layers, stand_in):
                yield root
            return

        def forward_of(number: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: stand_in(number, args, kwargs)

        layers = []
        for number, layer in enumerate(self.layers):
            copied = copy.copy(layer)
            copied.forward = forward_of(number)
            layers.append(copied)
        yield self.with_layers(root, layers)
