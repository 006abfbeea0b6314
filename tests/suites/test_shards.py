"""The reference model in shards: 4,096 tokens in 1, 2, 7 and 64 shards, to the byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.build_shards import compared

import cascade

pytestmark = pytest.mark.whole


def test_any_number_of_shards_gives_the_bytes_of_one(tmp_path: Path) -> None:
    stack = cascade.load("smollm2-135m")
    blocks = cascade.load_blocks("embedded", stack.tokenizer, seq_len=32, max_tokens=4096)
    one = cascade.analyze(stack, blocks, batch_size=2)
    found = {}
    for shards in (1, 2, 7, 64):
        plan = cascade.plan(
            stack,
            "embedded",
            tmp_path / f"plan-{shards}",
            shards=shards,
            batch_size=2,
            seq_len=32,
            max_tokens=4096,
            long_context=256,
        )
        for number in np.random.default_rng(shards).permutation(shards).tolist():
            cascade.measure_shard(plan, number, model=stack)
        cascade.merge(plan, tmp_path / f"run-{shards}")
        found[shards] = compared(tmp_path / f"run-{shards}")
    assert all(each == found[1] for each in found.values())
    profile = cascade.read_profile(tmp_path / "run-64")
    assert profile.record().layers == one.record().layers
    assert np.array_equal(profile.rows.all().statistics(), one.rows.all().statistics())
    state = profile.arrays()
    assert all(np.array_equal(state[name], values) for name, values in one.arrays().items())
