"""Faults to plant: in a model, in the path from states to numbers, and in what is read.

Each is a context manager that breaks one thing and puts it right again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cascade.corpora import blocks as corpora
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding import forward as passes
from cascade.models.stack import DecoderStack
from cascade.saturation import profile as saturation
from cascade.stats import similarity_statistics as statistics

Plant = Callable[[DecoderStack], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Fault:
    """One fault, and what the gate is to make of it.

    Attributes:
        what: For the table.
        plant: Breaks a model or the path, and mends it on leaving.
        cause: What it has to be attributed to; None where it cannot be seen.
        layer: The layer that has to be named.
        unseen: Why it cannot be seen, and what sees it.
        named: The cause that has to be named; None where none may be named.
    """

    what: str
    plant: Plant
    cause: str | None
    layer: str | None = None
    unseen: str = ""
    named: str | None = None


# --- In the model ----------------------------------------------------------------------------


@contextlib.contextmanager
def weights(module: nn.Module, change: Callable[[], None]) -> Iterator[None]:
    """Change weights in place; they are as before afterwards, to the last bit."""
    before = [(parameter, parameter.data.clone()) for parameter in module.parameters()]
    try:
        change()
        yield
    finally:
        for parameter, values in before:
            parameter.data.copy_(values)


@contextlib.contextmanager
def attribute_of(target: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def rounded_to_int8(weight: Tensor) -> Tensor:
    """Round to nearest with one scale per output, as int8 weights do."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round() * scale


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.ndim == 2]


def scaled_mlp(layer: int, by: float = 1.01) -> Plant:
    def plant(stack: DecoderStack) -> Any:
        down: Any = stack.layers[layer - 1].mlp.down_proj  # type: ignore[union-attr]
        return weights(down, lambda: down.weight.data.mul_(by))

    return plant


def dead_head(layer: int) -> Plant:
    def plant(stack: DecoderStack) -> Any:
        attention: Any = stack.layers[layer - 1].self_attn
        output = attention.o_proj
        return weights(output, lambda: output.weight.data[:, : attention.head_dim].zero_())

    return plant


def int8(*numbers: int) -> Plant:
    def plant(stack: DecoderStack) -> Any:
        layers = nn.ModuleList(stack.layers[number - 1] for number in numbers or _all(stack))

        def change() -> None:
            for parameter in _matrices(layers):
                parameter.data.copy_(rounded_to_int8(parameter.data))

        return weights(layers, change)

    return plant


def _all(stack: DecoderStack) -> range:
    return range(1, stack.num_layers + 1)


def through(dtype: torch.dtype) -> Plant:
    def plant(stack: DecoderStack) -> Any:
        def change() -> None:
            for parameter in stack.model.parameters():
                parameter.data.copy_(parameter.data.to(dtype).float())

        return weights(stack.model, change)

    return plant


def swapped(layer: int) -> Plant:
    """Let two adjacent layers change places, caches and all."""

    @contextlib.contextmanager
    def plant(stack: DecoderStack) -> Iterator[None]:
        one, other = stack.layers[layer - 1], stack.layers[layer]
        pairs = list(zip(one.parameters(), other.parameters(), strict=True))

        def change() -> None:
            for a, b in pairs:
                kept = a.data.clone()
                a.data.copy_(b.data)
                b.data.copy_(kept)

        with weights(nn.ModuleList([one, other]), change):
            yield

    return plant


def skipped(layer: int) -> Plant:
    def plant(stack: DecoderStack) -> Any:
        return attribute_of(
            stack.layers[layer - 1], "forward", lambda hidden_states, **_: hidden_states
        )

    return plant


@contextlib.contextmanager
def rope_base(stack: DecoderStack) -> Iterator[None]:
    rotary: Any = stack.decoder.rotary_emb
    before = rotary.inv_freq.clone()
    width = 2 * len(before)
    steps = torch.arange(0, width, 2, dtype=torch.float32) / width
    rotary.inv_freq.copy_(1.0 / (10_000.0**steps))  # in place of 100,000
    yield
    rotary.inv_freq.copy_(before)


def mask(diagonal: int | None) -> Plant:
    """Let every token see so many that come later; all of them where None."""

    def plant(stack: DecoderStack) -> Any:
        module = __import__(type(stack.decoder).__module__, fromlist=["create_causal_mask"])

        def made(*_: Any, inputs_embeds: Tensor, **__: Any) -> Tensor:
            length = inputs_embeds.shape[1]
            seen = torch.ones((1, 1, length, length), dtype=torch.bool)
            return seen if diagonal is None else seen.tril(diagonal)

        return attribute_of(module, "create_causal_mask", made)

    return plant


@contextlib.contextmanager
def attention_scale(stack: DecoderStack) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for layer in stack.layers:
            attention: Any = layer.self_attn
            patch.setattr(attention, "scaling", attention.scaling * 1.05)
        yield


@contextlib.contextmanager
def shifted_positions(stack: DecoderStack) -> Iterator[None]:
    rotary: Any = stack.decoder.rotary_emb
    forward = rotary.forward
    with attribute_of(
        rotary, "forward", lambda x, position_ids: forward(x, position_ids=position_ids + 1)
    ):
        yield


def norm_epsilon(value: float) -> Plant:
    @contextlib.contextmanager
    def plant(stack: DecoderStack) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module in stack.model.modules():
                if hasattr(module, "variance_epsilon"):
                    patch.setattr(module, "variance_epsilon", value)
            yield

    return plant


def final_norm_of_ones(stack: DecoderStack) -> Any:
    norm: Any = stack.decoder.norm
    return weights(norm, lambda: norm.weight.data.fill_(1.0))


def final_norm_skipped(stack: DecoderStack) -> Any:
    return attribute_of(stack.decoder.norm, "forward", lambda hidden_states: hidden_states)


def wrong_sdpa(_: DecoderStack) -> Any:
    """Let one attention kernel scale its scores by 2 % too much."""
    right = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def wrong(module: nn.Module, *args: Any, scaling: float, **kwargs: Any) -> Any:
        return right(module, *args, scaling=scaling * 1.02, **kwargs)

    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = wrong
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = right

    return plant()


def scaled_in_code(layer: int, by: float = 1.01) -> Plant:
    """Scale what a layer's attention writes, and leave its weights as they are."""

    def plant(stack: DecoderStack) -> Any:
        output: Any = stack.layers[layer - 1].self_attn.o_proj  # type: ignore[union-attr]
        forward = output.forward
        return attribute_of(output, "forward", lambda x: forward(x) * by)

    return plant


# --- In the path from states to numbers ------------------------------------------------------


def _states(stack: DecoderStack, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    states: list[Tensor] = []
    normed = stack.visit(ids, lambda _, hidden: states.append(hidden.float()))
    assert normed is not None
    return states, normed.float()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a, b, dim=-1).clamp(-1, 1)


def wrong_pairs(pairs: Callable[[list[Tensor], Tensor], list[tuple[Tensor, Tensor]]]) -> Plant:
    def plant(_: DecoderStack) -> Any:
        def similarities(stack: DecoderStack, ids: Tensor) -> Tensor:
            states, normed = _states(stack, ids)
            return torch.stack([_cosine(a, b) for a, b in pairs(states, normed)])

        return attribute_of(saturation, "similarities", similarities)

    return plant


def pair_above(states: list[Tensor], normed: Tensor) -> list[tuple[Tensor, Tensor]]:
    shifted = [*states[1:], normed]
    return [*itertools.pairwise(shifted), (states[-2], normed)]


def pair_below(states: list[Tensor], normed: Tensor) -> list[tuple[Tensor, Tensor]]:
    last = len(states) - 1
    # As Python has it: entry -1 is the last one.
    return [*((states[k - 2], states[k - 1]) for k in range(1, last + 1)), (states[-2], normed)]


def swapped_pair(states: list[Tensor], normed: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [*zip(states[1:], states, strict=False), (normed, states[-2])]


def norm_mixed_up(states: list[Tensor], normed: Tensor) -> list[tuple[Tensor, Tensor]]:
    right = list(itertools.pairwise(states))
    return [*right[:-1], (states[-2], normed), (states[-2], normed)]


def never_normed(states: list[Tensor], _: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [*itertools.pairwise(states), (states[-2], states[-1])]


def changed(change: Callable[[Tensor], Tensor]) -> Plant:
    right = saturation.similarities

    def plant(_: DecoderStack) -> Any:
        return attribute_of(
            saturation, "similarities", lambda stack, ids: change(right(stack, ids))
        )

    return plant


def autocast(stack: DecoderStack) -> Any:
    return torch.autocast(stack.device.type, dtype=torch.bfloat16)


def in_bf16(_: DecoderStack) -> Any:
    def similarities(stack: DecoderStack, ids: Tensor) -> Tensor:
        states, normed = _states(stack, ids)
        pairs = [*itertools.pairwise(states), (states[-2], normed)]
        return torch.stack([_cosine(a.bfloat16(), b.bfloat16()).float() for a, b in pairs])

    return attribute_of(saturation, "similarities", similarities)


def wrong_axis(_: DecoderStack) -> Any:
    right = statistics.SimilarityStatistics._rows_of

    def wrong(self: Any, numbers: Any, values: Any, bins: Any) -> Any:
        # Over sequences in place of tokens: the first of them stands for each token.
        across = np.broadcast_to(values.mean(axis=1, keepdims=True), values.shape)
        return right(self, numbers, across[:, :, : len(numbers)], bins[:, :, : len(numbers)])

    return attribute_of(statistics.SimilarityStatistics, "_rows_of", wrong)


def next_bin(_: DecoderStack) -> Any:
    right = statistics.bin_index
    return attribute_of(
        statistics,
        "bin_index",
        lambda similarity: np.minimum(right(similarity) + 1, statistics.BINS - 1),
    )


# --- In what is read, and what is decided ----------------------------------------------------


def begins_with_bos(stack: DecoderStack) -> Any:
    tokenizer: Any = stack.tokenizer

    class Adding:
        """The tokenizer, but every text begins with BOS; its hash is as before."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            made = tokenizer(*args, **kwargs)
            ids = made["input_ids"]
            bos = tokenizer.bos_token_id
            made["input_ids"] = (
                [[bos, *row] if isinstance(row, list) else row for row in ids]
                if ids and isinstance(ids[0], list)
                else [bos, *ids]
            )
            return made

    return attribute_of(stack, "tokenizer", Adding())


def above_only(_: DecoderStack) -> Any:
    """A token exactly at the threshold stays: > in place of >=."""
    right = passes.reaches

    def reaches(confidence: Any, threshold: float) -> Any:
        return right(confidence, float(np.nextafter(np.float32(threshold), np.float32(np.inf))))

    return attribute_of(passes, "reaches", reaches)


@contextlib.contextmanager
def shifted_labels(_: DecoderStack) -> Iterator[None]:
    from cascade.decoding.early_exit import EarlyExit

    right = EarlyExit.score

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        score = right(self, *args, **kwargs)
        predictions = score.predictions.roll(1, dims=1)
        return dataclasses.replace(score, predictions=predictions)

    with attribute_of(EarlyExit, "score", wrong):
        yield


def blocks_for(stack: DecoderStack) -> TokenBlocks:
    """Read the reference corpus with whatever tokenizer the stack has."""
    return corpora.load_blocks("embedded", stack.tokenizer)
