"""Lossless decoding on the real model: the text of `generate` of transformers, in fewer passes.

A few prompts are decoded by default. `-m slow` decodes a hundred in each dtype; its record is
stored, and made again with `--force-regen`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade import EarlyExit, load
from cascade.benchmarks.lossless.config import LosslessBenchmarkConfig
from cascade.benchmarks.lossless.prompts import read_prompts
from cascade.core.provenance import processor_name
from cascade.decoding.growing_text import Generation

RECORD = Path(__file__).with_suffix("") / "record.json"

#: What is drafted must not depend on the speed of this machine: passes over up to eight tokens
#: take nearly as long as over one.
COSTS = [1.0 + 0.05 * rows for rows in range(16)]

#: The dtypes, with the least tokens per pass of the stored record that a change may cost.
BUDGET = {"float32": 0.95, "bfloat16": 0.95}


@functools.cache
def early_of(dtype: str) -> EarlyExit:
    return EarlyExit(load("smollm2-135m", dtype=dtype))


def prompts(early: EarlyExit, count: int, new: int) -> list[Tensor]:
    """Return held-out records of the embedded corpus as chats, half of them texts to rewrite."""
    kinds = ("instructions", "rewriting")
    config = LosslessBenchmarkConfig(kinds=kinds, prompts=(count + 1) // 2, new_tokens=new)
    stack = early.stack
    sets = read_prompts(config, stack.tokenizer, stack.max_positions).kinds
    pairs = zip(*(sets[kind] for kind in kinds), strict=True)
    return [torch.tensor([ids]) for pair in pairs for ids in pair][:count]


def decoded(dtype: str, count: int, new: int) -> dict[str, Any]:
    """Decode prompts with and without drafts; return what was counted."""
    early = early_of(dtype)
    model: Any = early.stack.model
    counts = {"prompts": 0, "tokens": 0, "passes": 0, "drafted": 0, "accepted": 0}
    different = []
    for number, ids in enumerate(prompts(early, count, new)):
        own = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
        )
        made = early.generate(
            ids,
            torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            verify=True,
            pass_costs=COSTS,
            return_dict_in_generate=True,
        )
        assert isinstance(made, Generation)
        if not torch.equal(made.sequences, own):
            different.append(number)
        counts["prompts"] += 1
        counts["tokens"] += made.sequences.shape[1] - ids.shape[1]
        for name in ("passes", "drafted", "accepted"):
            counts[name] += getattr(made, name)
    return {**counts, "different": different, "engine": early_of(dtype).layers.engine.description}  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_are_those_of_transformers(dtype: str) -> None:
    found = decoded(dtype, 3, 32)
    assert found["different"] == []
    assert found["accepted"] > 0
    assert found["tokens"] == found["prompts"] + found["passes"] + found["accepted"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hundred_texts_are_those_of_transformers(
    dtype: str, request: pytest.FixtureRequest
) -> None:
    found = decoded(dtype, 100, 128)
    found |= {"processor": processor_name(), "torch": str(torch.__version__)}
    if request.config.getoption("force_regen"):
        RECORD.parent.mkdir(exist_ok=True)
        kept = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        RECORD.write_text(json.dumps(kept | {dtype: found}, indent=1) + "\n")
    assert found["different"] == []
    stored = json.loads(RECORD.read_text())[dtype]
    speed = found["tokens"] / found["passes"]
    assert speed >= BUDGET[dtype] * stored["tokens"] / stored["passes"]
