"""Generation by CUDA graphs on a GPU. What needs no GPU is in tests/decoding/test_graph*.py."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.drafting import Oracle
from support.generating import MASK, PROMPT
from support.graphed import (
    SUPPORTED,
    columns_of,
    generated,
    graphed,
    new_stack,
    own_text,
)
from support.tiny_models import VOCABULARY
from transformers import StaticCache

from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.graphed_forward import Compute, capture_cuda_graph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
]
NEW = 30
PROMPTS = [(PROMPT[:1], None), (PROMPT, None), (PROMPT, MASK)]


def on_gpu(value: Any) -> Any:
    return None if value is None else value.to("cuda")


@pytest.mark.parametrize("family", SUPPORTED)
def test_texts_are_those_of_generate(family: str) -> None:
    early = EarlyExit(new_stack(family, device="cuda"))
    for ids, mask in PROMPTS:
        ids, mask = on_gpu(ids), on_gpu(mask)
        expected = own_text(early.stack, ids, mask, max_new_tokens=NEW)
        made = generated(early, ids, mask, max_new_tokens=NEW)
        assert made.sequences.equal(expected)


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_drafts_do_not_change_the_text(wrong: float) -> None:
    early = EarlyExit(new_stack("llama", device="cuda"))
    ids = on_gpu(PROMPT[:1])
    expected = own_text(early.stack, ids, max_new_tokens=NEW)
    drafter = Oracle({0: expected[0].tolist()}, VOCABULARY, wrong=wrong, length=8)
    made = generated(early, ids, max_new_tokens=NEW, drafter=drafter)
    assert made.sequences.equal(expected)
    assert str(made.engine).startswith("graphs (")
    assert made.drafted > 0


def test_graphs_are_replayed_and_the_forward_is_not_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = []

    def capture(compute: Compute) -> Compute:
        replay = capture_cuda_graph(compute)

        def count() -> None:
            counted.append(1)
            replay()

        return count

    early = graphed(new_stack("llama", device="cuda"), capture)
    ids = on_gpu(PROMPT[:1])
    generated(early, ids, verify=False, max_new_tokens=NEW)
    counted.clear()
    called, kind = [], type(early.stack.model)
    own = kind.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    generated(early, ids, verify=False, max_new_tokens=NEW)
    assert len(counted) == NEW - 1
    assert len(called) == 1  # for the prompt


@pytest.mark.parametrize("family", SUPPORTED)
def test_half_precision_is_that_of_generate_with_the_cache_it_names(family: str) -> None:
    stack = new_stack(family, torch.bfloat16, "cuda")
    early = EarlyExit(stack, engine="graphs")
    for ids, mask in PROMPTS:
        ids, mask = on_gpu(ids), on_gpu(mask)
        made = generated(early, ids, mask, max_new_tokens=NEW)
        usual: dict[str, Any] = {}
        if "rounded as by generate" in str(made.engine):
            cache = StaticCache(config=stack.model.config, max_cache_len=columns_of(made))
            usual = {"past_key_values": cache, "disable_compile": True}
        expected = own_text(stack, ids, mask, max_new_tokens=NEW, **usual)
        assert made.sequences.equal(expected)


def test_half_precision_has_the_bits_of_generate_by_default() -> None:
    for family in SUPPORTED:
        early = EarlyExit(new_stack(family, torch.bfloat16, "cuda"))
        ids = on_gpu(PROMPT[:1])
        expected = own_text(early.stack, ids, max_new_tokens=NEW)
        made = generated(early, ids, max_new_tokens=NEW)
        assert made.sequences.equal(expected)
        assert str(made.engine).startswith("graphs (") or "(no graphs: " in str(made.engine)


def test_a_failed_capture_is_named_and_leaves_the_device_usable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    early = EarlyExit(new_stack("llama", device="cuda"))
    ids, kind, stream = on_gpu(PROMPT[:1]), type(early.stack.model), torch.cuda.current_stream()
    expected = own_text(early.stack, ids, max_new_tokens=NEW)
    own = kind.forward

    @functools.wraps(own)  # with its signature
    def reading(*args: Any, input_ids: Any, **kwargs: Any) -> Any:
        assert int(input_ids.max()) >= 0
        return own(*args, input_ids=input_ids, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", reading)
        made = generated(early, ids, max_new_tokens=NEW)
    assert made.sequences.equal(expected)
    assert "no graphs: a pass cannot be captured" in str(made.engine)
    assert torch.cuda.current_stream() == stream
    again = EarlyExit(new_stack("llama", device="cuda"))
    assert str(generated(again, ids, max_new_tokens=NEW).engine).startswith("graphs (")
