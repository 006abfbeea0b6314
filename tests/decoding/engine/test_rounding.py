"""Another order of sums is found, though it shows in one of tens of thousands of results."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from torch import Tensor
from torch.nn import functional

from cascade.decoding.engine.rounding import differs_from_attention, differs_from_norm

HEAD_DIM = 32


def at(pointer: Any, *shape: int) -> Tensor:
    """Return the bfloat16 numbers at an address."""
    count = torch.Size(shape).numel()
    memory = (ctypes.c_uint16 * count).from_address(pointer.value)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)


class Library(SimpleNamespace):
    """A library that results can be stored for."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def library(*, reverse: bool) -> Any:
    """Return a library that computes what PyTorch does, or the same with sums in reverse order."""

    def attention(
        query: Any, key: Any, value: Any, heads: Any, keys: Any, size: Any, *rest: Any
    ) -> None:
        count, number, width = heads.value, keys.value, size.value
        known = [at(pointer, 1, count, number, width) for pointer in (key, value)]
        if reverse:
            known = [part.flip(2) for part in known]
        found = functional.scaled_dot_product_attention(at(query, 1, count, 1, width), *known)
        at(rest[-1], 1, count, 1, width).copy_(found)

    def norm(weight: Any, inputs: Any, count: Any, size: Any, epsilon: Any, made: Any) -> None:
        shape = (count.value, size.value)
        wide = at(inputs, *shape).float()
        squares = wide.pow(2).flip(1) if reverse else wide.pow(2)
        factor = torch.rsqrt(squares.mean(-1, keepdim=True) + epsilon.value)
        found = at(weight, size.value) * (wide * factor).bfloat16()
        at(made, *shape).copy_(found)

    return Library(cascade_attention=attention, cascade_norm=norm)


@pytest.mark.parametrize("reverse", [False, True])
def test_another_order_of_keys_is_found(reverse: bool) -> None:
    assert differs_from_attention(library(reverse=reverse), HEAD_DIM) == reverse


@pytest.mark.parametrize("reverse", [False, True])
def test_another_order_of_squares_is_found(reverse: bool) -> None:
    norm: Any = tiny_model("llama", hidden_size=576, intermediate_size=32).model.norm
    norm = norm.to(torch.bfloat16)
    with torch.no_grad():
        found = differs_from_norm(library(reverse=reverse), norm, norm.variance_epsilon)
    assert found == reverse
