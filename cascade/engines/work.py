"""One task of an engine: what it does, and the model that its process loads once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade.core.errors import CascadeError

if TYPE_CHECKING:
    from cascade.models.source import ModelSource
    from cascade.models.stack import DecoderStack


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


def loaded(model: ModelSource) -> DecoderStack:
    """Return the model of this process, loaded once."""
    if model not in _LOADED:
        _LOADED.clear()
        _LOADED[model] = model.load()
    return _LOADED[model]


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
        work.function(loaded(work.model), work, number)
    except CascadeError as error:
        return error
    except KeyboardInterrupt:
        # Ray cancels so. An interrupted import must not meet the next task of this process; what
        # was half written is removed by now.
        os._exit(1)
    return None
