"""Running a model with stand-ins for its decoder layers, without changing the model.

Other threads may run the same model meanwhile. So layers are exchanged in shallow copies of the
modules that hold them (see `cascade.models.overrides.views`).
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
    """Copies of a model and of its decoder in which other modules answer for the layers.

    Where a library answers the model's calls itself (`accelerate`, `Module.compile`), a copy cannot
    work: there the model's own layers are changed and restored, and the model is for one thread at
    a time.

    Args:
        model: The model.
        decoder: The part of it that holds the decoder layers.
        layers: The decoder layers.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, layers: nn.ModuleList) -> None:
        self.layers = layers
        self._paths = {root: paths_of(layers, root) for root in (model, decoder)}

    def can_be_copied(self, root: nn.Module) -> bool:
        """Return whether a copy of the model or its decoder runs by itself."""
        holding = [module for path in self._paths[root] for module in holders(root, path)]
        compiled = any("_compiled_call_impl" in layer.__dict__ for layer in self.layers)
        return not compiled and all(map(can_be_copied, holding))

    def with_layers(self, root: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
        """Return a copy of the model or its decoder with other decoder layers."""
        names = map(str, range(len(self.layers)))
        made = with_children(self.layers, dict(zip(names, layers, strict=True)))
        return with_descendants(root, dict.fromkeys(self._paths[root], made))

    def for_hooks(self, root: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
        """Return the model or its decoder, and its layers, to which hooks may be added."""
        if not self.can_be_copied(root):
            return root, list(self.layers)
        layers = [with_own_hooks(layer) for layer in self.layers]
        return self.with_layers(root, layers), layers

    @contextlib.contextmanager
    def standing_in(self, root: nn.Module, stand_in: StandIn) -> Iterator[nn.Module]:
        """Yield a model in which `stand_in` answers for every layer's forward.

        Args:
            root: The model or its decoder.
            stand_in: Gets the layer's index from 0, and the arguments of its call.
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
