"""Early exit written out plainly: what packing, caching, counting and generating must equal.

Every layer runs over every token, by the model's own forward; what a token that left must not
change is put back by hand.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cascade.core.errors import CascadeError
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import Propagation, make_exit
from cascade.decoding.forward import Exit
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.head_fitting import fit_heads
from cascade.exits.heads import RidgeHead
from cascade.exits.history import HiddenHistory
from cascade.exits.rules import ExitPoint
from cascade.models.stack import DecoderStack
from support.tiny_models import FAMILIES, random_ids, tiny_model

LAYERS = 4
PROPAGATIONS: tuple[Propagation, ...] = ("frozen", "ridge", "exact")

#: The families whose layers are truly skipped; the others fall back, and say so.
SKIPPING = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mistral",
    "smollm3",
    "granite",
    "cohere",
)
ALL_FAMILIES = pytest.mark.parametrize("family", FAMILIES)
SKIPPING_FAMILIES = pytest.mark.parametrize("family", SKIPPING)
ALL_PROPAGATIONS = pytest.mark.parametrize("propagation", PROPAGATIONS)

#: Between two orders of summation in fp32, of logits up to 3, or in parts of larger states. The
#: worst of some thousand mixtures was 1.7e-6, in Gemma 2's states of up to 12; in float64 the same
#: mixture differed by nothing.
CLOSE = 1e-5


@functools.cache
def a_stack(family: str) -> DecoderStack:
    """Return one stack per family, made once; for tests that leave it as it is."""
    return DecoderStack(tiny_model(family))


@functools.cache
def a_bf16_stack(family: str) -> DecoderStack:
    """Return a family's stack in bfloat16, made once; for tests that leave it as it is."""
    return DecoderStack(tiny_model(family).bfloat16())


@functools.cache
def a_settled_stack(family: str) -> DecoderStack:
    """Return a stack whose upper half hardly moves the stream, so that exits often agree."""
    model = tiny_model(family)
    stack = DecoderStack(model)
    with torch.no_grad():
        for layer in stack.layers[2:]:
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(0.35)
    return stack


def random_blocks(sequences: int = 40, length: int = 16) -> TokenBlocks:
    ids = random_ids(sequences, length, seed=7).numpy().astype(np.int32)
    return TokenBlocks(ids, "random", "random", sequences)


@functools.cache
def some_heads(family: str) -> FittedHeads:
    """Return the heads of every layer of a family's stack, fitted on random tokens."""
    return fit_heads(a_stack(family), random_blocks(), range(1, LAYERS + 1))


@functools.cache
def bf16_heads(family: str) -> FittedHeads:
    """Return the heads of every layer of a family's stack in bfloat16."""
    return fit_heads(a_bf16_stack(family), random_blocks(), range(1, LAYERS + 1))


def some_mask(batch: int, length: int, *, left: int = 3) -> Tensor:
    """Return a mask whose first row is padded on the left, `[B, T]`."""
    mask = torch.ones((batch, length), dtype=torch.long)
    mask[0, :left] = 0
    return mask


def positions_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return (mask.cumsum(dim=1) - 1).clamp_min(0)


def visited(stack: DecoderStack, ids: Tensor) -> list[Tensor]:
    """Return the hidden history of the full model, N+1 tensors `[B, T, D]`."""
    history: dict[int, Tensor] = {}
    stack.visit(ids, history.__setitem__)
    return list(history.values())


@torch.no_grad()
def own_logits(stack: DecoderStack, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the model's own logits, `[B, T, V]`, made without anything of ours."""
    padded = {} if mask is None else {"attention_mask": mask}
    if mask is not None and stack.model.config.model_type != "bloom":  # ALiBi asks the mask
        padded["position_ids"] = positions_of(ids, mask)
    logits: Tensor = stack.model(input_ids=ids, use_cache=False, **padded).logits
    return logits


def difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference; NaN where there is a NaN, so never small then."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    return (got - expected).abs().max().item() if got.numel() else 0.0


def apart(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference in parts of the largest expected value, or of 1."""
    return difference(got, expected) / max(1.0, expected.abs().max().item())


def one_line(error: pytest.ExceptionInfo[CascadeError]) -> str:
    """Return a refusal's text, which a user must be able to read as one line."""
    text = str(error.value)
    assert text == text.strip()
    assert "\n" not in text
    return text


# --- Exits that let some tokens go -----------------------------------------------------------

#: Thresholds of rules whose confidences are whole numbers and have no quantiles to speak of.
WHOLE = {"patience": 1.0, "oracle": 1.0}


def confidence(stack: DecoderStack, ids: Tensor, at: Exit) -> Tensor:
    """Return a rule's confidence in every token of the full model, `[B, T]`."""
    point = _point(stack, visited(stack, ids), ids, positions_of(ids, None), at, (), 0)
    return at.rule.confidence(point).view(ids.shape)


def _point(
    stack: DecoderStack,
    history: Sequence[Tensor],
    ids: Tensor,
    positions: Tensor,
    at: Exit,
    earlier: Sequence[Tensor],
    seed: int,
) -> ExitPoint:
    entries = {number: states.flatten(0, 1) for number, states in enumerate(history)}
    return ExitPoint(
        at.layer,
        HiddenHistory(stack.num_layers, entries),
        lambda: head_logits(stack, at, history[at.layer]).flatten(0, 1),
        ids.flatten(),
        positions.flatten(),
        earlier,
        full_prediction=own_logits(stack, ids).argmax(dim=-1).flatten(),
        seed=seed,
    )


def some_exits(
    stack: DecoderStack,
    rule: str = "top2_gap",
    layers: Sequence[int] = (2,),
    *,
    heads: FittedHeads | None = None,
    propagation: Propagation = "frozen",
    share: float = 0.5,
    text: Tensor | None = None,
    seed: int = 0,
) -> list[Exit]:
    """Return exits each of which lets about `share` go of the tokens that come to it.

    The thresholds are quantiles of the rule's own confidences.

    Args:
        stack: The model.
        rule: Its name.
        layers: The exit layers.
        heads: Fitted heads; the logit lens where not given.
        propagation: What the exits are for.
        share: Of the tokens that come to an exit.
        text: `[B, T]`, for the quantiles; what the full model wrote where not given.
        seed: For rules that draw.
    """
    text = written(stack) if text is None else text
    positions = positions_of(text, None)
    exits: list[Exit] = []
    earlier: list[Tensor] = []

    def leaving(layer: int, states: list[Tensor], undecided: Tensor) -> Tensor:
        if layer not in layers:
            return torch.zeros_like(undecided)
        at = make_exit(stack, layer, rule, -math.inf, heads=heads, propagation=propagation)
        point = _point(stack, states, text, positions, at, list(earlier), seed)
        values = at.rule.confidence(point).view(text.shape)
        earlier.append(point.prediction)
        least = values[undecided].double()
        threshold = WHOLE[rule] if rule in WHOLE else least.quantile(1 - share).item()
        exits.append(Exit(layer, at.rule, threshold, at.head, at.propagation))
        return values >= threshold

    ridge = heads if propagation == "ridge" else None
    climb(stack, text, None, leaving, propagation=propagation, heads=ridge)
    return exits


@functools.cache
def written(stack: DecoderStack) -> Tensor:
    """Return random tokens with what the full model wrote after them, `[4, 24]`."""
    ids = random_ids(4, 12, seed=3)
    for _ in range(12):
        following = own_logits(stack, ids)[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, following], dim=1)
    return ids


def is_mixed(exit_layers: Tensor, layers: Sequence[int]) -> bool:
    """Say whether some tokens left at each of the layers, and some went all the way."""
    return {*layers, LAYERS} <= set(exit_layers.flatten().tolist())


# --- The mixed pass --------------------------------------------------------------------------


@dataclass
class ByHand:
    """A pass over given tokens, some of them leaving.

    Attributes:
        exit_layers: `[B, T]`; N where a token went all the way, or is padding.
        logits: `[B, T, V]`; zeros at padding.
        states: N+1 tensors `[B, T, D]`; tokens that left keep their exit state.
        cache: All layers' keys and values, as the model's own forward wrote them.
    """

    exit_layers: Tensor
    logits: Tensor
    states: list[Tensor]
    cache: DynamicCache


#: Takes `(layer, states so far, undecided [B, T])`; returns which leave there, `[B, T]`.
Leaving = Callable[[int, list[Tensor], Tensor], Tensor]


@torch.no_grad()
def climb(
    stack: DecoderStack,
    ids: Tensor,
    mask: Tensor | None,
    leaving: Leaving,
    *,
    propagation: Propagation,
    heads: FittedHeads | None = None,
) -> ByHand:
    """Run every layer over every token; let tokens leave, and put back what they must not change.

    Args:
        stack: The model.
        ids: `[B, T]`.
        mask: `[B, T]` or None.
        leaving: Decides.
        propagation: What upper layers see of tokens that left.
        heads: Where the ridge maps come from.
    """
    cache = DynamicCache()
    plan = stack.plan(
        ids,
        attention_mask=mask,
        position_ids=None if mask is None else positions_of(ids, mask),
        cache=cache,
    )
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    undecided, gone = valid.clone(), torch.zeros_like(valid)
    exit_layers = torch.full_like(ids, stack.num_layers)
    logits = torch.zeros((*ids.shape, stack.vocab_size), dtype=plan.embedded.dtype)
    states = [plan.embedded]
    maps: list[tuple[Tensor, int, Tensor]] = []
    for layer in range(1, stack.num_layers + 1):
        with _with_predictions(stack, heads, layer, states[-1], maps) as entering:
            output = stack.step(layer, entering, plan.calls[layer - 1])
        states.append(torch.where(gone[..., None], states[-1], output))
        out = leaving(layer, states, undecided) & undecided
        undecided = undecided & ~out
        exit_layers[out] = layer
        if propagation != "exact":
            gone = gone | out
        if propagation == "ridge" and layer < stack.num_layers:
            assert heads is not None
            maps.append((out, layer, map_by_hand(heads, layer, states[-1])))
    logits[undecided] = stack.decode(states[-1])[undecided]
    return ByHand(exit_layers, logits, states, cache)


@contextlib.contextmanager
def _with_predictions(
    stack: DecoderStack,
    heads: FittedHeads | None,
    layer: int,
    hidden: Tensor,
    maps: list[tuple[Tensor, int, Tensor]],
) -> Iterator[Tensor]:
    """Give one layer the maps' predictions of exited tokens, as its input or in its k and v."""

    def predict(width: slice, values: Tensor) -> Tensor:
        for out, exit_layer, predicted in maps:
            given = predicted[:, :, layer - exit_layer - 1, width].to(values.dtype)
            values = torch.where(out[..., None], given, values)
        return values

    with contextlib.ExitStack() as restored:
        if heads is None or heads.of_states:
            yield predict(slice(None), hidden)
            return
        attention: Any = stack.layers[layer - 1].self_attn
        halves = (slice(None, heads.width // 2), slice(heads.width // 2, None))
        for projection, half in zip((attention.k_proj, attention.v_proj), halves, strict=True):
            hook = functools.partial(_hook, predict, half)
            restored.callback(projection.register_forward_hook(hook).remove)
        yield hidden


def _hook(
    predict: Callable[[slice, Tensor], Tensor], half: slice, _: nn.Module, __: Any, output: Tensor
) -> Tensor:
    return predict(half, output)


def map_by_hand(heads: FittedHeads, layer: int, hidden: Tensor) -> Tensor:
    """Return what a layer's propagation map says of exit states, `[B, T, upper layers, width]`."""
    weight, bias = heads.maps[layer]
    size = hidden.float().pow(2).mean(dim=-1, keepdim=True).sqrt()
    predicted: Tensor = (hidden.float() / size) @ weight + bias
    if heads.of_states:
        predicted = predicted * size
    return predicted.reshape(*hidden.shape[:-1], -1, heads.width)


@torch.no_grad()
def head_logits(stack: DecoderStack, at: Exit, hidden: Tensor) -> Tensor:
    """Return an exit head's logits of `[B, T, D]`, written out for ridge heads."""
    if not isinstance(at.head, RidgeHead):
        return stack.decode(hidden)
    size = hidden.float().pow(2).mean(dim=-1, keepdim=True).sqrt()
    normed = (hidden.float() / size) @ at.head.weight + at.head.bias
    return stack.decode_normed(normed.to(hidden.dtype))


def by_hand(
    stack: DecoderStack,
    ids: Tensor,
    exits: Sequence[Exit],
    mask: Tensor | None = None,
    *,
    propagation: Propagation,
    heads: FittedHeads | None = None,
    seed: int = 0,
) -> ByHand:
    """Score `[B, T]` token ids with tokens leaving by their exits' rules."""
    positions = positions_of(ids, mask)
    earlier: list[Tensor] = []
    made: list[tuple[Tensor, Tensor]] = []

    def leaving(layer: int, states: list[Tensor], undecided: Tensor) -> Tensor:
        for at in exits:
            if at.layer == layer:
                point = _point(stack, states, ids, positions, at, list(earlier), seed)
                earlier.append(point.prediction)
                out = (at.rule.confidence(point) >= at.threshold).view(ids.shape) & undecided
                made.append((out, point.logits.unflatten(0, ids.shape)[out]))
                return out
        return torch.zeros_like(undecided)

    ridge = heads if propagation == "ridge" else None
    done = climb(stack, ids, mask, leaving, propagation=propagation, heads=ridge)
    for out, logits in made:
        done.logits[out] = logits.to(done.logits.dtype)
    return done


# --- What a model can be left with -----------------------------------------------------------


def state_of(stack: DecoderStack) -> list[Any]:
    """Return all that replacing and hooking could have left behind in a model."""
    modules = [
        {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(module).items()
            if name == "forward" or "hook" in name
        }
        for module in stack.model.modules()
    ]
    own: list[Any] = [module for module in stack.model.modules() if hasattr(module, "config")]
    configs = [module.config._attn_implementation for module in own]
    return [modules, configs, stack.model.training, torch.is_grad_enabled()]
