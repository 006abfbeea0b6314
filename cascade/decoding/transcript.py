"""Transcripts: records of a generated text with the layer at which each token exited."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from msgspec import field

from cascade.core.errors import UsageError
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Index,
    Part,
    Share,
    StoredRecord,
    UnsetType,
)
from cascade.corpora.bos import BosRule, bos_rule, prompt_ids
from cascade.models.counts import CountsRecord

# Reports read the record without loading torch. Generating text has loaded it already.
if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from cascade.decoding.drafting.proposers import Proposer
    from cascade.decoding.early_exit import EarlyExit
    from cascade.decoding.engine.engine import EngineKind
    from cascade.decoding.growing_text import Generation
    from cascade.models.stack import DecoderStack


class ExitEntry(Part, frozen=True, kw_only=True):
    """One exit of the model.

    Attributes:
        layer: The exit layer.
        rule: The name of the exit rule.
        head: The name of the exit head.
        threshold: Tokens with a confidence at or above it exit; None: no token exits.
    """

    layer: Count
    rule: str
    head: str
    threshold: float | None


class LayerShare(Part, frozen=True, kw_only=True):
    """The number of new tokens that exited at a layer.

    Attributes:
        layer: An exit layer, or N.
        tokens: The number of tokens.
        share: The share of all new tokens.
    """

    layer: Count
    tokens: Index
    share: Share


class FullGeneration(Part, frozen=True, kw_only=True):
    """The full model's generation from the same prompt.

    Attributes:
        text: The generated text.
        tokens: The number of new tokens.
        same_tokens: The number of leading tokens that both generations share.
        tokens_per_second: New tokens per second.
        speed_ratio: The speed with exits divided by the full model's.
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
        exits: The exits, in ascending order of layers.
        propagation: "frozen", "ridge" or "exact".
        tokens: The text that each new token adds; joined, they are the generated text.
        exit_layers: The layer at which each new token exited; N if it did not exit.
        by_layer: One entry per exit layer and one for N, in ascending order, including those
            without tokens.
        layers_per_token: Layers computed per token, including the prompt's tokens.
        tokens_per_second: New tokens per second.
        counts: The work that was computed.
        verified: Whether the full model confirmed every token.
        drafted: The number of tokens that exits or proposers drafted.
        accepted: The number of drafted tokens that the full model confirmed.
        fallback_reason: Why layers computed every token; None if they skipped exited tokens.
        full: The full model's generation from the same prompt; None without a comparison.
        prompt: The text to continue.
        chat: Whether the prompt is a chat message and the tokens are the answer.
        settings: How tokens were chosen: the settings of the model's generation config and of the
            caller that have an effect, by name; lists and objects as JSON text.
        bos: "yes" if the prompt begins with the tokenizer's BOS token; "no" if the tokenizer would
            have added it.
        passes: With drafts and without exits, the passes of the full model behind the prompt.
        tokens_per_pass: The new tokens per pass, without the one that the prompt's pass gives.
        proposers: What drafted tokens.
        sources: For each new token the number of its proposer, counted from 1; 0 if it was not
            drafted.
        engine: What computed the layers, e.g. "compiled" or "model".
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
    settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    bos: Literal["yes", "no"] | UnsetType = UNSET
    passes: Index | UnsetType = UNSET
    tokens_per_pass: Finite | UnsetType = UNSET
    proposers: list[str] | UnsetType = UNSET
    sources: list[Index] | UnsetType = UNSET
    engine: str | UnsetType = UNSET


#: Settings of the run before the timed ones; a minimum length would not fit.
_ONE_TOKEN = {"max_new_tokens": 1, "min_new_tokens": None, "min_length": None}


def transcribe(
    early: EarlyExit,
    prompt: str,
    settings: Mapping[str, Any] | None = None,
    *,
    chat: bool = False,
    verify: bool = False,
    drafter: Proposer | None = None,
    compare: bool = True,
    full: DecoderStack | None = None,
    bos: str = "auto",
) -> GenerationRecord:
    """Generate a text and return a record of it.

    Args:
        early: The model with its exits.
        prompt: The text to continue.
        settings: Settings of `EarlyExit.generate` by name, e.g. `max_new_tokens`.
        chat: Apply the model's chat template to the prompt.
        verify: Draft tokens, and let the full model confirm them.
        drafter: What drafts tokens in addition, with `verify` and without exits.
        compare: Also generate with the full model, and compare texts and speed. Without exits, the
            full model is computed by its own modules.
        full: The full model (default: the model of `early`).
        bos: Whether the prompt begins with BOS: "auto" (if the tokenizer puts it before a text),
            "yes" or "no". A chat template that writes BOS itself adds no second one.

    Raises:
        UsageError: The model has no tokenizer, chat template or BOS token, or a setting is invalid.
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
    rule = bos_rule(tokenizer, bos)
    ids = _encode(tokenizer, prompt, rule, chat=chat)
    settings = dict(settings or {})
    # Warm up before the timed runs; a few tokens are enough.
    first = ids[:, -8:]
    warm_up = settings | _ONE_TOKEN | {"max_new_tokens": 4 if verify and not early.exits else 1}
    drafting: dict[str, Any] = {"verify": verify, "drafter": drafter}
    early.generate(first, first.new_ones(first.shape), **drafting, **warm_up)
    run = _timed(early, ids, settings | drafting)
    comparison = None
    if compare:
        # Exits save layers of the same engine. Without exits, drafts and the engine save time.
        engine: EngineKind = "auto" if early.exits else "model"
        plain = _timed(EarlyExit(stack, engine=engine), ids, settings)
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
        settings=_recorded(early.stack, settings),
        bos=rule.recorded,
        **_drafts_of(run.made),
    )


def _drafts_of(made: Generation) -> dict[str, Any]:
    """Return the fields of a record that say how a text was drafted without exits."""
    if made.sources is None:
        return {}
    return {
        "passes": made.passes,
        "tokens_per_pass": made.tokens_per_pass,
        "proposers": list(made.proposers),
        "sources": made.sources[0].tolist(),
        "engine": made.engine,
    }


def _recorded(
    stack: DecoderStack, settings: Mapping[str, Any]
) -> dict[str, bool | int | float | str]:
    """Return the settings in effect, as values that a record can hold."""
    from cascade.decoding.generation_settings import DecodingConfig

    used = DecodingConfig.of(stack, None, settings).used_settings()
    return {
        name: value if isinstance(value, bool | int | str) or _is_finite(value) else _text_of(value)
        for name, value in used.items()
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _text_of(value: Any) -> str:
    value = value.to_dict() if hasattr(value, "to_dict") else value
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)


@dataclass(frozen=True)
class _TimedRun:
    """A generation of one row, its new tokens, and its duration in seconds."""

    made: Generation
    tokens: list[int]
    seconds: float

    @property
    def speed(self) -> float:
        """New tokens per second."""
        return len(self.tokens) / self.seconds


def _timed(early: EarlyExit, ids: Tensor, settings: Mapping[str, Any]) -> _TimedRun:
    mask = ids.new_ones(ids.shape)  # all of a prompt is text, even if it has the padding token
    start = time.perf_counter()
    made: Any = early.generate(ids, mask, return_dict_in_generate=True, **settings)
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
    """Return the number of leading tokens that two texts share."""
    same = [a == b for a, b in zip(some, others, strict=False)]
    return same.index(False) if False in same else len(same)


def _tokenizer_of(stack: DecoderStack) -> PreTrainedTokenizerBase:
    if stack.tokenizer is None:
        raise UsageError("a prompt needs a tokenizer, and the model has none; load it with one")
    return stack.tokenizer


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, rule: BosRule, *, chat: bool
) -> Tensor:
    import torch

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("the model's tokenizer has no chat template; omit --chat")
        prompt = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
    return torch.tensor([prompt_ids(tokenizer, prompt, rule)])


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Tensor, new: Sequence[int]) -> list[str]:
    """Return the text that each new token adds; a single token may be only half a letter."""
    before = ids[0].tolist()
    texts = [
        str(tokenizer.decode([*before, *new[:count]])).rstrip("\ufffd")
        for count in range(len(new) + 1)
    ]
    return [after[len(start) :] for start, after in pairwise(texts)]
