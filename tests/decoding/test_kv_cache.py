"""The KV cache matches the cache of transformers; selections pack and unpack tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.layer_probes import at, planned, stepped
from support.reference_early_exit import (
    ALL_FAMILIES,
    CLOSE,
    LAYERS,
    a_stack,
    apart,
    some_mask,
)
from support.tiny_models import random_ids
from torch import Tensor
from transformers import DynamicCache

from cascade.decoding.kv_cache import KeyValueCache, Selection


def masks(least: int = 1) -> st.SearchStrategy[Tensor]:
    """Return masks of active tokens `[B, T]` with at least `least` active tokens."""
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 7))
    return shapes.flatmap(
        lambda shape: st.lists(
            st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        ).map(torch.tensor)
    ).filter(lambda active: int(active.sum()) >= least)


# --- Selections and counts --------------------------------------------------------------------


@given(masks())
def test_packed_rows_are_grouped_by_sequence_and_unpacked(active: Tensor) -> None:
    selection = Selection(active, torch.zeros_like(active))
    sequences, packed, place = selection.groups
    assert sequences.tolist() == [row for row, some in enumerate(active.any(dim=1)) if some]
    assert torch.equal(packed.flatten()[place], torch.arange(int(active.sum())))
    assert packed.shape[1] == int(active.sum(dim=1).max())
    # Every place of a group has a token of its sequence, including places that repeat a token.
    assert torch.equal(selection.rows[packed], sequences[:, None].expand_as(packed))
    assert torch.equal(active.nonzero(), torch.stack([selection.rows, selection.columns], dim=1))


@given(masks(least=0), st.booleans())
def test_selection_is_dense_if_packing_saves_nothing(active: Tensor, left: bool) -> None:
    exited = ~active if left else torch.zeros_like(active)
    padded_prompt = not bool(exited.any()) and bool(active.any()) and active.shape[1] > 1
    assert Selection(active, exited).dense == (bool(active.all()) or padded_prompt)


# --- The cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["without_mask", "left_padded"])
@ALL_FAMILIES
def test_cache_filled_in_chunks_matches_transformers(family: str, padded: bool) -> None:
    stack, ids = a_stack(family), random_ids(2, 20)
    mask = some_mask(2, 20) if padded else None
    theirs = DynamicCache()
    plan = planned(stack, ids, mask, theirs)
    expected = stepped(stack, plan.embedded, plan.calls)
    ours = KeyValueCache(LAYERS, 2, 23)
    outputs = []
    for start, stop in ((0, 11), (11, 14), (14, 15), (15, 20)):
        ours.window(start, stop)
        assert ours.get_seq_length() == ours.get_query_offset() == start
        assert ours.get_mask_sizes(stop - start, 0) == (stop, 0)
        plan = planned(stack, ids, mask, ours, start, stop)
        outputs.append(stepped(stack, plan.embedded, plan.calls))
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert apart(torch.cat(outputs, dim=1)[valid], expected[valid]) <= CLOSE
    for index in range(LAYERS):
        keys, values = ours.read(index)
        layer: Any = theirs.layers[index]
        assert apart(at(keys, valid), at(layer.keys, valid)) <= CLOSE
        assert apart(at(values, valid), at(layer.values, valid)) <= CLOSE


def test_put_writes_single_tokens() -> None:
    cache = KeyValueCache(1, 2, 5)
    cache.window(2, 4)
    rows, columns = torch.tensor([0, 1]), torch.tensor([1, 0])
    keys, values = torch.rand(3, 2, 4), torch.rand(3, 2, 4)
    got = cache.put(0, rows, columns, keys, values)
    for states, put in zip(got, (keys, values), strict=True):
        assert states.shape == (2, 3, 4, 4)
        assert torch.equal(states[0, :, 3], put[:, 0])
        assert torch.equal(states[1, :, 2], put[:, 1])
        assert int((states != 0).sum()) == 2 * 3 * 4


def test_packed_updates_write_active_tokens_inside_context() -> None:
    cache = KeyValueCache(1, 2, 3)
    cache.window(0, 3)
    active = torch.tensor([[True, False, True], [False, True, False]])
    states = torch.arange(1.0, 4.0)[None, None, :, None].expand(1, 1, 3, 2)
    with cache.packed(Selection(active, ~active)):
        keys, _ = cache.update(states, states, 0)
    assert keys[:, 0, :, 0].tolist() == [[1, 0, 2], [0, 3, 0]]
    with pytest.raises(ArithmeticError):
        break_off(cache.packed(Selection(active, ~active)))
    whole = torch.ones(2, 1, 3, 2)
    keys, values = cache.update(whole, whole, 0)
    assert bool((keys == 1).all() & (values == 1).all())


def break_off(block: AbstractContextManager[None]) -> None:
    with block:
        raise ArithmeticError


def test_cache_without_keep_accepts_layers_of_any_shape() -> None:
    cache = KeyValueCache(3, 1, 2, keep=False)
    cache.window(0, 2)
    row, column = torch.tensor([0]), torch.tensor([1])
    for index, (heads, width) in enumerate(((2, 4), (2, 8), (1, 8))):
        keys = torch.full((heads, 1, width), index + 1.0)
        got, _ = cache.put(index, row, column, keys, keys)
        assert got.shape == (1, heads, 2, width)
        assert bool((got[:, :, 1] == index + 1).all())
