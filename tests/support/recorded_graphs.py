"""CUDA graphs without CUDA: operations are recorded once, and replayed on the same tensors.

As on a GPU, Python runs during the capture only, the capture itself changes no tensor, a replay
reads and writes the tensors of the capture, and values cannot be read back during the capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cascade.decoding.graphed_forward import CaptureError, Compute

#: Operations that a GPU has to wait for, or that copy from memory that a GPU cannot read.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "lift_fresh")


class RecordedGraphs:
    """Captures by recording; the argument `capture` of `GraphedForward` and `GraphPool`.

    Attributes:
        captures: How many passes were captured.
        replays: How many were replayed.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, compute: Compute) -> Compute:
        recorder = _Recorder()
        try:
            with recorder:
                compute()
        except RuntimeError as error:
            raise CaptureError(f"a pass cannot be captured ({error})") from error
        finally:
            recorder.restore()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return replay


class _Recorder(TorchDispatchMode):
    """Records operations with the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[Callable[[], None]] = []
        self._made: set[int] = set()
        self._kept: list[Any] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} while a stream is capturing")
        schema = func._schema
        for value, argument in zip(args, schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._remember(value)
        made = func(*args, **kwargs)
        self._kept.append((args, kwargs, made))  # memory that is still used is not given away
        writes = any(at.alias_info and at.alias_info.is_write for at in schema.arguments)
        views = any(at.alias_info for at in schema.returns) and not writes
        # Views share the memory of what they are views of; `reshape` and others may do so as well.
        memory = {value.untyped_storage().data_ptr() for value in _tensors((args, kwargs))}
        outputs = [
            value
            for value in _tensors(made)
            if not writes and not views and value.untyped_storage().data_ptr() not in memory
        ]
        self._made |= {value.untyped_storage().data_ptr() for value in outputs}
        if writes or outputs:
            self._operations.append(lambda: _run_again(func, args, kwargs, made, outputs))
        return made

    def _remember(self, value: Tensor) -> None:
        """Keep a tensor that exists already as it was before the capture."""
        address = value.untyped_storage().data_ptr()
        if address not in self._made and address not in self._before:
            whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
            self._before[address] = whole, whole.clone()

    def restore(self) -> None:
        """Undo what the capture has written, since a capture computes nothing."""
        for whole, before in self._before.values():
            whole.copy_(before)

    def replay(self) -> None:
        """Run the operations again, on the same tensors."""
        with torch.no_grad():
            for operation in self._operations:
                operation()


def _run_again(func: Any, args: Any, kwargs: Any, made: Any, outputs: list[Tensor]) -> None:
    again = func(*args, **kwargs)
    fresh = dict(zip(map(id, _tensors(made)), _tensors(again), strict=True))
    for output in outputs:
        output.copy_(fresh[id(output)])


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
