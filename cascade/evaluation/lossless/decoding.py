"""Continuing prompts without loss and with exits: texts, passes and seconds."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.core.errors import CorpusError, UsageError
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.generation_settings import plain_settings
from cascade.decoding.growing_text import Generation
from cascade.drafters.proposer import TrainedDrafter
from cascade.evaluation.exit_table import Clock
from cascade.evaluation.lossless.records import DecodingMethod, DecodingRow, LosslessFigures
from cascade.models.stack import DecoderStack
from cascade.stats.ratios import student_ratio_interval

#: New tokens of the untimed runs, in which engines are built and the costs of passes are measured.
_WARM_UP = 4

#: A run that takes this many times the median of its way is timed once more. Prompts of one length
#: differ by far less.
_DISTURBED = 2.0

#: Significant digits of the costs of passes, which are stored as they were used.
_DIGITS = 4


@dataclass(frozen=True)
class LosslessConfig:
    """How prompts are continued.

    Attributes:
        prompts: The number of prompts, evenly spaced over the sequences. One per sequence at most.
        prompt_tokens: The number of tokens of a prompt, at most half of a sequence.
        new_tokens: The largest number of new tokens.
        drafter: A trained drafter, measured in addition to the built-in proposers.
        pass_costs: The milliseconds of a pass over 1, 2, ... tokens, which decide how much is
            drafted (default: measured on this machine).

    Example:
        >>> LosslessConfig(prompts=2).new_tokens
        32
    """

    prompts: int = 4
    prompt_tokens: int = 64
    new_tokens: int = 32
    drafter: TrainedDrafter | None = None
    pass_costs: tuple[float, ...] | None = None

    def check(self) -> None:
        """Check that the numbers are large enough.

        Raises:
            UsageError: One is too small; names it.
        """
        for name, least in (("prompts", 2), ("prompt_tokens", 1), ("new_tokens", 2)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"expected {name} of at least {least}, got {value}")


@dataclass(frozen=True)
class Prompts:
    """The prompts, and how far they are continued.

    Attributes:
        ids: Token ids, one `[1, T]` per prompt.
        new_tokens: The largest number of new tokens of each.
        fingerprint: SHA-256 of the prompts.
    """

    ids: Sequence[Tensor]
    new_tokens: int
    fingerprint: str


def prompts_of(blocks: TokenBlocks, config: LosslessConfig, most: int | None) -> Prompts:
    """Return the beginnings of evenly spaced sequences.

    Args:
        blocks: The sequences.
        config: How many prompts, and how long they are.
        most: The model's largest number of positions; None without a limit.

    Raises:
        CorpusError: There are fewer than two sequences, or they leave no room for new tokens.

    Example:
        >>> blocks = TokenBlocks(np.zeros((9, 8), np.int32), "zeros", "zeros", records=9)
        >>> found = prompts_of(blocks, LosslessConfig(), None)
        >>> len(found.ids), tuple(found.ids[0].shape)
        (4, (1, 4))
    """
    config.check()
    sequences, length = blocks.ids.shape
    count = min(config.prompts, sequences)
    if count < 2:
        raise CorpusError(
            f"expected at least 2 sequences to begin prompts with, got {sequences}; use a larger "
            "corpus"
        )
    tokens = min(config.prompt_tokens, max(1, length // 2))
    new = config.new_tokens if most is None else min(config.new_tokens, most - tokens)
    if new < 2:
        raise CorpusError(
            f"expected room for 2 new tokens behind {tokens} of a model with {most} positions; use "
            "a smaller --seq-len"
        )
    places = np.linspace(0, sequences - 1, count).round().astype(int)
    ids = np.ascontiguousarray(blocks.ids[places, :tokens].astype("<i8"))
    return Prompts(
        [torch.from_numpy(row[None].copy()) for row in ids],
        new,
        f"sha256:{hashlib.sha256(ids.tobytes()).hexdigest()}",
    )


@dataclass
class _Way:
    """A way to continue prompts, and what it made.

    Attributes:
        method: Its name in records.
        early: Generates.
        settings: Arguments of `EarlyExit.generate`.
        made: The generation of each prompt.
        seconds: The seconds of each prompt.
    """

    method: DecodingMethod
    early: EarlyExit
    settings: dict[str, Any] = field(default_factory=dict)
    made: list[Generation] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def engine(self) -> str | None:
        """What computed the passes; None for the model's own modules, one token per pass."""
        engine, made = self.early.layers.engine, self.made[0]
        if made.sources is not None:
            return made.engine
        ready = engine is not None and engine.is_ready()
        return engine.description if engine is not None and ready else None

    @property
    def tokens(self) -> list[int]:
        """The number of new tokens of each prompt."""
        return [int((made.exit_layers > 0).sum()) for made in self.made]

    @property
    def per_token(self) -> list[float]:
        """The seconds per new token of each prompt."""
        return [spent / count for spent, count in zip(self.seconds, self.tokens, strict=True)]


def continue_prompts(
    stack: DecoderStack,
    prompts: Prompts,
    config: LosslessConfig,
    *,
    exits: EarlyExit | None = None,
    methods: Sequence[DecodingMethod] = ("engine", "drafts", "drafter", "exits"),
    clock: Callable[[], float] | None = None,
) -> LosslessFigures:
    """Continue each prompt in all ways, one after the other, in rotating order.

    A run that took twice the median of its way or more is timed once more, and the faster time
    counts.

    Args:
        stack: The model.
        prompts: The prompts.
        config: How they are continued.
        exits: Generates with exits; None without an operating point.
        methods: The ways, besides the full model by its own modules.
        clock: Returns seconds, after all work is done (default: the clock of the model's device).

    Raises:
        UsageError: The drafter or the costs of passes are invalid.
        ModelError: Logits are not finite, or the drafter belongs to another model.
    """
    ways = _ways(stack, config, exits, methods)
    settings = plain_settings(stack.model.generation_config)
    now = clock or Clock(stack.device).now

    def run(way: _Way, ids: Tensor, new_tokens: int) -> Generation:
        on_device = ids.to(stack.device)
        given = settings | {"do_sample": False, "max_new_tokens": new_tokens} | way.settings
        made = way.early.generate(
            on_device, torch.ones_like(on_device), return_dict_in_generate=True, **given
        )
        assert isinstance(made, Generation)
        return made

    ways = _warmed(ways, lambda way: run(way, prompts.ids[0], min(_WARM_UP, prompts.new_tokens)))
    for number, ids in enumerate(prompts.ids):
        turn = number % len(ways)
        for way in (*ways[turn:], *ways[:turn]):
            start = now()
            way.made.append(run(way, ids, prompts.new_tokens))
            way.seconds.append(now() - start)
    for way in ways:
        for number in _disturbed(way.per_token):
            start = now()
            run(way, prompts.ids[number], prompts.new_tokens)
            way.seconds[number] = min(way.seconds[number], now() - start)
    drafted = next((way for way in ways if way.method == "drafts"), ways[0])
    return LosslessFigures(
        prompts=len(prompts.ids),
        prompt_tokens=prompts.ids[0].shape[1],
        new_tokens=prompts.new_tokens,
        fingerprint=prompts.fingerprint,
        pass_costs=list(drafted.made[0].pass_costs),
        trees=drafted.made[0].trees,
        drafter=None if config.drafter is None else config.drafter.record.sha256,
        point=None,
        rows=[_row(way, ways[0]) for way in ways],
    )


def _ways(
    stack: DecoderStack,
    config: LosslessConfig,
    exits: EarlyExit | None,
    methods: Sequence[DecodingMethod],
) -> list[_Way]:
    """Return the ways that were asked for and can be measured, the model's own modules first."""
    full = EarlyExit(stack)
    costs = {} if config.pass_costs is None else {"pass_costs": config.pass_costs}
    drafts: dict[str, Any] = {"verify": True, **costs}
    found = [
        _Way("modules", EarlyExit(stack, engine="model")),
        _Way("engine", full),
        _Way("drafts", full, drafts),
    ]
    if config.drafter is not None:
        found.append(_Way("drafter", full, drafts | {"drafter": config.drafter}))
    if exits is not None:
        found.append(_Way("exits", exits))
    return [way for way in found if way.method in ("modules", *methods)]


def _warmed(ways: Sequence[_Way], run: Callable[[_Way], Generation]) -> list[_Way]:
    """Run each way once, untimed. Return the ways, drafting from the costs that were measured.

    Without an engine, "engine" would be the model's own modules again, and is left out.
    """
    found, costs = [], None
    for way in ways:
        made = run(way)
        if way.method == "engine" and made.sources is None:
            continue
        if costs is None and made.pass_costs:
            costs = tuple(float(f"{cost:.{_DIGITS}g}") for cost in made.pass_costs)
        found.append(way)
    return [
        replace(way, settings=way.settings | {"pass_costs": costs})
        if costs is not None and "verify" in way.settings
        else way
        for way in found
    ]


def _disturbed(seconds: Sequence[float]) -> list[int]:
    """Return the runs that other processes must have disturbed: twice the median or more."""
    limit = _DISTURBED * statistics.median(seconds)
    return [number for number, spent in enumerate(seconds) if spent >= limit]


def _row(way: _Way, own: _Way) -> DecodingRow:
    tokens = way.tokens
    passes = sum(made.passes or count - 1 for made, count in zip(way.made, tokens, strict=True))
    interval = student_ratio_interval(way.per_token, own.per_token)
    assert interval is not None  # of two prompts or more
    return DecodingRow(
        method=way.method,
        engine=way.engine,
        tokens_per_pass=(sum(tokens) - len(tokens)) / passes if passes else 1.0,
        tokens=tokens,
        equal=sum(
            made.sequences.equal(other.sequences)
            for made, other in zip(way.made, own.made, strict=True)
        ),
        seconds=way.seconds,
        seconds_ratio=sum(way.per_token) / sum(own.per_token),
        seconds_ratio_interval=interval,
    )
