"""Tiny datasets of hard tokens: collected with small batches, interrupted, and edited."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cascade.core.provenance import Split
from cascade.corpora.blocks import TokenBlocks
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.hard_tokens.plan import CollectingConfig
from support.reference_early_exit import a_stack

Splits = dict[Split, TokenBlocks]
LENGTH = 12

#: Every batch is a shard of its own.
SMALL_SHARDS = pytest.mark.usefixtures("small_shards")


@functools.cache
def some_splits(train: int = 22, held_out: int = 7, length: int = LENGTH) -> Splits:
    """Return random tokens in records of 10, of which the first 4 are no response text."""
    generator = np.random.default_rng(0)

    def blocks(rows: int, split: Any) -> TokenBlocks:
        place = np.arange(rows * length).reshape(rows, length)
        ids = generator.integers(2, 97, (rows, length)).astype(np.int32)
        records = (place // 10 + 1).astype(np.int32)
        return TokenBlocks(
            ids,
            "random",
            "random",
            9,
            record_of=records,
            response=place % 10 > 3,
            record_split=split,
        )

    return {"train": blocks(train, "train"), "held-out": blocks(held_out, "held-out")}


def collect(
    folder: Path,
    family: str = "llama",
    *,
    splits: Splits | None = None,
    progress: Callable[[int], None] | None = None,
    overwrite: bool = False,
    reuse: bool = False,
    **settings: Any,
) -> HardTokens:
    """Collect at layer 3 of 4, half of the tokens hard, 4 sequences in a batch."""
    usual: dict[str, Any] = {"layer": 3, "hard_ratio": 0.5, "batch_size": 4}
    return collect_hard(
        a_stack(family),
        some_splits() if splits is None else splits,
        folder,
        CollectingConfig(**(usual | settings)),
        progress=progress,
        overwrite=overwrite,
        reuse=reuse,
    )


def everything(found: HardTokens, split: str, batch_size: int = 5) -> dict[str, torch.Tensor]:
    batches = list(found.batches(split, batch_size))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def edited(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


class Stopped(BaseException):
    """As Ctrl-C: not an error."""


def stop_after(tokens: int) -> Callable[[int], None]:
    left = tokens

    def progress(done: int) -> None:
        nonlocal left
        left -= done
        if left <= 0:
            raise Stopped

    return progress
