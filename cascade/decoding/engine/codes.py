"""Exact codes of weights: fewer bytes to read, the same numbers to the bit."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

#: Weights of a block, which share a scale; and the bytes of a block, by the bits of a code.
_BLOCK, _BYTES = 32, {4: 24, 8: 36}

#: Rows that are tried first, because most weights have no codes.
_TRIED = 4

#: The share of rows with codes from which codes are worth their memory.
_LEAST = 0.9


@dataclass(frozen=True)
class Codes:
    """The codes of a projection.

    Weights that were quantized once, as those of a GGUF file with Q4_0, Q4_1 or Q8_0, are multiples
    of a scale in each block of 32. The codes give the same weights, so results do not change.

    Attributes:
        bits: The bits of a code: 4 or 8.
        codes: The blocks of all rows, as bytes.
        coded: For each row, whether its weights are read from codes.
    """

    bits: int
    codes: Tensor
    coded: Tensor

    @property
    def nbytes(self) -> int:
        """The memory of the codes, in bytes."""
        return self.codes.nbytes + self.coded.nbytes


def codes_of(library: ctypes.CDLL, weight: Tensor) -> Codes | None:
    """Return the codes of a projection, or None if its weights have none.

    Args:
        library: The compiled layers of the weight's dtype.
        weight: `[outputs, inputs]`, contiguous.
    """
    outputs, inputs = weight.shape
    if inputs % _BLOCK or not outputs:
        return None
    places = torch.linspace(0, outputs - 1, min(_TRIED, outputs)).long()
    for bits in _BYTES:
        if _encoded(library, weight[places].contiguous(), bits).coded.all():
            found = _encoded(library, weight, bits)
            if found.coded.float().mean() >= _LEAST:
                return found
    return None


def _encoded(library: ctypes.CDLL, weight: Tensor, bits: int) -> Codes:
    outputs, inputs = weight.shape
    codes = torch.empty(outputs * (inputs // _BLOCK) * _BYTES[bits], dtype=torch.uint8)
    coded = torch.empty(outputs, dtype=torch.uint8)
    library.cascade_encode(
        ctypes.c_void_p(weight.data_ptr()),
        *(ctypes.c_int64(value) for value in (outputs, inputs, bits)),
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(coded.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return Codes(bits, codes, coded)
