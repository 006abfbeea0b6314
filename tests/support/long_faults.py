"""Faults that only long sequences show, on tiny models of the families concerned, and SmolLM2.

Each is a context manager, as those of `support.faults`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from support.faults import Fault, Plant, attribute_of
from support.tiny_models import tiny_model

#: Positions of the tiny models, the quarter beyond which positions break, and their windows.
POSITIONS, QUARTER, WINDOW = 512, 128, 64
#: Tokens of the short sequences.
LENGTH = 16

_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_SINKS = {"sliding_window": WINDOW, "layer_types": _ALTERNATING}
_SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": QUARTER},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": QUARTER,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": QUARTER,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
    },
}


@dataclass(frozen=True)
class LongFault:
    """One fault of a tiny model.

    Attributes:
        family: The family of the model.
        fault: The fault, and what the gate is to make of it.
        begins: The first position that moves; None if the short sequences move too.
        changes: Settings of the model.
    """

    family: str
    fault: Fault
    begins: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)


def long_stack(family: str, **changes: Any) -> DecoderStack:
    """Return a tiny model of four layers with 512 positions."""
    positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
    if family == "mpt":
        positions = "max_seq_len"
    given = {} if family == "bloom" else {positions: POSITIONS}
    about = {"name": "tiny", "weights_hash": "w", "tokenizer_hash": "t"}
    stack = DecoderStack(tiny_model(family, **given | changes), provenance=about)
    if stack.max_positions is None:
        stack.max_positions = POSITIONS
    return stack


def long_blocks(sequences: int = 80) -> TokenBlocks:
    ids = np.random.default_rng(0).integers(2, 97, (sequences, LENGTH)).astype(np.int32)
    return TokenBlocks(ids, "random", "random", sequences)


# --- Positions -------------------------------------------------------------------------------


def frozen_beyond(positions: int) -> Plant:
    """Let every later token have the rotary position `positions`."""
    return changed_positions(lambda ids: ids.clamp(max=positions - 1))


def changed_positions(change: Callable[[Tensor], Tensor]) -> Plant:
    """Change the rotary positions of all tokens."""

    def plant(stack: DecoderStack) -> Any:
        rotary: Any = stack.decoder.rotary_emb
        right = rotary.forward

        def forward(x: Tensor, position_ids: Tensor, *rest: Any, **named: Any) -> Any:
            return right(x, change(position_ids), *rest, **named)

        return attribute_of(rotary, "forward", forward)

    return plant


def in_bf16(ids: Tensor) -> Tensor:
    """Return positions as they are in bf16, which has no odd numbers above 256."""
    return ids.bfloat16().float()


def frozen_learned_positions(stack: DecoderStack) -> Any:
    """Let every later token have the learned position 128 of GPT-2."""
    table: Any = stack.decoder.wpe
    right = table.forward
    return attribute_of(table, "forward", lambda ids: right(ids.clamp(max=QUARTER - 1)))


def other_rope(positions: int | None = None, **changes: Any) -> Plant:
    """Make the rotary embedding again, from other parameters than the config's."""

    def plant(stack: DecoderStack) -> Any:
        config = copy.deepcopy(stack.model.config)
        config.rope_parameters = {**config.rope_parameters, **changes}
        config.max_position_embeddings = positions or config.max_position_embeddings
        rotary: Any = stack.decoder.rotary_emb
        return attribute_of(rotary, "forward", type(rotary)(config).forward)

    return plant


def original_length(tokens: int) -> Plant:
    return other_rope(original_max_position_embeddings=tokens)


def changed_alibi(change: Callable[[Tensor], Tensor]) -> Plant:
    """Change the ALiBi biases that the layers take."""

    @contextlib.contextmanager
    def plant(stack: DecoderStack) -> Iterator[None]:
        def hook(_: Any, args: Any, named: dict[str, Any]) -> Any:
            name = "alibi" if "alibi" in named else "position_bias"
            return args, named | {name: change(named[name])}

        hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in stack.layers]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()

    return plant


def _saturated(alibi: Tensor) -> Tensor:
    """Return biases that no longer grow with the position beyond 128."""
    return alibi[..., torch.arange(alibi.shape[-1]).clamp(max=QUARTER - 1)]


# --- Windows and sinks -----------------------------------------------------------------------

_FULL, _SLIDING = "create_causal_mask", "create_sliding_window_causal_mask"


def other_mask(name: str, make: Callable[[Any], Callable[..., Any]]) -> Plant:
    """Let a family's code make one of its masks in another way.

    Args:
        name: The function that makes the mask.
        make: Returns what is called instead of it, given the module of the family.
    """

    def plant(stack: DecoderStack) -> Any:
        module = importlib.import_module(type(stack.decoder).__module__)
        return attribute_of(module, name, make(module))

    return plant


def window_longer_by(tokens: int) -> Plant:
    def make(module: Any) -> Callable[..., Any]:
        right = getattr(module, _SLIDING)

        def made(config: Any, **named: Any) -> Any:
            other = copy.deepcopy(config)
            other.sliding_window += tokens
            return right(config=other, **named)

        return made

    return other_mask(_SLIDING, make)


WINDOW_IGNORED = other_mask(_SLIDING, lambda module: getattr(module, _FULL))
WINDOW_EVERYWHERE = other_mask(_FULL, lambda module: getattr(module, _SLIDING))


def window_in_layer(layer: int, tokens: int) -> Plant:
    """Let one layer of a model without a window see only so many tokens."""

    def plant(stack: DecoderStack) -> Any:
        attention: Any = stack.layers[layer - 1].self_attn
        right = attention.forward

        def forward(hidden_states: Tensor, *args: Any, **named: Any) -> Any:
            at = torch.arange(hidden_states.shape[1])
            distance = at[:, None] - at
            seen = (distance >= 0) & (distance < tokens)
            return right(hidden_states, *args, **named | {"attention_mask": seen[None, None]})

        return attribute_of(attention, "forward", forward)

    return plant


@contextlib.contextmanager
def without_sinks(stack: DecoderStack) -> Iterator[None]:
    """Drop the attention sinks of all layers."""
    with contextlib.ExitStack() as restore:
        for layer in stack.layers:
            sinks: Any = layer.self_attn.sinks  # type: ignore[union-attr]
            restore.enter_context(attribute_of(sinks, "data", torch.full_like(sinks.data, -1e9)))
        yield


def sinks_dropped_beyond(positions: int) -> Plant:
    """Drop the attention sinks of later tokens, as a kernel does that computes blocks of keys."""

    @contextlib.contextmanager
    def plant(stack: DecoderStack) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for layer in stack.layers:
                attention: Any = layer.self_attn
                patch.setattr(attention, "forward", _partly_without_sinks(attention, positions))
            yield

    return plant


def _partly_without_sinks(attention: Any, positions: int) -> Callable[..., Any]:
    right = attention.forward

    def forward(*args: Any, **named: Any) -> Any:
        output, *rest = right(*args, **named)
        with attribute_of(attention.sinks, "data", torch.full_like(attention.sinks.data, -1e9)):
            other = right(*args, **named)[0]
        return torch.cat([output[:, :positions], other[:, positions:]], dim=1), *rest

    return forward


# --- The faults ------------------------------------------------------------------------------


def _of(
    what: str,
    plant: Plant,
    layer: str | None,
    cause: str = "long context",
    named: str | None = None,
) -> Fault:
    return Fault(what, plant, cause, layer, named=named)


#: Names of causes.
_FREQUENCIES, _SLIDING_WINDOW = "rotary frequencies", "sliding window"


def _rope(kind: str, what: str, cause: str, plant: Plant) -> LongFault:
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **_SCALED[kind]}
    changes: dict[str, Any] = {"num_attention_heads": 2, "rope_parameters": parameters}
    if kind == "dynamic":  # the config has the positions before the scaling
        changes["max_position_embeddings"] = QUARTER
    fault = _of(f"RoPE scaling ({kind}): {what}", plant, "1", cause, _FREQUENCIES)
    return LongFault("llama", fault, 1 if cause == "long context" else None, changes)


def _window(family: str, layers: tuple[str, str], **changes: Any) -> dict[str, LongFault]:
    """Return the faults of a window; `layers` are the first with one and the first without."""
    window = changes | {"sliding_window": WINDOW}
    longer = _of(
        "sliding window one token longer", window_longer_by(1), layers[0], named=_SLIDING_WINDOW
    )
    shorter = _of(
        "sliding window one token shorter", window_longer_by(-1), layers[0], named=_SLIDING_WINDOW
    )
    ignored = _of("sliding window ignored", WINDOW_IGNORED, layers[0], named=_SLIDING_WINDOW)
    everywhere = _of(
        "sliding window in all layers", WINDOW_EVERYWHERE, layers[1], named=_SLIDING_WINDOW
    )
    found = {
        f"{family} longer": LongFault(family, longer, WINDOW + 1, window),
        f"{family} shorter": LongFault(family, shorter, 1, window),
        f"{family} ignored": LongFault(family, ignored, WINDOW + 1, window),
    }
    if layers[1]:
        found[f"{family} everywhere"] = LongFault(family, everywhere, WINDOW + 1, window)
    return found


LONG_FAULTS = {
    "llama frozen": LongFault(
        "llama",
        _of("positions frozen beyond 128", frozen_beyond(QUARTER), "1", named=_FREQUENCIES),
        QUARTER + 1,
    ),
    "gpt2 frozen": LongFault(
        "gpt2",
        _of("learned positions frozen beyond 128", frozen_learned_positions, "1"),
        QUARTER + 1,
    ),
    "llama bf16": LongFault(
        "llama",
        _of("positions rounded to bf16", changed_positions(in_bf16), "1", named=_FREQUENCIES),
        257,
    ),
    **_window("mistral", ("1", "")),
    **_window("gemma2", ("1", "2"), layer_types=_ALTERNATING),
    **_window("gemma3_text", ("1", "2"), layer_types=_ALTERNATING),
    **_window("qwen2", ("3", "1"), use_sliding_window=True, max_window_layers=2),
    "dynamic ignored": _rope("dynamic", "ignored", "long context", other_rope(rope_type="default")),
    "dynamic factor": _rope(
        "dynamic", "factor 2 instead of 4", "long context", other_rope(factor=2.0)
    ),
    "dynamic original": _rope(
        "dynamic", "original length 256 instead of 128", "long context", other_rope(256)
    ),
    "longrope ignored": _rope(
        "longrope", "factors of short texts", "long context", other_rope(long_factor=[1.0] * 8)
    ),
    "longrope original": _rope(
        "longrope", "original length 512 instead of 128", "model", original_length(512)
    ),
    "linear ignored": _rope("linear", "factor ignored", "model", other_rope(factor=1.0)),
    "yarn ignored": _rope("yarn", "factor ignored", "model", other_rope(factor=1.0)),
    # Slow frequencies hardly turn within 16 tokens, so the rows alone look like rounding.
    "yarn original": _rope(
        "yarn", "original length 512 instead of 128", "model", original_length(512)
    ),
    "llama3 ignored": _rope("llama3", "factor ignored", "model", other_rope(factor=1.0)),
    "llama3 original": _rope(
        "llama3", "original length 512 instead of 128", "model", original_length(512)
    ),
    "sinks": LongFault(
        "gpt_oss",
        _of("attention sinks dropped", without_sinks, "1", "model", "weights changed"),
        None,
        _SINKS,
    ),
    "sinks beyond": LongFault(
        "gpt_oss",
        _of("attention sinks dropped beyond 128", sinks_dropped_beyond(QUARTER), "1"),
        QUARTER + 1,
        _SINKS,
    ),
    **_window("gpt_oss", ("1", "2"), **_SINKS),
    "bloom slopes": LongFault(
        "bloom", _of("ALiBi slopes x 2", changed_alibi(lambda a: a * 2), None, "numerics")
    ),
    "bloom saturated": LongFault(
        "bloom", _of("ALiBi biases frozen beyond 128", changed_alibi(_saturated), "1"), QUARTER + 1
    ),
    "mpt slopes": LongFault(
        "mpt", _of("ALiBi slopes x 2", changed_alibi(lambda a: a * 2), "1", "model")
    ),
}

#: Faults of SmolLM2-135M, whose positions go to 8,192, for `tests/suites/test_sensitivity.py`.
REAL_LONG_FAULTS = {
    "long 512": _of("positions frozen beyond 512", frozen_beyond(512), "1", named=_FREQUENCIES),
    "long 1920": _of("positions frozen beyond 1,920", frozen_beyond(1920), "1", named=_FREQUENCIES),
    "long bf16": _of(
        "positions rounded to bf16", changed_positions(in_bf16), "1", named=_FREQUENCIES
    ),
    "long window": _of("layer 13 sees only 1,024 tokens", window_in_layer(13, 1024), "13"),
    "long window short": _of(
        "layer 13 sees all but the farthest of 2,048 tokens", window_in_layer(13, 2047), "13"
    ),
}
