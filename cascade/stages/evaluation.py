"""Evaluate a cascade: the base alone, the base with each stage, and the controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cascade.core.arguments import check_seed
from cascade.core.arrays import Array
from cascade.core.errors import CorpusError, UsageError
from cascade.core.formatting import ratio_interval_words, ratio_words
from cascade.core.provenance import provenance_of
from cascade.core.schema import UNSET, UnsetType, known
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.decoding.early_exit import EarlyExit
from cascade.models.flops import Counts, flops
from cascade.stages.cascades import Cascade
from cascade.stages.records import (
    CascadeEvaluationRecord,
    CascadeVerdict,
    ControlComparison,
    ExitShare,
    PairedRatio,
    ScopeFigures,
    VariantFigures,
)
from cascade.stats.perplexity import perplexity
from cascade.stats.perplexity_intervals import ratio_interval
from cascade.stats.resampling import draws, interval

#: The scopes of every figure. A token counts by the text that it predicts.
SCOPES = ("all", "easy", "hard", "response", "easy_response", "hard_response")


#: The scopes that the verdict can use.
Scope = Literal["all", "response"]


@dataclass
class _Variant:
    """One row of the table: the base, the cascade up to a stage, or a control."""

    name: str
    early: EarlyExit
    stages: int
    trained_on: str | None
    entered_by: str | None
    cascade: Cascade
    counts: Counts = field(init=False)
    losses: list[Array] = field(default_factory=list)
    hits: list[Array] = field(default_factory=list)
    exit_layers: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = Counts.of(self.early.stack.num_layers)

    def add(self, batch: Tensor) -> None:
        """Score a batch and keep its losses, hits and exits."""
        score = self.early.score(batch, torch.ones_like(batch))
        self.losses.append(-score.log_probabilities.double().cpu().numpy())
        self.hits.append((score.predictions[:, :-1] == batch[:, 1:]).cpu().numpy())
        self.exit_layers.append(score.exit_layers.cpu().numpy())
        self.counts = self.counts + score.counts


def evaluate_cascade(
    cascade: Cascade,
    blocks: TokenBlocks,
    *,
    controls: Mapping[str, Cascade] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> CascadeEvaluationRecord:
    """Measure a cascade on text, stage by stage, and compare it with its controls.

    Easy and hard tokens are those of the first stage's entry. They are the same in every row, so
    rows can be compared.

    Args:
        cascade: Cascade with at least one stage.
        blocks: Held-out text, read with `marks=True`.
        controls: Maps "all" or "random" to a cascade that differs only in its last stage, which was
            trained on all tokens or on as many random tokens. Each control is measured twice: with
            its own entry and with the cascade's.
        batch_size: Sequences per forward pass.
        seed: Seed of the confidence intervals.
        command: Command that the user ran, for the record.
        progress: Called with the number of tokens processed since the last call.

    Returns:
        Figures of every variant, comparisons of the cascade with each control, and a verdict.

    Raises:
        UsageError: The cascade has no stages.
        CorpusError: The text has no marks, or only one of it and the text that the stages were
            trained on begins with BOS.

    Example:
        >>> from cascade import Cascade, Entry, evaluate_cascade, load, load_blocks
        >>> from cascade.stages.stage import new_stage
        >>> base = load("smollm2-135m")
        >>> cascade = Cascade(base)
        >>> cascade.add_stage(new_stage(base, num_layers=1), Entry(layer=29, threshold=0.95))
        >>> text = load_blocks(
        ...     "embedded", base.tokenizer, max_tokens=256, record_split="held-out", marks=True
        ... )
        >>> record = evaluate_cascade(cascade, text)
        >>> record.verdict.helps  # the stage is not trained
        False
    """
    check_seed(seed)
    if not cascade.stages:
        raise UsageError(
            "expected a cascade with at least one stage, got the base alone; add a stage first"
        )
    if blocks.response is None:
        raise CorpusError(
            "expected text with marks of its response tokens, got none; read it with marks=True"
        )
    check_blocks(cascade.base, blocks, batch_size)
    cascade.check_bos(blocks.bos)
    variants = _variants(cascade, controls or {})
    base, first_stage = variants[0], variants[1]
    hard: list[Array] = []
    first_exit = cascade.early_exit(1).exits[0].layer
    for ids, numbers in blocks.batches(batch_size):
        batch = torch.from_numpy(ids).long().to(cascade.base.device)
        for variant in variants:
            variant.add(batch)
        hard.append((first_stage.exit_layers[-1] > first_exit)[:, :-1])
        (progress or (lambda _: None))(len(numbers) * ids.shape[1])
    masks = _masks(np.concatenate(hard), blocks.response[:, 1:])
    sums = [_sums(variant, masks) for variant in variants]
    rows = [
        _row(variant, own, sums[0], base, blocks.tokens, seed)
        for variant, own in zip(variants, sums, strict=True)
    ]
    main = next(index for index, variant in enumerate(variants) if variant.name == "cascade")
    comparisons = [
        _compared(variant, sums[main], own, seed)
        for variant, own in zip(variants, sums, strict=True)
        if variant.trained_on not in (None, "hard")
    ]
    return CascadeEvaluationRecord(
        provenance=provenance_of(cascade.base, blocks, command),
        cascade=cascade.record(),
        rows=rows,
        comparisons=comparisons,
        verdict=verdict_of(rows[main].scopes, comparisons),
    )


def _variants(cascade: Cascade, controls: Mapping[str, Cascade]) -> list[_Variant]:
    variants = [_Variant("base", cascade.early_exit(0), 0, None, None, cascade)]
    last = len(cascade.stages)
    for count in range(1, last + 1):
        name = "cascade" if count == last else f"stage {count}"
        early = cascade.early_exit(count)
        variants.append(_Variant(name, early, count, "hard", "hard", cascade))
    for tokens, control in controls.items():
        like = control.with_entries_of(cascade)
        early = like.early_exit()
        variants.append(_Variant(f"trained on {tokens}", early, last, tokens, "hard", like))
        own = control.early_exit()
        variants.append(_Variant(f"{tokens} tokens", own, last, tokens, tokens, control))
    return variants


def _masks(hard: Array, response: Array) -> dict[str, Array]:
    return {
        "all": np.ones_like(hard),
        "easy": ~hard,
        "hard": hard,
        "response": response,
        "easy_response": response & ~hard,
        "hard_response": response & hard,
    }


@dataclass(frozen=True)
class SequenceSums:
    """Sums per sequence, `[S]`, by scope.

    Attributes:
        losses: Negative log-probabilities, in nats.
        hits: Correctly predicted tokens.
        tokens: Tokens.
    """

    losses: dict[str, Array]
    hits: dict[str, Array]
    tokens: dict[str, Array]


def _sums(variant: _Variant, masks: Mapping[str, Array]) -> SequenceSums:
    losses, hits = np.concatenate(variant.losses), np.concatenate(variant.hits)
    return SequenceSums(
        {scope: np.where(mask, losses, 0.0).sum(axis=1) for scope, mask in masks.items()},
        {scope: (mask & hits).sum(axis=1) for scope, mask in masks.items()},
        {scope: mask.sum(axis=1) for scope, mask in masks.items()},
    )


def _row(
    variant: _Variant,
    own: SequenceSums,
    base: SequenceSums,
    alone: _Variant,
    tokens: int,
    seed: int,
) -> VariantFigures:
    exit_layers = np.concatenate(variant.exit_layers)
    layers = [at.layer for at in variant.early.exits] + [variant.early.stack.num_layers]
    return VariantFigures(
        name=variant.name,
        stages=variant.stages,
        trained_on=variant.trained_on,
        entered_by=variant.entered_by,
        scopes={
            scope: _scope(own, base, scope, seed) for scope in SCOPES if own.tokens[scope].any()
        },
        exits=[
            ExitShare(layer=layer, share=float((exit_layers == layer).mean()))
            for layer in sorted(set(layers))
        ],
        layers_per_token=sum(variant.counts.layer_rows) / tokens,
        operations_ratio=flops(variant.early.stack, variant.counts)
        / flops(alone.early.stack, alone.counts),
        stage_rows=variant.cascade.stage_rows(variant.counts)[: variant.stages],
        counts=variant.counts.record(),
    )


def _scope(own: SequenceSums, base: SequenceSums, scope: str, seed: int) -> ScopeFigures:
    tokens = own.tokens[scope]
    nats = float(own.losses[scope].sum() / tokens.sum())
    relative = perplexity_ratio(own, base, scope, seed)
    return ScopeFigures(
        tokens=int(tokens.sum()),
        perplexity=perplexity(nats),
        accuracy=float(own.hits[scope].sum() / tokens.sum()),
        ratio=relative.ratio,
        ratio_interval=relative.interval,
        nats_per_token=nats,
        nats_difference=relative.nats,
        nats_interval=relative.nats_interval,
    )


@dataclass(frozen=True)
class RelativePerplexity:
    """The ratio of two perplexities and its 95 % interval; None beyond e^700; and both in nats."""

    ratio: float | None
    interval: list[float] | None
    nats: float
    nats_interval: list[float]


def perplexity_ratio(
    own: SequenceSums, other: SequenceSums, scope: str, seed: int
) -> RelativePerplexity:
    """Return the ratio of two perplexities and its 95 % interval over resampled sequences.

    Args:
        own: Sums of one variant.
        other: Sums of another variant over the same tokens.
        scope: Scope of the tokens, one of `SCOPES`.
        seed: Seed of the resamples.
    """
    difference, tokens = own.losses[scope] - other.losses[scope], own.tokens[scope]
    sequences = draws(len(tokens), seed)
    drawn = tokens[sequences].sum(axis=1)
    kept = drawn > 0
    resampled = difference[sequences].sum(axis=1)[kept] / drawn[kept]
    nats = float(difference.sum() / tokens.sum())
    return RelativePerplexity(
        perplexity(nats), ratio_interval(resampled), nats, interval(resampled)
    )


def _compared(
    variant: _Variant, main: SequenceSums, control: SequenceSums, seed: int
) -> ControlComparison:
    """Compare the cascade's perplexity with a control's, on all text and on response text."""
    return ControlComparison(
        control=variant.name,
        trained_on=variant.trained_on,
        entered_by=variant.entered_by,
        all=_paired(main, control, "all", seed),
        response=_paired(main, control, "response", seed),
    )


def _paired(
    main: SequenceSums, control: SequenceSums, scope: str, seed: int
) -> PairedRatio | UnsetType:
    if not main.tokens[scope].any():
        return UNSET
    relative = perplexity_ratio(main, control, scope, seed)
    low, high = relative.nats_interval
    return PairedRatio(
        ratio=relative.ratio,
        interval=relative.interval,
        nats_difference=relative.nats,
        nats_interval=relative.nats_interval,
        wins="cascade" if high < 0 else "control" if low > 0 else "neither",
    )


# --- The verdict -----------------------------------------------------------------------------


def verdict_of(
    scopes: Mapping[str, ScopeFigures], comparisons: Sequence[ControlComparison]
) -> CascadeVerdict:
    """Return whether the stages help, and whether routing by hardness pays off.

    Args:
        scopes: Figures of the cascade. The verdict uses response text if there is any.
        comparisons: Comparisons of the cascade with each control.
    """
    scope: Scope = "response" if "response" in scopes else "all"
    figures = scopes[scope]
    low, high = _log_interval(figures.ratio_interval, figures.nats_interval)
    text = "response text" if scope == "response" else "all text"
    ratio = _ratio(
        figures.ratio, figures.ratio_interval, figures.nats_difference, figures.nats_interval
    )
    if high < 0:
        stage = f"the stage helps: perplexity of {text} {ratio}"
    elif low > 0:
        stage = f"the stage harms: perplexity of {text} {ratio}"
    else:
        stage = f"the stage has no significant effect: perplexity of {text} {ratio}"
    random = _comparison(comparisons, "random", "random", scope)
    trained = _comparison(comparisons, "all", "hard", scope)
    return CascadeVerdict(
        stage=stage,
        helps=high < 0,
        routing=None if random is None else _routing(random),
        training=None if trained is None else _training(trained),
        earns_its_keep=None if random is None else random.wins == "cascade",
    )


def _log_interval(
    interval: Sequence[float] | None, nats: Sequence[float] | UnsetType
) -> tuple[float, float]:
    """Return the interval of a ratio in nats, also of earlier records."""
    if nats is not UNSET:
        return nats[0], nats[1]
    low, high = interval or (0.0, math.inf)
    return (math.log(low) if low else -math.inf), math.log(high)


def _ratio(
    ratio: float | None,
    interval: Sequence[float] | None,
    nats: float | UnsetType,
    nats_interval: Sequence[float] | UnsetType,
) -> str:
    words = ratio_words(ratio, known(nats))
    return f"{words} ({ratio_interval_words(interval, known(nats_interval))})"


def _paired_words(paired: PairedRatio) -> str:
    return _ratio(paired.ratio, paired.interval, paired.nats_difference, paired.nats_interval)


def _comparison(
    comparisons: Sequence[ControlComparison], trained_on: str, entered_by: str, scope: Scope
) -> PairedRatio | None:
    """Return the cascade's perplexity ratio to one control; None without that control."""
    for one in comparisons:
        if (one.trained_on, one.entered_by) == (trained_on, entered_by):
            ratio = one.response if scope == "response" else one.all
            return None if ratio is UNSET else ratio
    return None


def _routing(random: PairedRatio) -> str:
    """Describe the effect of routing hard tokens, compared with the same work on random tokens."""
    ratio = f"{_paired_words(random)} the perplexity of routing as many"
    return {
        "cascade": f"routing by hardness is better than random routing: {ratio} random tokens",
        "control": f"routing by hardness is worse than random routing: {ratio} random tokens",
        "neither": "routing by hardness does not differ significantly from random routing: "
        f"{ratio} random tokens",
    }[random.wins]


def _training(trained: PairedRatio) -> str:
    """Describe the effect of training on hard tokens only; hard tokens enter in both cases."""
    ratio = f"{_paired_words(trained)} the perplexity of a stage trained"
    return {
        "cascade": f"training on hard tokens only is better: {ratio} on all tokens",
        "control": f"training on all tokens is better: {ratio} on all tokens",
        "neither": "training on hard tokens only does not differ significantly from training on "
        f"all tokens: {ratio} on all tokens",
    }[trained.wins]
