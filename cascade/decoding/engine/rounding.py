"""Whether compiled layers in bfloat16 round as PyTorch does on this machine.

A sum in another order differs in the last bit of fp32. In bfloat16, only one in tens of thousands
of results of attention shows it, and one in hundreds of thousands of a norm. The engine's self-test
compares too few, so many more are compared here, once per process.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Numbers of keys: below and above one and several vectors, and beyond a block.
_KEYS = (7, 48, 100, 301, 523)

#: Draws for each number of keys; heads of a draw are chosen for `_RESULTS` results in all.
_DRAWS = 4
_RESULTS = 400_000

#: Results of a norm.
_NORMED = 4_000_000


def differs_from_attention(library: ctypes.CDLL, head_dim: int) -> bool:
    """Return whether attention of one query rounds in another way than PyTorch's.

    Args:
        library: The compiled layers in bfloat16.
        head_dim: The width of a head.
    """
    return _differs(library, head_dim, torch.get_num_threads())


@functools.cache
def _differs(library: ctypes.CDLL, head_dim: int, threads: int) -> bool:
    generator = torch.Generator().manual_seed(head_dim)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    heads = -(-_RESULTS // (len(_KEYS) * _DRAWS * head_dim))
    for keys in _KEYS * _DRAWS:
        query = drawn(1, heads, 1, head_dim)
        key, value = drawn(1, heads, keys, head_dim), drawn(1, heads, keys, head_dim)
        expected = functional.scaled_dot_product_attention(query, key, value)
        if not torch.equal(_attention(library, query, key, value), expected):
            return True
    return False


def _attention(library: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention by the compiled layers, `[1, heads, 1, head_dim]`."""
    _, heads, keys, size = key.shape
    scores, made = torch.empty(keys, dtype=torch.float32), torch.empty_like(query)
    library.cascade_attention(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (query, key, value)),
        *(ctypes.c_int64(number) for number in (heads, keys, size)),
        ctypes.c_double(size**-0.5),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (scores, made)),
    )
    return made


def differs_from_norm(library: ctypes.CDLL, norm: nn.Module, epsilon: float) -> bool:
    """Return whether a norm rounds in another way than a module.

    Args:
        library: The compiled layers in bfloat16.
        norm: The module, with a weight `[D]`.
        epsilon: What it adds to the mean of squares.
    """
    weight = norm.weight
    assert isinstance(weight, Tensor)
    key = library, type(norm), len(weight), epsilon
    if key not in _norms:
        _norms[key] = _norm_differs(library, norm, weight, epsilon)
    return _norms[key]


#: What was found in this process.
_norms: dict[Any, bool] = {}


def _norm_differs(library: ctypes.CDLL, norm: nn.Module, weight: Tensor, epsilon: float) -> bool:
    size, generator = len(weight), torch.Generator().manual_seed(len(weight))
    rows = -(-_NORMED // size)
    inputs = torch.randn(rows, size, generator=generator).bfloat16()
    made = torch.empty_like(inputs)
    library.cascade_norm(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, inputs)),
        *(ctypes.c_int64(number) for number in inputs.shape),
        ctypes.c_double(epsilon),
        ctypes.c_void_p(made.data_ptr()),
    )
    return not torch.equal(made, norm(inputs))
