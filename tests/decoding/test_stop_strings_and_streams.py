"""Stop strings end rows, and streamers receive each token once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.generating import (
    MASK,
    NEW,
    PROMPT,
    Recorder,
    generated,
    own_generate,
    speaking,
)
from support.reference_early_exit import (
    ALL_PROPAGATIONS,
)
from torch import Tensor
from transformers import TextStreamer

from cascade.decoding.early_exit import Propagation


@ALL_PROPAGATIONS
def test_stop_strings_end_rows_and_are_kept(propagation: Propagation) -> None:
    early = speaking(propagation)
    tokenizer: Any = early.stack.tokenizer
    free = generated(early, PROMPT, MASK)
    texts = [tokenizer.decode(row) for row in free.sequences[:, 9:]]
    stops = [tokenizer.decode(free.sequences[0, 11:13]), tokenizer.decode(free.sequences[1, 14:16])]
    result = generated(early, PROMPT, MASK, stop_strings=stops, pad_token_id=1)
    lengths = []
    for row, text in enumerate(texts):
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        length = min(ends) if ends else NEW
        lengths.append(length)
        assert torch.equal(result.sequences[row, : 9 + length], free.sequences[row, : 9 + length])
        assert bool((result.sequences[row, 9 + length :] == 1).all())
    assert lengths[0] <= 4
    assert lengths[1] <= 7
    assert len(set(lengths)) > 1
    one = generated(early, PROMPT, MASK, stop_strings=stops[0], pad_token_id=1)
    assert torch.equal(one.sequences[0, : 9 + lengths[0]], free.sequences[0, : 9 + lengths[0]])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_strings_match_transformers(length: int) -> None:
    early = speaking("frozen", exits=False)
    tokenizer: Any = early.stack.tokenizer
    free = own_generate(early.stack, PROMPT)
    # Without an end token, transformers continues rows that a stop string has ended.
    stops = {"stop_strings": [tokenizer.decode(free[1, 13 : 13 + length])], "eos_token_id": 0}
    assert 0 not in free
    expected = own_generate(early.stack, PROMPT, tokenizer=tokenizer, **stops)
    got = generated(early, PROMPT, pad_token_id=1, **stops).sequences
    assert torch.equal(got, expected)
    assert not torch.equal(got, free)


def test_stop_strings_may_begin_in_the_prompt_as_in_transformers() -> None:
    early = speaking("frozen", exits=False)
    tokenizer: Any = early.stack.tokenizer
    free = own_generate(early.stack, PROMPT[:1])
    # A text within the prompt does not end a row.
    stops = [tokenizer.decode(free[0, 7:10]), tokenizer.decode(free[0, 4:6])]
    settings: dict[str, Any] = {"stop_strings": stops, "eos_token_id": 0}
    expected = own_generate(early.stack, PROMPT[:1], tokenizer=tokenizer, **settings)
    assert expected.shape == (1, 10)
    assert torch.equal(generated(early, PROMPT[:1], **settings).sequences, expected)
    settings["stop_strings"] = stops[1]
    expected = own_generate(early.stack, PROMPT[:1], tokenizer=tokenizer, **settings)
    assert torch.equal(generated(early, PROMPT[:1], **settings).sequences, expected)
    assert expected.shape == (1, 19)


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@ALL_PROPAGATIONS
def test_streamer_receives_prompt_and_each_token_in_order(
    propagation: Propagation, verify: bool
) -> None:
    if verify and propagation != "exact":
        return
    streamer = Recorder()
    early = speaking(propagation)
    result = generated(early, PROMPT[:1], streamer=streamer, verify=verify)
    assert streamer.given[0] == PROMPT[0].tolist()
    assert streamer.given[1:] == [[token] for token in result.sequences[0, 9:].tolist()]
    assert streamer.ended == 1


def test_text_streamer_prints_same_as_transformers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    early = speaking("frozen", exits=False)
    tokenizer: Any = early.stack.tokenizer
    own_generate(early.stack, PROMPT[:1], streamer=TextStreamer(tokenizer))
    expected = capsys.readouterr().out
    generated(early, PROMPT[:1], streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == expected
    assert len(expected) > NEW


def test_streamer_receives_token_before_next_is_generated() -> None:
    early = speaking("frozen")
    passes: list[int] = []

    class Counting(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            passes.append(calls[0])

    calls = [0]
    handle = (
        early.stack.layers[0]
        .get_submodule("mlp")
        .register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    )
    try:
        generated(early, PROMPT[:1], streamer=Counting())
    finally:
        handle.remove()
    assert passes == list(range(NEW + 1))
