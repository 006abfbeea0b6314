"""One task of an engine: what it does, and the model that its process loads once."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade.core.errors import CascadeError, ModelError
from cascade.core.schema import known

if TYPE_CHECKING:
    from cascade.models.loading import DeviceMap
    from cascade.models.stack import DecoderStack


@dataclass(frozen=True)
class ModelSource:
    """Where each worker loads the model from.

    Attributes:
        source: As for `cascade.load`; a path is absolute.
        revision: A hub revision.
        dtype: The name of the dtype.
        attention: The attention kernel.
        weights_hash: The hash of the weights that the worker has to find.
        device: The device to load it on.
        device_map: A device map instead of the device: a strategy, or the device of each module.
    """

    source: str
    revision: str | None
    dtype: str
    attention: str | None
    weights_hash: str
    device: str = "cpu"
    device_map: str | tuple[tuple[str, str | int], ...] | None = None

    def load(self) -> DecoderStack:
        """Load the model.

        Raises:
            ModelError: The weights are missing, damaged, or not those of the driver.
        """
        from cascade.models.loading import load

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
    device_map: str | dict[str, str | int] | None = None,
) -> ModelSource:
    """Return where workers load the model that the driver has loaded.

    Args:
        stack: The driver's model.
        gpus: GPUs of each worker.
        device_map: The driver's device map.

    Raises:
        ModelError: The model was made in memory.
    """
    about = stack.provenance
    source = known(about.source)
    if source is None or known(about.weights_hash) is None:
        raise ModelError("the model was made in memory, so workers cannot load it; save it first")
    path = os.path.expanduser(source)
    if device_map is None and gpus > 1:
        device_map = "auto"
    return ModelSource(
        source=os.path.abspath(path) if os.path.exists(path) else source,
        revision=known(about.revision),
        dtype=str(stack.dtype).removeprefix("torch."),
        attention=known(about.attention),
        weights_hash=stack.weights_hash(),
        device="cuda" if gpus else str(stack.device),
        device_map=tuple(device_map.items()) if isinstance(device_map, dict) else device_map,
    )


@dataclass(frozen=True)
class Work:
    """What every task does.

    Attributes:
        name: What one task is, for messages, e.g. "shard".
        function: Called with the model, the folder and the number of a task. It writes its result
            into the folder: all of it or nothing.
        model: The model.
        folder: The folder, which every machine has under this path.
        engine: The engine, for the provenance, e.g. "ray 2.60.0".
        threads: CPU threads.
    """

    name: str
    function: Callable[[DecoderStack, Work, int], Any]
    model: ModelSource
    folder: str
    engine: str
    threads: int


@dataclass(frozen=True)
class Task:
    """One task: its number, and its number of tokens."""

    number: int
    tokens: int


#: The model of this worker process. There is one at most.
_LOADED: dict[ModelSource, DecoderStack] = {}


def run_task(work: Work, number: int) -> CascadeError | None:
    """Run a task in a worker process.

    Args:
        work: What every task does.
        number: The number of the task.

    Returns:
        The error that a user can mend, which a second try would meet again; else None.
    """
    import torch

    torch.set_num_threads(work.threads)
    try:
        if work.model not in _LOADED:
            _LOADED.clear()
            _LOADED[work.model] = work.model.load()
        work.function(_LOADED[work.model], work, number)
    except CascadeError as error:
        return error
    return None
