"""Prompts and models to generate with."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import decoders
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from cascade.core.errors import UsageError
from cascade.decoding.early_exit import EarlyExit, Propagation
from cascade.decoding.growing_text import Generation
from cascade.models.stack import DecoderStack
from support.reference_early_exit import (
    a_settled_stack,
    a_stack,
    one_line,
    some_exits,
    some_heads,
    some_mask,
)
from support.tiny_models import random_ids, tiny_model, tiny_tokenizer

INF = math.inf


NEW = 10


PROMPT = random_ids(3, 9, seed=3)


#: The first row is three tokens shorter, padded on the left.
MASK = some_mask(3, 9)


#: Rules that let single tokens go by what they see.
RULES = ("cosine", "mean_cosine", "top2_gap", "max_probability", "entropy", "patience", "random")


#: Rules for families whose tiny models write one token again and again, equally sure of each.
REPEATING = {"gpt2": "cosine", "bloom": "random"}


@functools.cache
def generator(
    family: str,
    propagation: Propagation = "frozen",
    *,
    rule: str = "",
    layers: tuple[int, ...] = (1, 2, 3),
    settled: bool = False,
    skip: bool = True,
) -> EarlyExit:
    """Return early exit whose exits each let about a third of the tokens go."""
    stack = a_settled_stack(family) if settled else a_stack(family)
    heads = None if settled else some_heads(family)
    rule = rule or REPEATING.get(family, "top2_gap")
    exits = some_exits(stack, rule, layers, heads=heads, propagation=propagation, share=0.35)
    return EarlyExit(stack, exits=exits, propagation=propagation, skip=skip)


def generated(early: EarlyExit, *args: Any, **settings: Any) -> Generation:
    """Generate; no token ends a row unless the settings say so."""
    settings = {"max_new_tokens": NEW, "eos_token_id": None} | settings
    result = early.generate(*args, return_dict_in_generate=True, **settings)
    assert isinstance(result, Generation)
    return result


def own_generate(stack: DecoderStack, ids: Tensor, **settings: Any) -> Tensor:
    """Generate as the model's users do, without anything of ours."""
    model: Any = stack.model
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 1} | settings
    settings.setdefault("attention_mask", torch.ones_like(ids))
    sequences: Tensor = model.generate(ids, **settings)
    return sequences


@functools.cache
def own_text(stack: DecoderStack, *, padded: bool = True) -> Tensor:
    """Return what the model writes by itself after the prompts; made once, not to be changed."""
    return own_generate(stack, PROMPT, attention_mask=MASK if padded else torch.ones_like(PROMPT))


def longer(mask: Tensor, sequences: Tensor) -> Tensor:
    """Return a prompt's mask with ones for what was generated."""
    new = mask.new_ones((len(mask), sequences.shape[1] - mask.shape[1]))
    return torch.cat([mask, new], dim=1)


@functools.cache
def own_ended_text(stack: DecoderStack) -> tuple[int, Tensor]:
    """Return a token that the model itself writes, and its text with rows that end there."""
    end = int(own_text(stack)[1, 13])
    return end, own_generate(stack, PROMPT, attention_mask=MASK, eos_token_id=end)


def length_of(tokens: Sequence[int], ends: Sequence[int]) -> int:
    """Return how many tokens a row has, its end included."""
    return next((place for place, token in enumerate(tokens, 1) if token in ends), len(tokens))


def as_tensor(result: Tensor | Generation) -> Tensor:
    assert isinstance(result, Tensor)
    return result


def padding_stack(family: str, **settings: Any) -> DecoderStack:
    """Return a stack whose generation config says how it pads and ends."""
    stack = DecoderStack(tiny_model(family))
    stack.model.generation_config = GenerationConfig(**settings)
    return stack


@functools.cache
def speaking(propagation: Propagation, *, exits: bool = True) -> EarlyExit:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # a character per token, no spaces
    stack = DecoderStack(tiny_model("llama"), tokenizer=tokenizer)
    if not exits:
        return EarlyExit(stack)
    return EarlyExit(
        stack,
        exits=some_exits(stack, layers=(2, 3), heads=some_heads("llama"), propagation=propagation),
        propagation=propagation,
    )


class Recorder(BaseStreamer):
    """Keeps what it is given, and when it ended."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def drawn(early: EarlyExit, ids: Tensor, **settings: Any) -> Tensor:
    """Draw among all tokens, unless the settings say otherwise."""
    return generated(early, ids, do_sample=True, **{"top_k": 0} | settings).sequences


def check_refusal(early: EarlyExit, ids: Any, said: str, **settings: Any) -> None:
    with pytest.raises(UsageError) as error:
        early.generate(ids, **settings)
    assert one_line(error) == said
