"""A tiny model, its corpus, and the same model broken."""

from __future__ import annotations

from typing import Any

import numpy as np

from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from support.tiny_models import tiny_model

SEQUENCES, LENGTH = 40, 16


def blocks_of(sequences: int = SEQUENCES, *, seed: int = 0) -> TokenBlocks:
    ids = np.random.default_rng(seed).integers(2, 97, (sequences, LENGTH)).astype(np.int32)
    return TokenBlocks(ids, "random", "random", sequences)


BLOCKS = blocks_of()


def a_stack(**changes: Any) -> DecoderStack:
    about = {"name": "tiny", "weights_hash": "w", "revision": None, "quantization": None}
    return DecoderStack(
        tiny_model("llama", num_layers=6), provenance=about | {"tokenizer_hash": "t"} | changes
    )


def broken(layer: int = 3, by: float = 1.01) -> DecoderStack:
    stack = a_stack()
    stack.layers[layer - 1].mlp.down_proj.weight.data.mul_(by)
    return stack
