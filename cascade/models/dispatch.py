"""Models that `accelerate` spreads over several devices, the CPU's memory and the disk.

Such a model is never moved or copied. A weight that is kept elsewhere lies on the device "meta"
between two calls of its module; what holds it is the module's hook.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade.core.cache import cache_folder
from cascade.core.errors import UsageError, os_reason
from cascade.core.reading import UnreadableError, read_json

#: Strategies by which `transformers` makes a device map itself.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

_DEVICE = re.compile(r"cpu|disk|mps|(cuda|xpu|npu)(:\d+)?|\d+")

#: Device of each module, by name; "" is the whole model.
ModuleDevices = dict[str, str | int]


def device_map_of(text: str) -> str | ModuleDevices:
    """Return the device map of an option.

    Args:
        text: A strategy, or a .json file with the device of each module, such as
            `{"model.embed_tokens": 0, "model.layers.0": "cpu", ...}`.

    Raises:
        UsageError: It is neither, or a device has no such name.

    Example:
        >>> device_map_of("auto")
        'auto'
    """
    if text in STRATEGIES:
        return text
    expected = f"expected --device-map {', '.join(STRATEGIES)} or a .json file"
    if not text.endswith(".json"):
        raise UsageError(f"{expected}, got {text!r}")
    try:
        found = read_json(Path(os.path.expanduser(text)), foreign=True)
    except (UnreadableError, OSError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else str(error)
        raise UsageError(f"{expected}, but {text} cannot be read: {reason}") from error
    if not isinstance(found, dict) or not found:
        raise UsageError(
            f"expected the device of each module in {text}, got {json.dumps(found, allow_nan=True)}"
        )
    for module, device in found.items():
        if isinstance(device, bool) or not _DEVICE.fullmatch(str(device)):
            raise UsageError(
                f"expected a device such as 0, cuda:1, cpu or disk for {module or 'the model'} in"
                f" {text}, got {json.dumps(device, allow_nan=True)}"
            )
    return found


def is_dispatched(model: nn.Module) -> bool:
    """Return whether `accelerate` runs the modules of a model where their weights are."""
    return any(_hooks_of(module) for module in model.modules())


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which a model takes its inputs."""
    found: torch.device = model.device  # type: ignore[assignment]  # of transformers
    if found.type != "meta":
        return found
    devices = (
        getattr(hook, "execution_device", None)
        for module in model.modules()
        for hook in _hooks_of(module)
    )
    return torch.device(next((each for each in devices if each is not None), found))


def places_of(model: nn.Module) -> str | None:
    """Return where the weights of a dispatched model are, e.g. "cuda:0, cpu, disk"; else None."""
    found: Mapping[str, Any] | None = getattr(model, "hf_device_map", None)
    if not found or not is_dispatched(model):
        return None
    names = [f"cuda:{place}" if isinstance(place, int) else str(place) for place in found.values()]
    return ", ".join(dict.fromkeys(names))


def held_elsewhere(model: nn.Module, path: str) -> Tensor | None:
    """Return a weight that is not on its device now, from where it is held.

    Args:
        model: The model.
        path: The name of the weight in the model.

    Returns:
        The weight, read from memory or disk; None if nothing holds it.
    """
    owner, _, name = path.rpartition(".")
    for hook in _hooks_of(model.get_submodule(owner)):
        held = getattr(hook, "weights_map", None)
        if held is not None and getattr(hook, "offload", False):
            try:
                found: Tensor = held[name]
            except KeyError:
                continue
            return found
    return None


def weights_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yield every weight of a model: its name, the parameter, and its values.

    The values of a weight that is held elsewhere are read, one weight at a time. Those of a weight
    that nothing holds are on the device "meta".

    Args:
        model: The model.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{path}.{name}" if path else name
            held = held_elsewhere(model, full) if parameter.is_meta else None
            yield full, parameter, parameter if held is None else held


def _hooks_of(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return []
    return list(getattr(hook, "hooks", None) or [hook])


class OffloadFolder:
    """A folder in the cache for weights that a device map keeps on disk in another form.

    It is made when the first weight is written, and removed with the model or at the end of the
    process.
    """

    def __init__(self) -> None:
        parent = cache_folder() / "offload"
        parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(dir=parent))
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def belongs_to(self, model: nn.Module) -> None:
        """Keep the folder as long as a model."""
        model.__dict__["_cascade_offload_folder"] = self
