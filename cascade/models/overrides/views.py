"""Private copies of modules, so that one call can be changed without changing the shared model.

Several threads may run one model at a time. A hook, a replaced forward or a changed config on its
own modules would reach all of them. These copies share weights, buffers and everything else with
the model; only what a call changes is their own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

#: Attributes by which a library answers a module's calls itself. They are bound to the module, so
#: that a copy would run the original: `accelerate` sets the first, `Module.compile` the second.
_BOUND = ("forward", "_compiled_call_impl")

#: What holds a module's hooks. A copy gets its own, so that hooks can be added to it alone.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def can_be_copied(module: nn.Module) -> bool:
    """Return whether a copy of a module runs by itself, rather than the original."""
    return not any(name in module.__dict__ for name in _BOUND)


def with_children(module: M, children: Mapping[str, nn.Module]) -> M:
    """Return a shallow copy of a module with some of its children exchanged.

    Args:
        module: The module, which stays as it is.
        children: New children by name.
    """
    made = copy.copy(module)
    made._modules = {**module._modules, **children}
    return made


def with_own_hooks(module: M) -> M:
    """Return a shallow copy of a module to which hooks can be added without changing the module.

    The hooks that the module has are called for the copy, too.

    Args:
        module: The module, which stays as it is.
    """
    made = copy.copy(module)
    for name in _HOOKS:
        setattr(made, name, copy.copy(getattr(module, name)))
    return made


def with_descendants(module: M, descendants: Mapping[str, nn.Module]) -> M:
    """Return a copy of a module in which paths lead to other modules.

    Args:
        module: The module, which stays as it is.
        descendants: New modules by path, e.g. "model.layers".
    """
    below: dict[str, dict[str, nn.Module]] = {}
    children: dict[str, nn.Module] = {}
    for path, descendant in descendants.items():
        name, _, rest = path.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = descendant
        else:
            children[name] = descendant
    for name, inner in below.items():
        children[name] = with_descendants(module.get_submodule(name), inner)
    return with_children(module, children)


def paths_of(module: nn.Module, root: nn.Module) -> tuple[str, ...]:
    """Return every path by which a module is reached from another, e.g. ("model.layers",)."""
    return tuple(
        name for name, found in root.named_modules(remove_duplicate=False) if found is module
    )


def holders(root: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules from a root down a path, the one at its end left out."""
    names = path.split(".")
    return [root.get_submodule(".".join(names[:count])) for count in range(len(names))]


def with_config(module: M, config: Any, other: Any) -> M:
    """Return a copy of a module in which it and its descendants have another config.

    Args:
        module: The module, which stays as it is.
        config: The config that is exchanged, where a module has this very object.
        other: What takes its place.
    """
    children = {
        name: made
        for name, child in module._modules.items()
        if child is not None and (made := with_config(child, config, other)) is not child
    }
    has_config = module.__dict__.get("config") is config
    if not children and not has_config:
        return module
    made = with_children(module, children)
    if has_config:
        made.config = other
    return made
