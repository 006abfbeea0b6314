"""What a pass over several tokens takes on this machine, measured once and stored."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cascade.core.cache import cache_folder
from cascade.core.errors import OutputError, RecordError
from cascade.core.provenance import processor_name
from cascade.core.records import read_typed, write_record
from cascade.decoding.engine.records import PassRecord
from cascade.decoding.lossless import Branch, Passes
from cascade.models.stack import DecoderStack

#: The most tokens of a pass for which a time is known.
MOST = 16

#: Numbers of tokens that are timed; in between, times are interpolated.
TIMED = (1, 2, 3, 4, 6, 8, 12, MOST)

#: Timed repetitions; the fastest counts, because other processes only add time.
_REPEATS = 4

#: Seconds after which a slow model is not timed again.
_PATIENCE = 4.0

#: The length of the text behind which passes are timed.
_CONTEXT = 4


#: Times of this process that are not stored, by the path of their record, and whether the machine
#: was quiet.
_unstored: dict[Path, tuple[list[float], bool]] = {}


def pass_costs(stack: DecoderStack, what: str, make: Callable[[int], Passes]) -> list[float]:
    """Return the milliseconds of a pass over 1, 2, ... tokens, LM head included.

    Args:
        stack: The model.
        what: What computes its layers.
        make: Returns the passes of one row with a capacity.
    """
    weights = [tuple(value.shape) for value in stack.model.parameters()]
    about: dict[str, Any] = {
        "model": hashlib.sha256(repr(weights).encode()).hexdigest()[:16],
        "dtype": str(stack.dtype).removeprefix("torch."),
        "engine": what,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, allow_nan=False).encode()).hexdigest()
    path = cache_folder() / "kernels" / f"passes-{digest[:16]}.json"
    with contextlib.suppress(RecordError):  # not measured yet, or torn
        return _interpolated(read_typed(path, PassRecord).milliseconds)
    times, quiet = _unstored.get(path, ([], False))
    if times and (quiet or _is_busy()):
        return _interpolated(times)
    capacity = min(stack.max_positions or _CONTEXT + MOST, _CONTEXT + MOST)
    times, quiet = _measured(make(capacity), capacity), not _is_busy()
    _unstored[path] = times, quiet
    if quiet:
        with contextlib.suppress(OutputError):  # without a cache, the next process measures again
            write_record(path, PassRecord(**about, milliseconds=times))
            del _unstored[path]
    return _interpolated(times)


def _is_busy() -> bool:
    """Return whether other processes may have disturbed the measurement."""
    try:
        return os.getloadavg()[0] > torch.get_num_threads() + 1
    except OSError:  # unknown here
        return False


@torch.no_grad()
def _measured(passes: Passes, capacity: int) -> list[float]:
    """Return the milliseconds of passes over the numbers of tokens in `TIMED`.

    Passes over more tokens than fit never occur, and get the time of the largest one that does not.
    """
    begin = time.perf_counter()
    column = min(_CONTEXT, capacity - 1)
    if column:
        passes.prefill(0, [[0] * column])
    most = min(capacity - column, passes.most)
    fitting = [count for count in TIMED if count <= most]
    best = [float("inf")] * len(fitting)
    for repeat in range(_REPEATS):
        for place, count in enumerate(fitting):
            branch = Branch(0, column, [0] * count, list(range(-1, count - 1)))
            start = time.perf_counter()
            logits, _ = passes.run([branch])
            logits.argmax(dim=-1)
            best[place] = min(best[place], 1e3 * (time.perf_counter() - start))
        if repeat and time.perf_counter() - begin > _PATIENCE:
            break
    return best + best[-1:] * (len(TIMED) - len(best))


def _interpolated(times: Sequence[float]) -> list[float]:
    """Return times for 1 to `MOST` tokens, none of them below that of fewer tokens."""
    found: list[float] = []
    for count in range(1, MOST + 1):
        above = next(place for place, timed in enumerate(TIMED) if timed >= count)
        if TIMED[above] == count:
            value = times[above]
        else:
            low, high = TIMED[above - 1], TIMED[above]
            share = (count - low) / (high - low)
            value = times[above - 1] * (1 - share) + times[above] * share
        found.append(max(value, found[-1] if found else value))
    return found
