"""The noise floor: how far rounding alone moves a sequence's statistics on this machine."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.errors import first_line
from cascade.core.schema import UNSET
from cascade.corpora.long_sequences import LongSequences
from cascade.gate.rounding import similarities_rounded_differently
from cascade.models.dispatch import is_dispatched
from cascade.models.stack import DecoderStack
from cascade.saturation.long_context import measure_long
from cascade.saturation.profile import similarities
from cascade.saturation.records import NoiseFloor

#: Float64 is measured only if a float64 copy of the model takes at most this many bytes.
MOST_BYTES = 4 << 30


#: The number of sequences run in float64, which takes about ten times as long as fp32.
_EXACT_SEQUENCES = 2


@torch.no_grad()
def measure_noise(
    stack: DecoderStack,
    ids: npt.NDArray[np.integer[Any]],
    long: LongSequences | None = None,
) -> NoiseFloor:
    """Return how far rounding alone moves the mean similarity of a sequence.

    The same sequences are run in several variants: another batch size, another number of threads,
    another attention kernel, and float64 (if the model is small enough for a copy and the device
    supports it).

    Args:
        stack: The model, which is not changed.
        ids: `[B, T]` token ids of a few sequences.
        long: Long sequences, of which the first is measured too; None for none.
    """
    tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(stack.device)
    plain = _means(stack, tokens)
    variants: dict[str, float | str] = {
        "batch_size": _moved(plain, _one_by_one(stack, tokens)),
        "threads": _with_threads(stack, tokens, plain),
        "attention": _with_attention(stack, tokens, plain),
    }
    exact = _with_float64(stack, tokens[:_EXACT_SEQUENCES], plain[:_EXACT_SEQUENCES])
    repeated = [value for value in variants.values() if isinstance(value, float)]
    return NoiseFloor(
        repeat=max(repeated),
        exact=exact if isinstance(exact, float) else None,
        variants=variants | {"float64": exact},
        sequences=len(tokens),
        long=UNSET if long is None else _long_noise(stack, long),
    )


def _long_noise(stack: DecoderStack, long: LongSequences) -> float:
    """Return how far other rounding moves the mean of a range of positions of a long sequence.

    The sequence runs once more, and every component of every hidden state is moved by up to one
    unit in its last place. That is as far as another attention kernel moves it (SmolLM2-135M, 2,048
    tokens: 1.4e-7, eager instead of SDPA attention 0.9e-7), and takes less time and memory.
    """
    first = long.only(slice(1))
    plain = measure_long(stack, first).means()
    moved = measure_long(stack, first, measured=similarities_rounded_differently).means() - plain
    return float(np.abs(moved).max())


def _means(stack: DecoderStack, tokens: Tensor) -> Array:
    """Return each sequence's mean similarity per layer, `[B, L]`, in float64."""
    means: Array = similarities(stack, tokens).double().mean(dim=2).T.cpu().numpy()
    return means


def _moved(plain: Array, other: Array) -> float:
    return float(np.abs(other - plain).max())


def _one_by_one(stack: DecoderStack, tokens: Tensor) -> Array:
    return np.concatenate([_means(stack, row[None]) for row in tokens])


def _with_threads(stack: DecoderStack, tokens: Tensor, plain: Array) -> float | str:
    before = torch.get_num_threads()
    if stack.device.type != "cpu":
        return "not on this device"
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        return _moved(plain, _means(stack, tokens))
    finally:
        torch.set_num_threads(before)


def _with_attention(stack: DecoderStack, tokens: Tensor, plain: Array) -> float | str:
    model: Any = stack.model
    before = model.config._attn_implementation
    other = "eager" if before == "sdpa" else "sdpa"
    try:
        with _restored(lambda: model.set_attn_implementation(before)):
            model.set_attn_implementation(other)
            return _moved(plain, _means(stack, tokens))
    except (ValueError, NotImplementedError, AttributeError) as error:
        return f"the model has no {other} attention ({type(error).__name__})"


def _with_float64(stack: DecoderStack, tokens: Tensor, plain: Array) -> float | str:
    size = sum(parameter.numel() for parameter in stack.model.parameters()) * 8
    if size > MOST_BYTES:
        return f"a copy in float64 would take {size / 1e9:.1f} GB"
    if is_dispatched(stack.model):
        return "a model over several devices is not copied"
    if stack.device.type == "mps":
        return "not on this device"
    # A copy, because converting to float64 and back restores the weights but not the buffers.
    model: Any = copy.deepcopy(stack.model).double()
    try:
        if getattr(model, "_can_set_experts_implementation", lambda: False)():
            model.set_experts_implementation("eager")  # grouped products have no float64
        wide = DecoderStack(model, provenance=stack.provenance)
        return _moved(plain, _means(wide, tokens))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # kernels of recurrent layers and experts raise any error
        return f"the model does not run in float64 ({first_line(error)})"


@contextlib.contextmanager
def _restored(restore: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    finally:
        restore()
