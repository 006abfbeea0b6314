"""Private copies of modules, so that one call can be changed without changing the shared model.

Several threads may run one model at the same time. A hook, a replaced forward or a changed config
on its modules would affect all of them. Copies share weights, buffers and everything else with the
model, except for what a call changes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

#: Attributes with which a library replaces a module's calls. They are bound to the module, so a
#: copy would run the original. `accelerate` sets the first, `Module.compile` the second.
_BOUND = ("forward", "_compiled_call_impl")

#: The attributes that hold a module's hooks. A copy gets its own, so that hooks can be added to the
#: copy alone.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def can_be_copied(module: nn.Module) -> bool:
    """Return whether a copy of a module runs independently of the original."""
    return not any(name in module.__dict__ for name in _BOUND)


def with_children(module: M, children: Mapping[str, nn.Module]) -> M:
    """Return a shallow copy of a module with some of its children replaced.

    Args:
        module: The module, which is not changed.
        children: New children by name.
    """
    made = copy.copy(module)
    made._modules = {**module._modules, **children}
    return made


def with_own_hooks(module: M) -> M:
    """Return a shallow copy of a module to which hooks can be added without changing the module.

    The copy also calls the hooks of the module.

    Args:
        module: The module, which is not changed.
    """
    made = copy.copy(module)
    for name in _HOOKS:
        setattr(made, name, copy.copy(getattr(module, name)))
    return made


def with_descendants(module: M, descendants: Mapping[str, nn.Module]) -> M:
    """Return a copy of a module with other modules at some paths.

    Args:
        module: The module, which is not changed.
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
    """Return every path from a root to a module, e.g. ("model.layers",)."""
    return tuple(
        name for name, found in root.named_modules(remove_duplicate=False) if found is module
    )


def holders(root: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules from a root along a path, without the last one."""
    names = path.split(".")
    return [root.get_submodule(".".join(names[:count])) for count in range(len(names))]


def with_config(module: M, config: Any, other: Any) -> M:
    """Return a copy of a module in which it and its descendants have another config.

    Args:
        module: The module, which is not changed.
        config: The config to replace, wherever a module has this same object.
        other: The new config.
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
