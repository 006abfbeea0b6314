"""Test results of the benchmark of decoding: agreement, counted rows, skipping and targets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.tiny_models import random_ids, tiny_model

from cascade.benchmarks.decoding_results import (
    GeneratedRow,
    Skipping,
    decoding_targets,
    generated_rows,
    share_equal,
    skipping_rows,
)
from cascade.benchmarks.records import Ratio
from cascade.decoding.early_exit import EarlyExit
from cascade.models.flops import Counts, flops
from cascade.models.stack import DecoderStack


def test_agreement_is_the_share_of_equal_new_tokens() -> None:
    stack, ids = DecoderStack(tiny_model("llama")), random_ids(2, 6)
    early = EarlyExit(stack)
    made: Any = early.generate(ids, max_new_tokens=4, eos_token_id=(), return_dict_in_generate=True)
    other = made.sequences.clone()
    other[0, 7] += 1  # the second of eight new tokens
    rows = generated_rows({"generate": [other], "full": [made]}, 6, 4)
    assert rows["full"].agreement == 7 / 8
    assert rows["generate"] == GeneratedRow(agreement=1.0)


def test_operations_follow_from_the_counts() -> None:
    stack = DecoderStack(tiny_model("llama"))
    early = EarlyExit(stack, layer=1, rule="fixed", threshold=-math.inf)
    first = {"full": EarlyExit(stack).score(random_ids()), "frozen": early.score(random_ids())}
    ratios = [Ratio(name="frozen/full", median=0.5, interval=[0.4, 0.6], rounds=[])]
    (row,) = skipping_rows(stack, first, ratios)
    expected = flops(stack, first["frozen"].counts) / flops(stack, first["full"].counts)
    assert row.flops_ratio == expected < 0.8
    assert row.exit_share == 1.0
    assert row.excess == 0.5 / expected
    assert row.interval == pytest.approx([0.4 / expected, 0.6 / expected])


def test_a_missed_target_is_not_met() -> None:
    full = Ratio(name="full/generate", median=1.1, interval=[1.05, 1.2], rounds=[])
    equal = share_equal(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 5]]), 2)
    skipping = Skipping(
        name="frozen at 8",
        exit_share=0.7,
        seconds_ratio=1.3,
        flops_ratio=1.0,
        excess=1.3,
        interval=[1.2, 1.4],
    )
    rows = decoding_targets(full, equal, [skipping])
    assert [row.met for row in rows] == [False, False, False]
    assert [row.measured for row in rows] == [1.1, 0.5, 1.3]
    # Equality is guaranteed only in fp32, and skipping is measured only with scoring.
    assert [row.met for row in decoding_targets(full, None, ())] == [False, None, None]


def test_counts_of_several_batches_add_up() -> None:
    stack = DecoderStack(tiny_model("llama"))
    early = EarlyExit(stack)
    made: list[Any] = [
        early.generate(
            random_ids(1, 6, seed=seed),
            max_new_tokens=3,
            eos_token_id=(),
            return_dict_in_generate=True,
        )
        for seed in (0, 1)
    ]
    rows = generated_rows({"generate": [batch.sequences for batch in made], "full": made}, 6, 4)
    expected: Counts = made[0].counts + made[1].counts
    assert rows["full"].counts == expected.record()
    assert rows["full"].layers_per_token == 4.0
