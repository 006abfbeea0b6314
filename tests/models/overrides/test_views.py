"""Private copies of modules share everything with the original except what a call changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cascade.models.overrides.views import (
    can_be_copied,
    holders,
    paths_of,
    with_children,
    with_config,
    with_descendants,
    with_own_hooks,
)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def nested() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 3))


def test_copy_with_other_children_shares_the_rest() -> None:
    model, x = nested(), torch.randn(2, 3)
    before = model(x)
    made = with_children(model, {"1": Doubling()})
    assert torch.equal(made(x), 2 * model[0](x))
    assert torch.equal(model(x), before)
    assert made[0] is model[0]


def test_descendants_are_replaced_only_in_the_copy() -> None:
    model, x = nested(), torch.randn(2, 3)
    before = model(x)
    made = with_descendants(model, {"0.1": Doubling(), "1": nn.Identity()})
    inner: Any = model[0]
    assert torch.equal(made(x), 2 * inner[0](x))
    assert torch.equal(model(x), before)


def test_two_paths_through_the_same_module_are_replaced() -> None:
    model, x = nested(), torch.randn(2, 3)
    made = with_descendants(model, {"0.0": Doubling(), "0.1": Doubling(), "1": Doubling()})
    assert torch.equal(made(x), 8 * x)


def test_module_registered_twice_has_two_paths() -> None:
    model = nested()
    model.add_module("again", model[0])
    inner: Any = model[0]
    assert paths_of(inner[1], model) == ("0.1", "again.1")
    assert paths_of(nn.Tanh(), model) == ()
    assert holders(model, "again.1") == [model, model[0]]


def test_copy_keeps_hooks_and_has_its_own() -> None:
    module, x = Doubling(), torch.ones(1)
    module.register_forward_hook(lambda _, __, output: output + 1)
    made = with_own_hooks(module)
    made.register_forward_hook(lambda _, __, output: 10 * output)
    made.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    assert made(x).item() == 50
    assert module(x).item() == 3


def test_config_is_replaced_in_all_descendants() -> None:
    config, other = SimpleNamespace(name="own"), SimpleNamespace(name="other")
    inner, outer, sibling = Doubling(), nn.Sequential(), Doubling()
    inner.config = outer.config = config  # type: ignore[assignment]
    outer.append(nn.Sequential(inner)).append(sibling)
    made: Any = with_config(outer, config, other)
    assert (made.config, made[0][0].config) == (other, other)
    assert made[1] is sibling
    assert (outer.config, inner.config) == (config, config)
    assert with_config(sibling, config, other) is sibling


def test_module_with_replaced_calls_cannot_be_copied() -> None:
    module, compiled = Doubling(), Doubling()
    assert can_be_copied(module)
    module.forward = lambda x: 3 * x  # type: ignore[method-assign]
    assert not can_be_copied(module)
    compiled.compile(backend="eager")
    assert not can_be_copied(compiled)
