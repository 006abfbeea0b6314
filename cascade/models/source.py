"""Where other processes load a model from."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from msgspec.structs import replace

from cascade.core.errors import ModelError
from cascade.core.provenance import ModelProvenance
from cascade.core.schema import known
from cascade.models.loading import DeviceMap, load
from cascade.models.stack import DecoderStack

_Place = str | int | torch.device


@dataclass(frozen=True)
class ModelSource:
    """Where a process loads a model from.

    Attributes:
        source: As for `cascade.load`; a path is absolute.
        revision: A hub revision.
        dtype: The name of the dtype.
        attention: The attention kernel.
        weights_hash: The hash of the weights that it has to find.
        device: The device to load it on.
        device_map: A device map instead of the device: a strategy, or the device of each module.
    """

    source: str
    revision: str | None
    dtype: str
    attention: str | None
    weights_hash: str
    device: str = "cpu"
    device_map: str | int | torch.device | tuple[tuple[str, _Place], ...] | None = None

    def load(self) -> DecoderStack:
        """Load the model.

        Raises:
            ModelError: The weights are missing, damaged, or not those of the driver.
        """
        named = self.device_map
        device_map: DeviceMap | None = dict(named) if isinstance(named, tuple) else named
        stack = load(
            self.source,
            revision=self.revision,
            dtype=self.dtype,
            device="cpu" if device_map is not None else self.device,
            device_map=device_map,
            attn_implementation=self.attention,
        )
        if stack.weights_hash() != self.weights_hash:
            raise ModelError(
                f"expected {self.source} with weights {self.weights_hash[:19]}..., but"
                f" {platform.node()} has {stack.weights_hash()[:19]}...; give every machine the"
                " same checkpoint"
            )
        return stack


def model_source(
    stack: DecoderStack,
    *,
    gpus: float = 0.0,
    device_map: _Place | Mapping[str, _Place] | None = None,
) -> ModelSource:
    """Return where workers load the model that the driver has loaded.

    Args:
        stack: The driver's model.
        gpus: GPUs of each worker.
        device_map: The driver's device map.

    Raises:
        ModelError: The model was made in memory.
    """
    if device_map is None and gpus > 1:
        device_map = "auto"
    return recorded_source(
        replace(stack.provenance, dtype=str(stack.dtype).removeprefix("torch.")),
        stack.weights_hash(),
        device="cuda" if gpus else str(stack.device),
        device_map=device_map,
    )


def recorded_source(
    about: ModelProvenance,
    weights_hash: str,
    *,
    device: str = "cpu",
    device_map: _Place | Mapping[str, _Place] | None = None,
    of: str = "",
) -> ModelSource:
    """Return where the model of a record is loaded from.

    Args:
        about: What the record says of the model.
        weights_hash: The hash of its weights.
        device: The device to load it on.
        device_map: A device map instead of the device.
        of: What the model belongs to, for the error, e.g. "PLAN".

    Raises:
        ModelError: The model was made in memory.
    """
    source = known(about.source)
    if source is None or weights_hash.startswith("in-memory"):
        raise ModelError(
            f"the model{of and ' of '}{of} was in memory, so no other process can load it; save it "
            "first, or pass it as model="
        )
    return ModelSource(
        source=_absolute(source),
        revision=known(about.revision),
        dtype=known(about.dtype) or "float32",
        attention=known(about.attention),
        weights_hash=weights_hash,
        device=device,
        device_map=tuple(device_map.items()) if isinstance(device_map, Mapping) else device_map,
    )


def _absolute(source: str) -> str:
    path = os.path.expanduser(source)
    return os.path.abspath(path) if os.path.exists(path) else source
