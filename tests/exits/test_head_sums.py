"""Heads are the same bits, whoever summed which batches."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from support.reference_early_exit import a_stack, random_blocks
from support.tiny_models import tiny_model

from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.head_fitting import fit_heads, heads_of
from cascade.exits.head_sums import HeadSums
from cascade.models.stack import DecoderStack

LAYERS, BATCH = [1, 3], 4


@functools.cache
def uneven_stack(family: str) -> DecoderStack:
    """Return a stack whose targets differ by up to 1e9 from batch to batch.

    Sums of float32 numbers of about one size are exact in float64 in any case. These are not: a
    plain sum loses last bits of small batches, which ones depends on the order.
    """
    stack = DecoderStack(tiny_model(family))

    def scale(_: Any, __: Any, output: Any) -> Any:
        values = output[0] if isinstance(output, tuple) else output
        scaled = values * 10.0 ** (int(values[0, 0, 0].abs() * 1e6) % 10 - 5)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    # Targets are keys and values, or the states themselves where layers have no such projections.
    for layer in list(stack.layers)[2:]:
        attention = getattr(layer, "self_attn", None)
        getattr(attention, "k_proj", layer).register_forward_hook(scale)
    return stack


def summed(stack: DecoderStack, parts: list[list[Any]]) -> HeadSums:
    """Return the sums over batches that several tasks added, each from nothing."""
    whole = HeadSums(stack, LAYERS)
    for part in parts:
        sums = HeadSums(stack, LAYERS)
        for ids, numbers in part:
            sums.add(ids, numbers)
        whole.include(sums.arrays())
    return whole


def same(one: FittedHeads, other: FittedHeads) -> bool:
    return all(
        torch.equal(a, b)
        for kind in ("weights", "maps")
        for layer in getattr(one, kind)
        for a, b in zip(getattr(one, kind)[layer], getattr(other, kind)[layer], strict=True)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("tasks", [1, 2, 7, 64])
def test_tasks_of_any_number_and_order_give_the_sums_and_heads_of_one_pass(
    family: str, tasks: int
) -> None:
    stack, blocks = uneven_stack(family), random_blocks(90)
    batches = list(blocks.batches(BATCH))
    mixed = random.Random(tasks)
    parts: list[list[Any]] = [[] for _ in range(tasks)]
    for batch in mixed.sample(batches, len(batches)):
        mixed.choice(parts).append(batch)
    mixed.shuffle(parts)
    sums, whole = summed(stack, parts), summed(stack, [batches])
    arrays = sums.arrays()
    assert all(np.array_equal(arrays[name], part) for name, part in whole.arrays().items())
    expected = fit_heads(stack, blocks, LAYERS, batch_size=BATCH)
    found = heads_of(sums, stack, blocks)
    assert same(found, expected)
    assert found.provenance == expected.provenance


def test_a_batch_that_is_counted_twice_or_left_out_changes_the_heads() -> None:
    blocks = random_blocks(40)
    batches = list(blocks.batches(BATCH))
    whole = heads_of(summed(a_stack("llama"), [batches]), a_stack("llama"), blocks)
    for other in ([batches, batches[:1]], [batches[1:]]):
        assert not same(heads_of(summed(a_stack("llama"), other), a_stack("llama"), blocks), whole)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("1.train.xx.fine", lambda values: values[1:], "expected 1.train.xx.fine of shape"),
        ("3.held-out.xy.coarse", lambda values: values.astype(np.float32), "in float64"),
        ("3.train.yy.fine", lambda values: values * np.nan, "expected finite numbers in"),
        ("count", lambda values: -values, "expected the numbers of tokens"),
        ("count", lambda values: values[:1], "expected the numbers of tokens"),
    ],
)
def test_sums_that_do_not_fit_are_refused(name: str, change: Any, message: str) -> None:
    sums = summed(a_stack("llama"), [list(random_blocks(12).batches(BATCH))])
    arrays = sums.arrays()
    arrays[name] = change(arrays[name])
    with pytest.raises(ValueError, match=message):
        HeadSums(a_stack("llama"), LAYERS).include(arrays)
    del arrays[name]
    with pytest.raises(KeyError):
        HeadSums(a_stack("llama"), LAYERS).include(arrays)
