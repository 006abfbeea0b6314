"""The noise floor: how far arithmetic alone moves a sequence's statistics, measured here."""

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
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import similarities

#: What exact arithmetic is asked of: a copy of the model in float64 takes this many bytes at most.
_MOST_BYTES = 4 << 30


#: Sequences that are run in float64, which takes some ten times as long as fp32.
_EXACT_SEQUENCES = 2


@torch.no_grad()
def measure_noise(stack: DecoderStack, ids: npt.NDArray[np.integer[Any]]) -> dict[str, Any]:
    """Run the same sequences in several ways that differ in arithmetic alone.

    Args:
        stack: The model; it is left as it was.
        ids: `[B, T]` token ids of a few sequences.

    Returns:
        `repeat`, the largest change of any sequence's mean similarity in any layer by another
        batch size, number of threads or attention kernel; `exact`, that from float64 (None where
        the model is too large for a copy in it, or the device has none); `ways`, each by itself,
        with the reason where one could not be had; and `sequences`.
    """
    tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(stack.device)
    plain = _means(stack, tokens)
    ways: dict[str, float | str] = {
        "batch_size": _moved(plain, _one_by_one(stack, tokens)),
        "threads": _with_threads(stack, tokens, plain),
        "attention": _with_attention(stack, tokens, plain),
    }
    exact = _with_float64(stack, tokens[:_EXACT_SEQUENCES], plain[:_EXACT_SEQUENCES])
    repeated = [value for value in ways.values() if isinstance(value, float)]
    return {
        "repeat": max(repeated),
        "exact": exact if isinstance(exact, float) else None,
        "ways": ways | {"float64": exact},
        "sequences": len(tokens),
    }


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
    except (ValueError, NotImplementedError) as error:
        return f"the model has no {other} attention ({type(error).__name__})"


def _with_float64(stack: DecoderStack, tokens: Tensor, plain: Array) -> float | str:
    size = sum(parameter.numel() for parameter in stack.model.parameters()) * 8
    if size > _MOST_BYTES:
        return f"a copy in float64 would take {size / 1e9:.1f} GB"
    if stack.device.type == "mps":
        return "not on this device"
    # A copy: weights turned into float64 and back would be the same, the model's buffers not.
    wide = DecoderStack(copy.deepcopy(stack.model).double(), provenance=stack.provenance)
    return _moved(plain, _means(wide, tokens))


@contextlib.contextmanager
def _restored(restore: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    finally:
        restore()
