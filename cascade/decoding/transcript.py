"""Transcripts: a generated text with the layer at which each token exited, as a record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cascade.core.errors import UsageError
from cascade.core.schema import Count, Finite, Index, Part, Share, StoredRecord
from cascade.models.counts import CountsRecord

# Reports read the record without loading torch; whoever generates has loaded it.
if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from cascade.decoding.early_exit import EarlyExit
    from cascade.decoding.generation import Generation
    from cascade.models.stack import DecoderStack


class ExitEntry(Part, frozen=True, kw_only=True):
    """One exit.

    Attributes:
        layer: The exit layer.
        rule: The name of its rule.
        head: The name of its head.
        threshold: Tokens with a confidence at or above it exit; None: no token does.
    """

    layer: Count
    rule: str
    head: str
    threshold: float | None


class LayerShare(Part, frozen=True, kw_only=True):
    """How many new tokens exited at a layer.

    Attributes:
        layer: An exit layer, or N.
        tokens: How many tokens.
        share: Of all new tokens.
    """

    layer: Count
    tokens: Index
    share: Share


class FullGeneration(Part, frozen=True, kw_only=True):
    """What the full model generated from the same prompt.

    Attributes:
        text: Its text.
        tokens: How many tokens.
        same_tokens: How many first tokens are the same.
        tokens_per_second: New tokens per second.
        speed_ratio: The speed with exits relative to the full model's.
    """

    text: str
    tokens: Index
    same_tokens: Index
    tokens_per_second: Finite
    speed_ratio: Finite


class GenerationRecord(StoredRecord, frozen=True, kw_only=True):
    """A generated text, with the layer at which each token exited.

    Attributes:
        num_layers: N.
        exits: In ascending order of layers.
        propagation: "frozen", "ridge" or "exact".
        tokens: What each new token adds to the text; joined, they are the generated text.
        exit_layers: The layer at which each of them exited; N where it did not.
        by_layer: One entry per exit layer and for N, in ascending order, those without a token
            included.
        layers_per_token: Layers computed per token, the prompt's included.
        tokens_per_second: New tokens per second.
        counts: What was computed.
        verified: Whether the full model confirmed every token.
        drafted: How many tokens an exit proposed.
        accepted: How many of those the full model confirmed.
        fallback_reason: Why layers were computed for every token; None where they were skipped.
        full: What the full model generated from the same prompt; None without a comparison.
        prompt: The text to continue.
        chat: Whether the prompt is a message of a chat and the tokens the answer.
    """

    KIND: ClassVar[str] = "generation"
    COMMAND: ClassVar[str] = "generate"

    schema: int = 1
    kind: Literal["generation"] = "generation"
    num_layers: Count
    exits: list[ExitEntry]
    propagation: Literal["frozen", "ridge", "exact"]
    tokens: list[str]
    exit_layers: list[Index]
    by_layer: list[LayerShare]
    layers_per_token: Finite
    tokens_per_second: Finite
    counts: CountsRecord
    verified: bool
    drafted: Index
    accepted: Index
    fallback_reason: str | None
    full: FullGeneration | None
    prompt: str
    chat: bool


def transcribe(
    early: EarlyExit,
    prompt: str,
    settings: Mapping[str, Any] | None = None,
    *,
    chat: bool = False,
    verify: bool = False,
    compare: bool = True,
    full: DecoderStack | None = None,
) -> GenerationRecord:
    """Generate a text and return a record of it.

    Args:
        early: The model with its exits.
        prompt: The text to continue.
        settings: Settings of `EarlyExit.generate` by name, e.g. `max_new_tokens`.
        chat: Put the prompt into the model's chat template.
        verify: Let the full model confirm every token.
        compare: Generate with the full model, too, and compare texts and speed.
        full: The full model (default: that of `early`).

    Raises:
        UsageError: The model has no tokenizer or no chat template, or a setting is invalid.
        ModelError: A confidence or logits are not finite.

    Example:
        >>> import cascade
        >>> stack = cascade.load("smollm2-135m")
        >>> early = cascade.EarlyExit(stack, layer=29, threshold=0.9517)
        >>> record = transcribe(early, "The capital of France is", {"max_new_tokens": 4})
        >>> len(record.tokens), len(record.exit_layers), record.full.tokens
        (4, 4, 4)
    """
    from cascade.decoding.early_exit import EarlyExit

    stack = early.stack if full is None else full
    tokenizer = _tokenizer_of(stack)
    ids = _encode(tokenizer, prompt, chat=chat)
    settings = dict(settings or {})
    # The first pass warms caches up for the timed ones; some tokens are enough.
    first = ids[:, -8:]
    early.generate(first, first.new_ones(first.shape), **settings | {"max_new_tokens": 1})
    run = _timed(early, ids, settings, verify=verify)
    comparison = None
    if compare:
        plain = _timed(EarlyExit(stack), ids, settings)
        comparison = FullGeneration(
            text="".join(_pieces(tokenizer, ids, plain.tokens)),
            tokens=len(plain.tokens),
            same_tokens=_same_tokens(run.tokens, plain.tokens),
            tokens_per_second=plain.speed,
            speed_ratio=run.speed / plain.speed,
        )
    layers = [int(layer) for layer in run.made.exit_layers[0]]
    return GenerationRecord(
        num_layers=early.stack.num_layers,
        exits=_exits_of(early),
        propagation=early.propagation,
        tokens=_pieces(tokenizer, ids, run.tokens),
        exit_layers=layers,
        by_layer=_by_layer(early, layers),
        layers_per_token=run.made.layers_per_token,
        tokens_per_second=run.speed,
        counts=run.made.counts.record(),
        verified=verify,
        drafted=run.made.drafted,
        accepted=run.made.accepted,
        fallback_reason=early.fallback_reason,
        full=comparison,
        prompt=prompt,
        chat=chat,
    )


@dataclass(frozen=True)
class _TimedRun:
    """A generation of one row, its new tokens, and how long it took, in seconds."""

    made: Generation
    tokens: list[int]
    seconds: float

    @property
    def speed(self) -> float:
        """New tokens per second."""
        return len(self.tokens) / self.seconds


def _timed(
    early: EarlyExit, ids: Tensor, settings: Mapping[str, Any], *, verify: bool = False
) -> _TimedRun:
    mask = ids.new_ones(ids.shape)  # a prompt is text, also where it has the padding token
    start = time.perf_counter()
    made: Any = early.generate(ids, mask, return_dict_in_generate=True, verify=verify, **settings)
    seconds = time.perf_counter() - start
    return _TimedRun(made, made.sequences[0, ids.shape[1] :].tolist(), seconds)


def _exits_of(early: EarlyExit) -> list[ExitEntry]:
    return [
        ExitEntry(
            layer=at.layer,
            rule=at.rule.name,
            head=at.head.name,
            threshold=None if at.threshold == float("inf") else at.threshold,
        )
        for at in early.exits
    ]


def _by_layer(early: EarlyExit, layers: Sequence[int]) -> list[LayerShare]:
    known = sorted({*(at.layer for at in early.exits), early.stack.num_layers})
    return [
        LayerShare(layer=layer, tokens=layers.count(layer), share=layers.count(layer) / len(layers))
        for layer in known
    ]


def _same_tokens(some: Sequence[int], others: Sequence[int]) -> int:
    """Return how many first tokens of two texts are the same."""
    same = [a == b for a, b in zip(some, others, strict=False)]
    return same.index(False) if False in same else len(same)


def _tokenizer_of(stack: DecoderStack) -> PreTrainedTokenizerBase:
    if stack.tokenizer is None:
        raise UsageError("the model has no tokenizer to read a prompt with")
    return stack.tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> Tensor:
    import torch

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("the model's tokenizer has no chat template; leave out --chat")
        prompt = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
    return torch.tensor([tokenizer(prompt, add_special_tokens=not chat)["input_ids"]])


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Tensor, new: Sequence[int]) -> list[str]:
    """Return what each new token adds to the text: decoded alone, some would be half a letter."""
    before = ids[0].tolist()
    texts = [
        str(tokenizer.decode([*before, *new[:count]])).rstrip("\ufffd")
        for count in range(len(new) + 1)
    ]
    return [after[len(start) :] for start, after in pairwise(texts)]
