"""Which kernel multiplies which shape: measured once per machine, stored in the cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch

from cascade.core.cache import cache_folder
from cascade.core.errors import OutputError, RecordError
from cascade.core.provenance import processor_name
from cascade.core.records import read_typed, write_record
from cascade.decoding.engine.matrices import PLAIN, PLAIN_EXACT, Choice, Shape, measure
from cascade.decoding.engine.records import KernelRecord

#: Products of this many multiplications take so little time that no kernel is measured for them.
_SMALL = 1 << 16


def choose_kernels() -> Callable[[Shape], Choice]:
    """Return a function that returns the kernels of a shape on this machine."""
    return functools.cache(_choose)


def _choose(shape: Shape) -> Choice:
    if shape.outputs * shape.inputs < _SMALL or not torch.backends.mkldnn.is_available():
        return PLAIN if shape.dtype == "float32" else PLAIN_EXACT
    about: dict[str, Any] = {
        "outputs": shape.outputs,
        "inputs": shape.inputs,
        "dtype": shape.dtype,
        "bias": shape.bias,
        "processor": processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, allow_nan=False).encode()).hexdigest()
    path = cache_folder() / "kernels" / f"{digest[:24]}.json"
    with contextlib.suppress(RecordError):  # not measured yet, or torn: measure now
        return read_typed(path, KernelRecord).choice()
    found = measure(shape)
    with contextlib.suppress(OutputError):  # without a cache, the next run measures again
        write_record(path, KernelRecord.of(about, found))
    return found
