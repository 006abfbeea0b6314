"""Passes of a fixed size over a static cache, captured by recording: graphs without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.drafting import FREE, Oracle, Stubborn
from support.generating import MASK, NEW, PROMPT
from support.graphed import (
    NOT_CAPTURED,
    SUPPORTED,
    columns_of,
    generated,
    graphed,
    new_stack,
    own_text,
)
from support.recorded_graphs import RecordedGraphs
from support.stacks import ALL_FAMILIES
from support.tiny_models import VOCABULARY, random_ids
from torch import nn
from transformers import StaticCache

from cascade.core.errors import ModelError
from cascade.decoding.custom_generation import decode
from cascade.decoding.drafting.proposers import Proposer
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.graph_pool import GraphPool
from cascade.decoding.graphed_forward import (
    CacheShape,
    Capture,
    CaptureError,
    GraphedForward,
    graph_obstacle,
)
from cascade.decoding.own_forward import OwnForward
from cascade.models.stack import DecoderStack


@ALL_FAMILIES
def test_every_family_gives_its_own_text(family: str) -> None:
    stack, graphs = new_stack(family), RecordedGraphs()
    if graph_obstacle(stack) is not None:
        assert family not in SUPPORTED
        return
    early = graphed(stack, graphs)
    for ids, mask in ((PROMPT[:1], None), (PROMPT, None), (PROMPT, MASK)):
        made = generated(early, ids, mask)
        assert made.sequences.equal(own_text(stack, ids, mask))
        assert made.engine is not None
        is_captured = family in SUPPORTED and family != NOT_CAPTURED
        assert made.engine.startswith("graphs (static cache of ") == is_captured
        assert ("(no graphs: " in made.engine) != is_captured
    assert bool(graphs.replays) == is_captured


@pytest.mark.parametrize("family", SUPPORTED)
def test_passes_without_capture_give_the_same_text(family: str) -> None:
    early = EarlyExit(new_stack(family), engine="graphs")
    for ids, mask in ((PROMPT[:1], None), (PROMPT, MASK)):
        made = generated(early, ids, mask)
        assert made.sequences.equal(own_text(early.stack, ids, mask))
        assert made.engine is not None
        assert made.engine.startswith("passes of a fixed size, not captured (static cache of ")


@pytest.mark.parametrize(
    "drafter",
    [
        *[
            lambda text, wrong=wrong: Oracle({0: text}, VOCABULARY, wrong=wrong, length=8)
            for wrong in (0.0, 0.3, 1.0)
        ],
        lambda text: Oracle({0: text}, VOCABULARY, wrong=0.3, siblings=2),
        lambda text: Stubborn(text[-3:] * 4),
    ],
)
def test_drafts_do_not_change_the_text(drafter: Any) -> None:
    graphs = RecordedGraphs()
    early = graphed(new_stack("llama"), graphs)
    for seed, length in enumerate((1, 7, 20)):
        ids = random_ids(1, length, seed=seed)
        expected = own_text(early.stack, ids, max_new_tokens=30)
        proposer: Proposer = drafter(expected[0].tolist())
        made = generated(early, ids, max_new_tokens=30, drafter=proposer, draft_length=12)
        assert made.sequences.equal(expected)
        assert made.drafted > 0
        assert made.passes < 29 or made.accepted == 0
    assert graphs.captures == 9  # passes of 1 to 9 tokens, shared by all texts


def test_text_reaches_the_last_position() -> None:
    early = graphed(new_stack("llama"), RecordedGraphs())
    limit = early.stack.max_positions
    assert limit is not None
    ids = random_ids(1, 9)
    expected = own_text(early.stack, ids, max_new_tokens=limit - 9)
    drafter = Oracle({0: expected[0].tolist()}, VOCABULARY, wrong=0.2, length=8)
    made = generated(early, ids, max_new_tokens=limit - 9, drafter=drafter)
    assert made.sequences.equal(expected)
    assert columns_of(made) == limit


@pytest.mark.parametrize("rows", [1, 3])
def test_sampled_text_is_that_of_the_model(rows: int) -> None:
    stack = new_stack("llama")
    early, plain = graphed(stack, RecordedGraphs()), EarlyExit(stack, engine="model")
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.5,
        "seed": 7,
        "repetition_penalty": 1.2,
    }
    mask = MASK[:rows] if rows > 1 else None
    made = generated(early, PROMPT[:rows], mask, **settings)
    own = generated(plain, PROMPT[:rows], mask, verify=False, **settings)
    assert made.sequences.equal(own.sequences)
    assert made.engine is not None
    assert made.engine.startswith("graphs")


def test_rows_that_end_early_stay_padded() -> None:
    early = graphed(new_stack("qwen3"), RecordedGraphs())
    end = int(own_text(early.stack, PROMPT, MASK)[1, 13])
    made = generated(early, PROMPT, MASK, eos_token_id=end)
    assert made.sequences.equal(own_text(early.stack, PROMPT, MASK, eos_token_id=end))


def test_generate_of_transformers_uses_graphs() -> None:
    stack, graphs = new_stack("llama"), RecordedGraphs()
    graphed(stack, graphs)
    fast = decode(stack, engine="graphs", pass_costs=FREE)
    ids = random_ids(1, 8)
    assert own_text(stack, ids, custom_generate=fast).equal(own_text(stack, ids))
    assert graphs.replays
    assert fast.last is not None
    assert str(fast.last.engine).startswith("graphs")


def test_work_is_counted_without_the_comparison() -> None:
    early = graphed(new_stack("llama"), RecordedGraphs())
    for ids in (PROMPT[:1], PROMPT):
        for _ in range(2):
            made = generated(early, ids, verify=False)
            rows, length = ids.shape
            computed = rows * (length + NEW - 1)  # the last new token is never an input
            assert made.counts.layer_rows == [computed] * early.stack.num_layers
            assert made.counts.lm_head_rows == rows * NEW


# --- Half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUPPORTED)
def test_half_precision_is_that_of_generate_with_the_cache_it_names(family: str) -> None:
    stack = new_stack(family, torch.bfloat16)
    early = EarlyExit(stack, engine="graphs")
    for ids, mask in ((PROMPT[:1], None), (PROMPT, MASK)):
        made = generated(early, ids, mask, max_new_tokens=30)
        usual = {}
        if "rounded as by generate" in str(made.engine):
            cache = StaticCache(config=stack.model.config, max_cache_len=columns_of(made))
            usual = {"past_key_values": cache, "disable_compile": True}
        assert made.sequences.equal(own_text(stack, ids, mask, max_new_tokens=30, **usual))


@pytest.mark.parametrize("family", SUPPORTED)
def test_half_precision_is_never_rounded_otherwise_unless_asked_for(family: str) -> None:
    stack = new_stack(family, torch.bfloat16)
    pool = GraphPool(stack, RecordedGraphs(), rounds_as_static=False)
    for batch in (1, 3):
        made = pool.take(batch, 60, 9)
        assert isinstance(made, str) or made.rounding == ""
    stack.engines["passes of graphs"] = pool
    made_text = generated(EarlyExit(stack, engine="graphs"), PROMPT, MASK, max_new_tokens=30)
    assert made_text.sequences.equal(own_text(stack, PROMPT, MASK, max_new_tokens=30))


# --- The forward --------------------------------------------------------------------------------


def forward_of(
    stack: DecoderStack, batch: int = 1, capture: Capture | None = None
) -> GraphedForward:
    return GraphedForward(stack, CacheShape.fitting(stack, batch, 30, 9), capture)


def test_one_capture_serves_all_columns_and_texts() -> None:
    stack, graphs = new_stack("llama"), RecordedGraphs()
    forward = forward_of(stack, capture=graphs)
    for seed in range(3):
        ids = random_ids(1, 20, seed=seed)
        expected = stack.model(ids).logits
        forward.run(ids[:, :5], 0)
        for start in (5, 8, 11, 6, 14):  # also back to an earlier column
            made = forward.run(ids[:, start : start + 3], start)
            torch.testing.assert_close(made, expected[:, start : start + 3], rtol=1e-5, atol=1e-5)
    assert (graphs.captures, graphs.replays) == (1, 15)


def test_rejected_columns_are_hidden_until_they_are_written_again() -> None:
    stack = new_stack("llama")
    ids, other = random_ids(1, 20), random_ids(1, 20, seed=9)
    expected = stack.model(ids).logits
    forward = forward_of(stack, capture=RecordedGraphs())
    forward.run(ids[:, :6], 0)
    forward.run(other[:, 6:14], 6)
    made = forward.run(ids[:, 6:7], 6)  # columns 7 to 13 still have the rejected tokens
    torch.testing.assert_close(made, expected[:, 6:7], rtol=1e-5, atol=1e-5)


def test_padding_of_an_earlier_text_is_forgotten() -> None:
    stack = new_stack("llama")
    forward = forward_of(stack, batch=2, capture=RecordedGraphs())
    ids = random_ids(2, 12)
    positions = (torch.arange(6) - torch.tensor([[3], [0]])).clamp_min(0)
    mask = (torch.arange(6) >= torch.tensor([[3], [0]])).long()
    forward.run(ids[:, :6], 0, attention_mask=mask, position_ids=positions)
    forward.run(ids[:, 6:7], 6)
    forward.run(ids[:, :6], 0)
    made = forward.run(ids[:, 6:8], 6)
    torch.testing.assert_close(made, stack.model(ids).logits[:, 6:8], rtol=1e-5, atol=1e-5)


def test_logits_of_earlier_passes_stay_as_they_were() -> None:
    stack, ids = new_stack("llama"), random_ids(1, 12)
    forward = forward_of(stack, capture=RecordedGraphs())
    forward.run(ids[:, :4], 0)
    first = forward.run(ids[:, 4:5], 4)
    before = first.clone()
    forward.run(ids[:, 5:6], 5)
    assert first.equal(before)


def test_a_cache_made_in_inference_mode_is_used_outside_of_it() -> None:
    early = graphed(new_stack("llama"), RecordedGraphs())
    ids = random_ids(1, 8)
    with torch.inference_mode():
        inside = generated(early, ids)
    outside = generated(early, ids)
    assert outside.sequences.equal(own_text(early.stack, ids))
    assert inside.sequences.equal(outside.sequences)
    assert inside.engine == outside.engine
    assert str(inside.engine).startswith("graphs (")


def test_logits_that_are_not_finite_are_refused() -> None:
    stack = new_stack("gpt2")
    forward = forward_of(stack, capture=RecordedGraphs())
    forward.run(random_ids(1, 4), 0)
    head = stack.lm_head
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.fill_(torch.nan)  # in place: captured passes read it
    with pytest.raises(ModelError, match="the logits of layer 4 are not finite"):
        forward.run(random_ids(1, 1), 4)


def test_operations_that_read_values_back_cannot_be_captured() -> None:
    stack = new_stack("llama")
    own = stack.model.forward

    def reading(*args: Any, **kwargs: Any) -> Any:
        assert int(kwargs["input_ids"].max()) >= 0
        return own(*args, **kwargs)

    stack.model.forward = reading
    forward = GraphedForward(stack, CacheShape(1, 30, 1), RecordedGraphs())
    forward.run(random_ids(1, 4), 0)
    with pytest.raises(CaptureError, match="a pass cannot be captured"):
        forward.run(random_ids(1, 1), 4)


@pytest.mark.parametrize(
    ("capacity", "limit", "most", "expected"),
    [
        (10, None, 9, (1, 256, 9)),
        (256, None, 9, (1, 256, 9)),
        (257, None, 9, (1, 512, 9)),
        (300, 400, 9, (1, 400, 9)),
        (8, 8, 9, (1, 8, 5)),
        (2, 2, 9, (1, 2, 1)),
    ],
)
def test_texts_of_similar_lengths_share_a_shape(
    capacity: int, limit: int | None, most: int, expected: tuple[int, int, int]
) -> None:
    stack: Any = type("Stack", (), {"max_positions": limit})
    assert CacheShape.fitting(stack, 1, capacity, most) == CacheShape(*expected)


def test_the_cache_is_reported_and_allocated_once() -> None:
    stack, ids = new_stack("llama"), random_ids(1, 12)
    forward = forward_of(stack, capture=RecordedGraphs())
    assert forward.cache_bytes == 0
    forward.run(ids[:, :4], 0)
    config = stack.model.config
    width = config.num_key_value_heads * config.head_dim
    assert forward.cache_bytes == 2 * stack.num_layers * forward.shape.columns * width * 4
    place = forward.cache.layers[0].keys.data_ptr()
    forward.run(ids[:, 4:6], 4)
    forward.run(ids, 0)
    assert forward.cache.layers[0].keys.data_ptr() == place


def test_it_can_do_what_the_own_forward_does() -> None:
    stack, ids = new_stack("llama"), random_ids(2, 12)
    own, forward = OwnForward(stack), forward_of(stack, batch=2)
    for start, stop, last in ((0, 6, True), (6, 7, True), (7, 9, False)):
        expected = own.run(ids[:, start:stop], start, last=last)
        made = forward.run(ids[:, start:stop], start, last=last)
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
