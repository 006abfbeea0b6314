"""The variants of the benchmark of lossless decoding: whole calls of `generate`, all greedy."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade.core.errors import UsageError, first_line
from cascade.decoding.drafting.proposers import Proposer
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.engine.engine import EngineKind
from cascade.decoding.generation import ExitConfig, Verification, generate
from cascade.decoding.generation_settings import DecodingConfig, plain_settings
from cascade.decoding.growing_text import Generation
from cascade.decoding.inputs import make_chunk
from cascade.models.stack import DecoderStack

#: The variant that all others are compared with.
REFERENCE = "generate"

#: Tokens that `prompt_lookup_num_tokens` copies.
_LOOKUP_TOKENS = 10

#: Tokens that the drafter alone drafts at most, as `EarlyExit.generate` does.
_DRAFT_LENGTH = 8

#: Batches that `assistant_early_exit` is timed on, which makes 2 to 4 tokens/s on two cores.
SLOW_BATCHES = 3


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are continued together.

    Attributes:
        ids: Token ids, padded on the left, `[B, T]`.
        mask: 1 for tokens and 0 for padding, `[B, T]`.
        new_tokens: Maximum number of new tokens.
        capacity: Columns of a static cache, which all batches of a cell fit into.
    """

    ids: Tensor
    mask: Tensor
    new_tokens: int
    capacity: int


@dataclass(frozen=True)
class Made:
    """What a variant made of a batch.

    Attributes:
        sequences: Prompts and new tokens, `[B, T + new]`.
        generation: The generation with its counts, if this package made it.
    """

    sequences: Tensor
    generation: Generation | None = None


@dataclass(frozen=True)
class DecodingVariant:
    """A variant.

    Attributes:
        what: Description of the variant.
        run: Continues a batch.
        most: Number of batches that it is timed on; None for all.
    """

    what: str
    run: Callable[[PromptBatch], Made]
    most: int | None = None


def variants_of(
    stack: DecoderStack, drafter: Proposer | None, *, compiled: bool
) -> dict[str, DecodingVariant]:
    """Return the variants of a model by name, `REFERENCE` first.

    Args:
        stack: The model.
        drafter: A trained drafter; None without one.
        compiled: Whether `generate` with `torch.compile` is one of them.
    """
    own, early = _Own(stack), _Early(stack)
    layer = min(24, max(1, stack.num_layers - 1))
    found = {
        REFERENCE: DecodingVariant("transformers' generate, dynamic cache", own.run),
        "static": DecodingVariant("transformers' generate, static cache", own.with_static_cache),
    }
    if compiled:
        found["compiled"] = DecodingVariant(
            "transformers' generate, static cache and torch.compile", own.compiled
        )
    found |= {
        "prompt-lookup": DecodingVariant(
            f"transformers' generate, prompt_lookup_num_tokens={_LOOKUP_TOKENS}",
            lambda batch: own.run(batch, prompt_lookup_num_tokens=_LOOKUP_TOKENS),
        ),
        "assistant": DecodingVariant(
            f"transformers' generate, assistant_early_exit={layer}",
            lambda batch: own.with_assistant(batch, layer),
            SLOW_BATCHES,
        ),
        "full": DecodingVariant("cascade at full depth, without drafts", early.run),
        "lookup": DecodingVariant(
            "cascade, drafts by n-gram lookup and runner-ups",
            lambda batch: early.run(batch, verify=True),
        ),
    }
    if stack.device.type == "cuda":
        graphs = _Graphs(stack)
        found["graphs"] = DecodingVariant(
            "cascade at full depth in CUDA graphs, static cache, without drafts", graphs.run
        )
        found["graphs-lookup"] = DecodingVariant(
            "the same, drafts by n-gram lookup and runner-ups",
            lambda batch: graphs.run(batch, verify=True),
        )
    if drafter is not None:
        found["table"] = DecodingVariant(
            "cascade, drafts by lookup, runner-ups and the drafter's table",
            lambda batch: early.run(batch, verify=True, drafter=drafter.companions),
        )
        found["network"] = DecodingVariant(
            "cascade, drafts by the drafter's network alone",
            lambda batch: early.with_only([drafter], batch),
        )
        found["drafter"] = DecodingVariant(
            "cascade, drafts by lookup, runner-ups, and the drafter's table and network",
            lambda batch: early.run(batch, verify=True, drafter=drafter),
        )
    return found


def find_reasons(
    variants: Mapping[str, DecodingVariant], batch: PromptBatch
) -> dict[str, str | None]:
    """Run every variant once, which also warms it up. Return why one does not run, or None.

    Args:
        variants: The variants.
        batch: A batch.

    Raises:
        Exception: The reference does not run.
    """
    reasons: dict[str, str | None] = {}
    for name, variant in variants.items():
        try:
            variant.run(batch)
            reasons[name] = None
        except Exception as error:
            # Cache classes, batches, compilers and model families fail in any way.
            if name == REFERENCE:
                raise
            reasons[name] = reason_of(error)
    return reasons


def reason_of(error: Exception) -> str:
    """Return the first line of an error's message, shortened."""
    text = first_line(error)
    return text if len(text) <= 200 else f"{text[:197]}..."


class _Own:
    """Calls of `generate` of `transformers`."""

    def __init__(self, stack: DecoderStack) -> None:
        self.model: Any = stack.model
        self.settings = greedy_settings(stack)
        self.config: Any = stack.decoder.config

    def run(self, batch: PromptBatch, **settings: Any) -> Made:
        """Continue a batch with some settings."""
        with torch.no_grad():
            made: Tensor = self.model.generate(
                batch.ids,
                attention_mask=batch.mask,
                max_new_tokens=batch.new_tokens,
                **self.settings | settings,
            )
        return Made(made)

    def with_static_cache(self, batch: PromptBatch) -> Made:
        """Continue a batch with a static cache, without compilation."""
        return self.run(batch, past_key_values=self._cache(batch), disable_compile=True)

    def compiled(self, batch: PromptBatch) -> Made:
        """Continue a batch with a static cache and compiled passes."""
        from transformers.generation.configuration_utils import CompileConfig

        compiling: Any = CompileConfig(fullgraph=False, mode="default")
        compiling._compile_all_devices = True  # otherwise only accelerators are compiled for
        return self.run(batch, past_key_values=self._cache(batch), compile_config=compiling)

    def with_assistant(self, batch: PromptBatch, layer: int) -> Made:
        """Continue a batch with drafts from a lower layer of the model."""
        depth = self.config.num_hidden_layers
        try:
            return self.run(batch, assistant_early_exit=layer)
        finally:
            self.config.num_hidden_layers = depth  # it does not restore it on errors

    def _cache(self, batch: PromptBatch) -> Any:
        from transformers import StaticCache

        # One size for all batches of a cell, because each size is compiled again.
        return StaticCache(config=self.model.config, max_cache_len=batch.capacity)


class _Early:
    """Calls of this package."""

    def __init__(self, stack: DecoderStack, engine: EngineKind = "auto") -> None:
        self.early = EarlyExit(stack, engine=engine)
        self.settings = greedy_settings(stack)

    def run(self, batch: PromptBatch, **settings: Any) -> Made:
        """Continue a batch with some settings."""
        made = self.early.generate(
            batch.ids,
            batch.mask,
            max_new_tokens=batch.new_tokens,
            return_dict_in_generate=True,
            **self.settings | settings,
        )
        assert isinstance(made, Generation)
        return Made(made.sequences, made)

    @torch.no_grad()
    def with_only(self, proposers: Sequence[Proposer], batch: PromptBatch) -> Made:
        """Continue a batch with drafts by some proposers and no others."""
        stack = self.early.stack
        settings = self.settings | {"max_new_tokens": batch.new_tokens}
        config = DecodingConfig.of(stack, None, settings)
        made = generate(
            self.early.layers,
            ExitConfig((), exact=False, seed=0),
            make_chunk(stack, batch.ids, batch.mask, padding=config.padding),
            config,
            verification=Verification(proposers, _DRAFT_LENGTH),
            streamer=None,
        )
        return Made(made.sequences, made)


class _Graphs:
    """Calls of this package with the engine `graphs`."""

    def __init__(self, stack: DecoderStack) -> None:
        self.stack = stack

    @functools.cached_property
    def early(self) -> _Early:
        """Made on first use, where an error is the reason that the variant does not run."""
        return _Early(self.stack, "graphs")

    def run(self, batch: PromptBatch, **settings: Any) -> Made:
        """Continue a batch.

        Raises:
            UsageError: Other passes took the place of graphs.
        """
        made = self.early.run(batch, **settings)
        engine = None if made.generation is None else made.generation.engine
        if engine is None or not engine.startswith("graphs"):
            raise UsageError(f"expected passes by graphs, got {engine}; leave the variant out")
        return made


def end_tokens(stack: DecoderStack) -> frozenset[int]:
    """Return the model's end-of-sequence tokens."""
    found: Any = stack.model.generation_config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)


def greedy_settings(stack: DecoderStack) -> dict[str, Any]:
    """Return the settings of greedy decoding without what the model's generation config adds."""
    config: Any = stack.model.generation_config
    padding = config.pad_token_id
    if padding is None:
        padding = min(end_tokens(stack), default=0)
    return plain_settings(config) | {"do_sample": False, "pad_token_id": padding}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide warnings of `transformers` about its own arguments inside a `with` block."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
